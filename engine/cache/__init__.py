"""Memory of sequences: byte layout of pages and slots (layout.py), row formats (rows.py), the arena (arena.py)."""
