"""Files of our own: written whole or not at all, sampled sets, data sets to read."""
