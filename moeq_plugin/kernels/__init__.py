"""Products of activations with packed weights, compiled on the machine that runs them."""
