"""Rounding against the stream of the 16-bit model, in the order in which a layer computes."""
