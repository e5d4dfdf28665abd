"""Where things are in a model: experts, routers, gates. Tensors out, no framework in."""
