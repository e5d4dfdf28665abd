"""Mend the ``ignore`` of a saved checkpoint: names that readers find.

compressed-tensors lists the modules left in 16 bit and renames them by transformers' rules for
tensors. Without the ``.weight`` that these expect, Mixtral's experts come out as
``block_sparse_moe.experts.0.up_proj``, which is the name of nothing. vLLM looks for what the file
says, transformers and compressed-tensors for the module: both are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from moeq_plugin.integrations.llm_compressor.checkpoint.file_names import (
    module_renamed,
    renamed,
    saving_renamings,
)


def mend_ignored(model: PreTrainedModel, directory: Path) -> None:
    """Rewrite the entries of ``ignore`` that were renamed; patterns and classes stay.

    Args:
        model: that was saved.
        directory: of the checkpoint.
    """
    path = directory / "config.json"
    config = json.loads(path.read_text())
    section = config.get("quantization_config", {})
    ignored = section.get("ignore") or []
    spelled = _spellings(model)
    mended = [each for name in [*ignored, *_left_out(model)] for each in spelled.get(name, (name,))]
    if mended != ignored:
        section["ignore"] = list(dict.fromkeys(mended))
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


def _left_out(model: PreTrainedModel) -> Iterator[str]:
    """Yield linears of a class derived from ``nn.Linear``, which some readers take for one.

    A target `Linear` does not mean them, so compressed-tensors does not list them.
    """
    for name, module in model.named_modules():
        is_other = isinstance(module, nn.Linear) and type(module) is not nn.Linear
        if is_other and getattr(module, "quantization_scheme", None) is None:
            yield from (name, module_renamed(name, saving_renamings(model)))


def _spellings(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return for each name that compressed-tensors may have written the module's and the file's."""
    rules = saving_renamings(model)
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        if "weight" in module._parameters:
            written = renamed(name, rules)
            found[written] = (*found.get(written, ()), name, module_renamed(name, rules))
    return found
