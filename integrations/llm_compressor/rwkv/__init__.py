"""RWKVQuantModifier: which weights get a grid and which a codebook, and saving codebooks."""
