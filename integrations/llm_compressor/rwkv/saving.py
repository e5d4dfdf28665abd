"""Keep weights packed after a run, and make ``save_pretrained`` say so in ``config.json``.

Scalar weights are saved by the host as compressed-tensors. Its section of the configuration moves
into ours, ``quant_method: moeq``, which transformers knows once ``moeq_plugin.integrations.hf``
has been imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moeq_plugin.core.codebook import CodebookWeight
from moeq_plugin.integrations.llm_compressor.host import replace_saving
from moeq_plugin.models.packed import (
    FORMAT_VERSION,
    PackedFormat,
    pack_modules,
    packed_modules,
)


@torch.no_grad()
def keep_packed(model: PreTrainedModel, encoded: Mapping[str, CodebookWeight]) -> None:
    """Replace modules by packed ones, in place, and describe them whenever the model is saved.

    Args:
        model: the model.
        encoded: what stands for the weight of each module, by name.
    """
    # a name stays, but what stands there is another module from here on
    pack_modules(model, {name: PackedFormat.of(weight) for name, weight in encoded.items()})
    for name, module in packed_modules(model).items():
        if name in encoded:
            module.fill(encoded[name])
    _describe_on_save(model)


def _describe_on_save(model: PreTrainedModel) -> None:
    """Wrap ``save_pretrained`` once per model."""
    save_pretrained = model.save_pretrained
    if hasattr(save_pretrained, "_moeq_describes_codebooks"):
        return

    @wraps(save_pretrained)
    def save(save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        # first: the host's section has to be in the file before it can move into ours
        save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        config = json.loads(path.read_text())
        # read off the model as it is now: it may have been unpacked since it was quantized
        config["quantization_config"] = describe_codebooks(
            {name: module.form for name, module in packed_modules(model).items()},
            config.get("quantization_config"),
        )
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    save._moeq_describes_codebooks = True  # type: ignore[attr-defined]
    replace_saving(model, save)


def describe_codebooks(
    forms: Mapping[str, PackedFormat], scalar: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint with codebooks.

    Args:
        forms: the format of each packed module by name.
        scalar: the compressed-tensors section of the other weights, ``None`` if there are none.
    """
    names: dict[PackedFormat, list[str]] = {}
    for name, form in forms.items():
        names.setdefault(form, []).append(name)
    return {
        "quant_method": "moeq",
        "format_version": FORMAT_VERSION,
        "codebooks": [{**asdict(form), "targets": sorted(of)} for form, of in names.items()],
        "scalar": scalar,
    }
