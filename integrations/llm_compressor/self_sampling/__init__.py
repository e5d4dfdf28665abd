"""Calibration text that the model writes itself, as a data set and inside of oneshot."""
