"""What of a multi-modal model is not its language model: towers that see or hear, and projectors.

Text does not reach them, so calibrating on text says nothing about their inputs.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def tower_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules outside of the language model and its output embedding.

    Args:
        model: of transformers. One of text alone has none of these, whatever its structure.
    """
    config: Any = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return set()
    language, output = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]
    inner = {*language.modules(), *(() if output is None else output.modules())}
    return set(model.modules()) - inner
