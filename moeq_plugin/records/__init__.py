"""What a run writes down: what it did to each linear, how good the result is, its progress."""
