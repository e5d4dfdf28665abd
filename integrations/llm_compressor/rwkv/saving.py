"""Keep weights packed after a run, and say so in the ``config.json`` of a checkpoint.

Scalar weights are saved by the host as compressed-tensors. Its section of the configuration moves
into ours, ``quant_method: moeq``, which transformers knows once ``moeq_plugin.integrations.hf``
has been imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from transformers import PreTrainedModel

from moeq_plugin.core.codebook import CodebookWeight
from moeq_plugin.core.packed_codebook import FORMAT_VERSION, PackedFormat
from moeq_plugin.models.packed import pack_modules, packed_modules


class PackedWords(NamedTuple):
    """What stands for a weight in a checkpoint.

    Attributes:
        form: how it is packed.
        words: the packed tensor.
    """

    form: PackedFormat
    words: torch.Tensor

    @classmethod
    def of(cls, encoded: CodebookWeight) -> Self:
        """Pack an encoded weight."""
        form = PackedFormat.of(encoded)
        return cls(form, form.pack(encoded))


@torch.no_grad()
def keep_packed(model: PreTrainedModel, packed: Mapping[str, PackedWords]) -> None:
    """Replace modules by packed ones, in place.

    Args:
        model: the model.
        packed: what stands for the weight of each module, by name.
    """
    replaced = {name: model.get_submodule(name) for name in packed}
    # a name stays, but what stands there is another module from here on
    pack_modules(model, {name: of.form for name, of in packed.items()})
    modules = packed_modules(model)
    for name, of in packed.items():
        modules[name].fill(of.words)
        del replaced[name].weight  # the run may go on to hold the module


def write_codebooks(model: PreTrainedModel, directory: Path) -> None:
    """Describe a model's codebooks in the ``config.json`` that has just been saved, if it has any.

    Args:
        model: as it is now: it may have been unpacked since it was quantized.
        directory: of the checkpoint, not yet published.
    """
    forms = {name: module.form for name, module in packed_modules(model).items()}
    if not forms:
        return
    path = directory / "config.json"
    config = json.loads(path.read_text())
    # the host's section has to be in the file before it can move into ours
    config["quantization_config"] = describe_codebooks(forms, config.get("quantization_config"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


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
