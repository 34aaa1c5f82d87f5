"""Measurements. Each prints a table; the figures that we saw are in README.md."""
