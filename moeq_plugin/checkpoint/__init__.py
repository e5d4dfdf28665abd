"""What a checkpoint on disk holds, whether it is sound and who can read it; no model is built."""
