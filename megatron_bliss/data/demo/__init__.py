"""Text that every machine with Python has, for a corpus to try things on without a network."""
