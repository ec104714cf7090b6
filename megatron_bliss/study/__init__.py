"""Arms compared under several sets of options, over paired seeds."""
