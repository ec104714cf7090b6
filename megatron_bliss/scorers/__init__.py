"""Scorers: what a run has learned to score units by, as a folder that anyone can apply to any corpus."""
