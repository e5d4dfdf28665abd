"""What llama.cpp calls the weights of a model, by the tensor maps of its own package gguf.

llama.cpp holds all experts of a layer in one tensor for each projection, so that linears of
experts lose their numbers and share a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

# numbers of experts, and what llama.cpp's converter takes off the names of multi-modal models
_EXPERT = re.compile(r"\.experts\.\d+\.")
_LAYER = re.compile(r"\b\d+\b")
_LANGUAGE = re.compile(r"\blanguage_model\.")
_OTHERS = re.compile(r"[^a-z0-9]")
# of latent attention, what the converter splits where a family has tensors for the parts
_SPLIT = (".kv_b_proj", ".v_b_proj")
_LISTED = 3


def gguf_package() -> ModuleType:
    """Return llama.cpp's package gguf.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "llama.cpp's files are read and written by its package gguf, which is not installed: "
            "pip install 'moeq-plugin[llamacpp]'"
        ) from error
    return gguf


def tensor_names(names: Iterable[str], model_type: str) -> dict[str, str]:
    """Return the name of the tensor that each linear's weight is in, or is an expert of.

    The family is the one whose tensor map knows all linears. Where several do, they agree on the
    names of nearly all families; where they do not, the one that is spelled like the model's type
    is meant.

    Args:
        names: of linears, experts being modules with a number.
        model_type: of the model's configuration, such as ``qwen3_moe``.

    Raises:
        ValueError: naming the linears that no family of llama.cpp knows.

    Example:
        >>> tensor_names(["model.layers.0.mlp.experts.3.up_proj"], "qwen3_moe")
        {'model.layers.0.mlp.experts.3.up_proj': 'blk.0.ffn_up_exps.weight'}
    """
    theirs = {name: _in_first_layer(name) for name in names}
    wanted = set(theirs.values())
    by_family: dict[str, dict[str, str]] = {}
    nearest: set[str] = wanted
    for family, known in _families(wanted):
        missing = wanted - known.keys()
        if not missing:
            by_family[family] = known
        elif len(missing) < len(nearest):
            nearest = missing
    if not by_family:
        unknown = [name for name, first in theirs.items() if first in nearest]
        raise ValueError(
            f"no family of llama.cpp has tensors for all linears of this model ({model_type}); "
            f"the nearest one lacks {len(unknown)}, such as {', '.join(unknown[:_LISTED])}"
        )
    found = _meant(by_family, model_type)
    return {name: _in_layer_of(name, found[first]) for name, first in theirs.items()}


def _in_first_layer(name: str) -> str:
    """Return the name without the expert's number, and with 0 as the layer's.

    All layers are named alike, and a table of all of them for every family would take minutes for
    what a configuration may claim.
    """
    return _LAYER.sub("0", _LANGUAGE.sub("", _EXPERT.sub(".experts.", name)), count=1)


def _in_layer_of(name: str, tensor: str) -> str:
    """Return a tensor of the first layer as that of the layer which a linear's name says."""
    number = _LAYER.search(name)
    return _LAYER.sub(number[0], tensor, count=1) if number else tensor


def _families(wanted: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each family of llama.cpp with the wanted names that it knows."""
    gguf = gguf_package()
    for architecture in gguf.MODEL_ARCH:
        # gguf's class adds what is peculiar to an architecture to a table of the class, where the
        # next one finds it: each gets a class with a table of its own
        table = {"block_mappings_cfg": dict(gguf.TensorNameMap.block_mappings_cfg)}
        names = type("TensorNames", (gguf.TensorNameMap,), table)(architecture, n_blocks=1)
        known = {name: _tensor(names, name) for name in wanted}
        yield (
            gguf.MODEL_ARCH_NAMES[architecture],
            {name: f"{found}.weight" for name, found in known.items() if found is not None},
        )


def _tensor(names: Any, name: str) -> str | None:
    """Return the tensor that a linear is named after: of what is split, the one of its columns."""
    values = names.get_name(name.replace(*_SPLIT)) if name.endswith(_SPLIT[0]) else None
    found: str | None = values or names.get_name(name)
    return found


def _meant(by_family: Mapping[str, dict[str, str]], model_type: str) -> dict[str, str]:
    """Return the names that all families agree on, or else those of the family of this type.

    Raises:
        ValueError: if they disagree and none has this type.
    """
    distinct = {tuple(sorted(names.items())): names for names in by_family.values()}
    if len(distinct) == 1:
        return next(iter(by_family.values()))
    for family, names in by_family.items():
        if _OTHERS.sub("", family) == _OTHERS.sub("", model_type):
            return names
    raise ValueError(
        f"the families {sorted(by_family)} of llama.cpp name the tensors of this model "
        f"({model_type}) differently, and none of them is spelled like it"
    )
