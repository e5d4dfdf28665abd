"""AWQ whose scales know the router: the modifier, what it may scale, how it is judged."""
