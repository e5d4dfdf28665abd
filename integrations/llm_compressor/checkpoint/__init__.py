"""Saving what loads again, what other programs cannot read of it, and loading it exactly."""
