"""A run: its rounds, its stages, its folder."""
