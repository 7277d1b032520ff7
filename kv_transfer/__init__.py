"""Bytes from here to there: pages and slots of a prefill rank into the memory of a decode rank. No model knowledge."""
