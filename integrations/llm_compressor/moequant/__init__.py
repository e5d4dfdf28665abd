"""MoEQuantModifier: what is asked for, the run, and what of it is kept on disk."""
