"""Raw text to a corpus: .bin, .idx, manifest, provenance, rejected lines."""
