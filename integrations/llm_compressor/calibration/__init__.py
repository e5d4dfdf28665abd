"""One pass over the calibration data: which tokens reach which linear, with which weight."""
