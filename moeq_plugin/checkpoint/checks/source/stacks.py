"""How a source may hold all experts of a layer together, and what the matrix of one is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from moeq_plugin.checkpoint.codes import can_read, read_rows
from moeq_plugin.checkpoint.headers import StoredTensor
from moeq_plugin.core.names import OfExpert

_Modules = Mapping[str, Mapping[str, StoredTensor]]
# gate and up in one tensor, and down; the other pairs are Granite's and Aria's
_PAIRS = (
    ("experts.gate_up_proj", "experts.down_proj"),
    ("input_linear", "output_linear"),
    ("experts.fc1", "experts.fc2"),
)
# a tensor for each projection: Step-3.7's in place of the block, and DBRX's, whose down is turned
_MOE = {name: f"moe.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
_FLAT = {"gate_proj": "experts.mlp.w1", "up_proj": "experts.mlp.v1", "down_proj": "experts.mlp.w2"}
_ENDINGS = tuple(stack for pair in _PAIRS for stack in pair) + (*_MOE.values(), *_FLAT.values())


def is_stack(module: str) -> bool:
    """Tell whether a tensor holds all experts of a layer.

    Args:
        module: its name without a suffix.
    """
    return module.endswith(_ENDINGS)


def matrices_in_stacks(
    modules: _Modules, found: OfExpert, shape: tuple[int, int], family: str
) -> Iterator[torch.Tensor]:
    """Yield what an expert's projection may be, in float32; several where shapes leave it open.

    Args:
        modules: the source's tensors by plain name of their module and by suffix.
        found: the projection.
        shape: of its matrix.
        family: of the source.
    """
    projection = found.projection
    is_down, is_up = projection == "down_proj", projection == "up_proj"
    for pair in _PAIRS:
        whole = _of_expert(modules, f"{found.block}.{pair[is_down]}", found.expert)
        if whole is None:
            continue
        if family == "gpt_oss":  # [in, out], gate and up alternating
            yield whole.T if is_down else whole.T[is_up::2]
            return
        for turned in (whole, whole.T):
            part = turned if is_down else turned.chunk(2)[is_up]
            if tuple(part.shape) == shape:
                yield part
    outside = found.block.rpartition(".")[0]
    places: tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor]], ...] = (
        (f"{outside}.{_MOE.get(projection)}", lambda matrix: matrix),
        (f"{found.block}.{_FLAT.get(projection)}", lambda matrix: matrix.T if is_down else matrix),
    )
    rows = shape[::-1] if is_down else shape
    for place, turn in places:
        whole = _of_expert(modules, place, found.expert, rows[0])
        if whole is not None and tuple(turn(whole).shape) == shape:
            yield turn(whole)


def _of_expert(
    modules: _Modules, module: str, expert: int, num_rows: int | None = None
) -> torch.Tensor | None:
    """Return an expert's share of a tensor, ``None`` if there is no such tensor or share.

    Args:
        modules: see :func:`matrices_in_stacks`.
        module: what holds the tensor.
        expert: number of the expert.
        num_rows: of its share, where a tensor has two dimensions and the experts stand in it one
            below the other.
    """
    tensors = modules.get(module, {})
    stored = tensors.get("", tensors.get("weight"))
    if stored is None or not can_read(stored):
        return None
    if len(stored.shape) == 3 and expert < stored.shape[0]:
        return read_rows(stored, expert, 1)[0].float()
    if len(stored.shape) == 2 and num_rows and (expert + 1) * num_rows <= stored.shape[0]:
        return read_rows(stored, expert * num_rows, num_rows).float()
    return None
