"""From a budget to a scheme for every linear: measure, choose, and say it in config groups."""
