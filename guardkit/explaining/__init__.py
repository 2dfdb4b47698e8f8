"""Which parts of an image a score comes from."""
