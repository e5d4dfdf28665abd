"""What a kept run belongs to: digests of a model and of its calibration data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from moeq_plugin.integrations.llm_compressor.kept_parts import tensor_digest

_MAX_THREADS = 8  # hashing lets go of the interpreter's lock


@torch.no_grad()
def model_digest(model: nn.Module) -> str:
    """Return a digest of a model: names, shapes, types and all bytes of each tensor."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(tensor_digest, (tensor for _, tensor in tensors))
        digest = hashlib.sha256()
        for (name, _), of_tensor in zip(tensors, digests, strict=True):
            digest.update(f"{name} {of_tensor}\n".encode())
    return digest.hexdigest()


def data_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Return a digest of calibration batches, in their order.

    Raises:
        ValueError: if the order changes from one pass over the data to the next.
    """
    first, second = _digest_of(batches), _digest_of(batches)
    if first != second:
        raise ValueError(
            "work_dir needs calibration data that come in the same order every time, or a run "
            "could not be continued: use shuffle_calibration_samples=False and a DataLoader "
            "without shuffling"
        )
    return first


def _digest_of(batches: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode())
            digest.update(str(torch.as_tensor(batch[name]).tolist()).encode())
    return digest.hexdigest()
