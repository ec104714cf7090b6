"""Every option of a run, and the bounds of each."""
