"""Tools around training: where memory goes, and how large a batch fits."""
