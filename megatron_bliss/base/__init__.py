"""What every room stands on: device, ranks, files, saved states, metrics."""
