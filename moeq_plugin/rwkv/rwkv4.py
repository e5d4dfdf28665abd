"""RWKV-4 of transformers, kept as it was loaded.

A model of more than ``rescale_every`` layers divides weights in place at its first call in
evaluation mode, which calibration repeats and a saved model carries.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def disable_rescaling(model: nn.Module) -> None:
    """Let an RWKV-4 keep its weights as they were loaded, in place; call it before quantization.

    The rescaling only keeps float16 from overflowing. Without it the logits are the same but for
    the epsilon of the norms. Being by powers of two, what was rescaled is restored exactly.
    """
    base: Any = getattr(model, "rwkv", model)
    was_training = base.training
    base.train()
    if base.layers_are_rescaled:
        base._rescale_layers()
    base.config.rescale_every = 0
    base.train(was_training)
