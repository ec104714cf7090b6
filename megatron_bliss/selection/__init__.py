"""From a scored corpus to the units that are kept."""
