"""Caches: what a transformer computed at one denoise step, used again at the next ones."""
