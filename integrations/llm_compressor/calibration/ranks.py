"""What processes of ``torch.distributed`` do together; each calibrates on its own part of the data.

A process alone is one rank of one, so that nobody has to ask how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from compressed_tensors.distributed import get_source_rank, is_distributed
from torch import distributed, nn


def check_data_differ(batches: Iterable[Mapping[str, Any]]) -> None:
    """Refuse data that ranks calibrate on twice.

    llm-compressor 0.14 means to share a data set out among ranks that all pass the same, but
    gives each of them its first part.

    Args:
        batches: this rank's calibration data.

    Raises:
        ValueError: if most of its sequences are those of another rank; on every rank.
    """
    if not is_distributed():
        return
    ours = {str(torch.as_tensor(row).tolist()) for b in batches for row in b["input_ids"]}
    digests = gather({hashlib.sha256(row.encode()).digest() for row in ours})
    for rank, other in itertools.combinations(range(len(digests)), 2):
        twice = len(digests[rank] & digests[other])
        if 2 * twice > min(len(digests[rank]), len(digests[other])):
            raise ValueError(
                f"ranks {rank} and {other} would calibrate on {twice} of the same sequences: "
                "llm-compressor gives every rank the first part of a data set that all ranks "
                "share. Pass each rank a part of its own: dataset.shard(num_shards=world_size, "
                "index=rank, contiguous=True)"
            )


@contextlib.contextmanager
def own_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let every rank change weights that ranks share; afterwards all have what the first one has.

    Without it one would read what another has half changed, or change it again.

    Args:
        modules: in the same order on every rank; call with offloading disabled, so that their
            parameters stay the same objects.
    """
    if not is_distributed():
        yield
        return
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    shared = [parameter.data for parameter in parameters]
    distributed.barrier()  # some may still be running the layer as it was
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    distributed.barrier()
    yield
    for parameter, memory in zip(parameters, shared, strict=True):
        distributed.broadcast(parameter.data, src=get_source_rank())
        parameter.data = memory.copy_(parameter.data)
    distributed.barrier()  # nobody reads the shared memory before all have written to it


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Let one rank after the other do what changes shared weights for a while."""
    turns = distributed.get_world_size() if is_distributed() else 0
    ours = distributed.get_rank() if turns else 0
    # a barrier ends each turn, and every rank passes all of them: some before its own, then others
    for _ in range(ours):
        distributed.barrier()
    yield
    for _ in range(ours, turns):
        distributed.barrier()


def wait_for_all() -> None:
    """Wait until every rank has come here; a process alone does not wait."""
    if is_distributed():
        distributed.barrier()


def mean_over_ranks(mean: float, count: int, device: torch.device) -> float:
    """Return the mean of all ranks' elements.

    Args:
        mean: of this rank's.
        count: how many those are.
        device: that ranks exchange tensors on.
    """
    if not is_distributed():
        return mean
    sums = torch.tensor([mean * count, count], dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def gather(ours: Any) -> list[Any]:
    """Return what every rank has, in their order; a process alone has only its own."""
    if not is_distributed():
        return [ours]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, ours)
    return parts


def over_ranks(ours: Counter[int]) -> tuple[Counter[int], Counter[int]]:
    """Return the sum of what the ranks before this one count, and of what all do."""
    parts = gather(ours)
    rank = distributed.get_rank() if is_distributed() else 0
    return sum(parts[:rank], Counter()), sum(parts, Counter())


def give_to_all(
    tensors: dict[nn.Linear, list[torch.Tensor]],
    owners: Mapping[str, int],
    modules: Mapping[str, nn.Linear],
    count: Callable[[nn.Linear], int],
) -> None:
    """Give every rank the tensors that each has of its own linears.

    Args:
        tensors: of this rank's linears, shaped like their weights; filled in place.
        owners: which rank has those of each linear.
        modules: the linears by name.
        count: how many there are of a linear.
    """
    for name, owner in sorted(owners.items()):
        linear = modules[name]
        # empty where they are received, and as many as the owner has: broadcasts go in pairs
        ours = tensors.setdefault(
            linear, [torch.empty_like(linear.weight) for _ in range(count(linear))]
        )
        for tensor in ours:
            distributed.broadcast(tensor, src=owner)


def own_part(items: Iterable[Any]) -> list[Any]:
    """Return what this rank takes of a list that all ranks have: a contiguous part."""
    items = list(items)
    if not is_distributed():
        return items
    rank, world = distributed.get_rank(), distributed.get_world_size()
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]
