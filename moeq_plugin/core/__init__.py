"""The mathematics: tensors in, tensors or frozen dataclasses out. Knows no framework but torch."""
