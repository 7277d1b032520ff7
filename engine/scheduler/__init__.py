"""Pure decisions about sequences, pages and slots: numbers in, a plan out. No torch here."""
