"""Equations (1) to (7) of BLISS (arXiv 2510.06048)."""
