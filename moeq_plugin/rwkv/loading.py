"""Load RWKV weights of other layouts without naming a class: the tensors tell their version.

Where the class is known, its ``from_pretrained`` reads the same files.
"""

from __future__ import annotations

from pathlib import Path

import torch

from moeq_plugin.rwkv.fla import read_fla_folder
from moeq_plugin.rwkv.modeling import RWKVForCausalLM
from moeq_plugin.rwkv.official import Tensors, read_pth, version_of
from moeq_plugin.rwkv.rwkv6 import RWKV6ForCausalLM
from moeq_plugin.rwkv.rwkv7 import RWKV7ForCausalLM

_CLASSES: dict[int, type[RWKVForCausalLM]] = {6: RWKV6ForCausalLM, 7: RWKV7ForCausalLM}


def from_official(
    tensors: Tensors, *, dtype: torch.dtype | None = None, copy: bool = True
) -> RWKVForCausalLM:
    """Build the model that official tensors belong to.

    Args:
        tensors: by official name; sizes are read from their shapes.
        dtype: of the model; ``None`` for that of the embedding.
        copy: see :meth:`RWKVForCausalLM.from_official`.

    Returns:
        An RWKV-6 or RWKV-7 in evaluation mode.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape; all are listed.
    """
    return _CLASSES[version_of(tensors)].from_official(tensors, dtype=dtype, copy=copy)


def load_pth(path: str | Path, *, dtype: torch.dtype | None = None) -> RWKVForCausalLM:
    """Load an official ``.pth`` file; see :func:`from_official`.

    The file is mapped to memory and must stay as it is while the model is in use: a weight is read
    when it is needed, and copied when it is changed.
    """
    return from_official(read_pth(path), dtype=dtype, copy=False)


def load_fla_folder(path: str | Path, *, dtype: torch.dtype | None = None) -> RWKVForCausalLM:
    """Load a local folder of flash-linear-attention; see :func:`from_official`."""
    return from_official(read_fla_folder(path), dtype=dtype, copy=False)
