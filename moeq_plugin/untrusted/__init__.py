"""What files of strangers may not do to us: every reader of a checkpoint's files goes through here.

Standard library only, so that every other room may use it.
"""
