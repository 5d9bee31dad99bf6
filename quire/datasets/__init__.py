"""Data sets that Quire generates itself: the same rows for the same seed, everywhere. Knows no model and no torch."""
