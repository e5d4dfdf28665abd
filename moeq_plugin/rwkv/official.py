"""Official RWKV-6 and RWKV-7 checkpoints (``.pth``): their names, shapes and sizes, both ways.

An official low-rank factor is multiplied from the right (``x @ w1``) and therefore the transpose
of an ``nn.Linear``'s weight; the five ``time_maa_w2`` of RWKV-6 are one tensor. Files differ in
whether vectors have leading ones, which is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

Tensors = Mapping[str, torch.Tensor]

_LOW_RANK = re.compile(r"(.*\.att\.(?:[wavg][12]|time_maa_w1|time_decay_w[12]))\.weight")
_ELEMENTWISE = re.compile(r"(.*\.(?:x_[rwkvag]|k_[ka]|r_k|time_maa_[xwkvrg]))\.weight")
_STACKED = "time_maa_w2"
_PART = re.compile(rf"(.*\.att\.{_STACKED})\.(\d)\.weight")
_UNUSED = {f"blocks.0.att.v{index}" for index in range(3)}  # some files have them, no model does
_MOST_NAMES = 60


class _Official(NamedTuple):
    """Where an official file has one of our tensors.

    Attributes:
        name: official name.
        part: index in a stacked tensor, ``None`` if the tensor is a whole one.
        is_transposed: whether the file has the transpose.
    """

    name: str
    part: int | None
    is_transposed: bool


class SharedSizes(TypedDict):
    """The sizes that both versions store alike, by their names in a configuration."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int


def to_official(state_dict: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors of a model of ours under official names, as an official file has them."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        official = _official(name)
        part = tensor.T if official.is_transposed else tensor
        parts.setdefault(official.name, []).append(part)
    return {
        name: (torch.stack(part) if name.endswith(_STACKED) else part[0]).contiguous()
        for name, part in parts.items()
    }


def to_state_dict(tensors: Tensors, expected: Tensors, version: int) -> dict[str, torch.Tensor]:
    """Return official tensors under our names, the inverse of :func:`to_official`.

    Args:
        tensors: by official name; not modified.
        expected: state dict of a model of their sizes, of which only names and shapes count.
        version: of that model, for the error.

    Returns:
        The tensors in the shapes of ``expected``; views, wherever one will do.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape; all are listed.
    """
    names = {_official(name).name for name in expected}
    _check_names(tensors, names, version)
    state_dict, misshapen = {}, []
    for name, parameter in expected.items():
        official = _official(name)
        stored = tensors[official.name]
        tensor = stored if official.part is None else stored[official.part]
        tensor = tensor.T if official.is_transposed else tensor
        if tensor.squeeze().shape != parameter.squeeze().shape:
            misshapen.append(f"{official.name} {list(stored.shape)}")
            continue
        state_dict[name] = tensor.reshape(parameter.shape)
    if misshapen:
        raise ValueError(f"these tensors do not fit the sizes of the others: {misshapen}")
    return state_dict


def read_pth(path: str | Path) -> Tensors:
    """Return the tensors of an official ``.pth`` file, mapped to memory, not yet read."""
    tensors: Tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return tensors


def version_of(tensors: Tensors) -> int:
    """Tell the version of official tensors, 6 or 7; what is neither counts as 7."""
    return 6 if "blocks.0.att.time_maa_w1" in tensors else 7


def size_of(tensors: Tensors, name: str, dimension: int, default: int) -> int:
    """Return a tensor's size in one dimension, or a default where there is no such tensor.

    Sizes are read before names are checked, and the check then lists all that is missing.
    """
    return tensors[name].shape[dimension] if name in tensors else default


def shared_sizes(tensors: Tensors) -> SharedSizes:
    """Read the sizes that both versions store alike."""
    indices = [int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")]
    hidden = size_of(tensors, "emb.weight", 1, 1)
    return {
        "vocab_size": size_of(tensors, "emb.weight", 0, 1),
        "hidden_size": hidden,
        "num_hidden_layers": max(indices, default=0) + 1,
        "intermediate_size": size_of(tensors, "blocks.0.ffn.key.weight", 0, 4 * hidden),
    }


def _official(name: str) -> _Official:
    name = name.removeprefix("model.").replace("lm_head.", "head.")
    if match := _PART.fullmatch(name):
        return _Official(match[1], int(match[2]), True)
    if match := _LOW_RANK.fullmatch(name):
        return _Official(match[1], None, True)
    if match := _ELEMENTWISE.fullmatch(name):
        return _Official(match[1], None, False)
    return _Official(name, None, False)


def _check_names(tensors: Tensors, wanted: set[str], version: int) -> None:
    given = set(tensors) - _UNUSED
    if wanted != given:
        sizes = shared_sizes(tensors)
        raise ValueError(
            f"these tensors are no RWKV-{version} of {sizes['num_hidden_layers']} layers "
            f"and {sizes['hidden_size']} channels. Missing: {_listing(wanted - given)}. "
            f"Unexpected: {_listing(given - wanted)}"
        )


def _listing(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_MOST_NAMES]) or "none"
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")
