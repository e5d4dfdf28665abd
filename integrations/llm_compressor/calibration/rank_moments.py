"""What ranks have observed, added up, and the solves shared out between them.

In which order linears are called, and which experts are called at all, differs from rank to rank,
so everything goes by name, in one order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compressed_tensors.offload import update_offload_parameter
from torch import distributed, nn

from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    Observation,
)
from moeq_plugin.integrations.llm_compressor.calibration.ranks import gather
from moeq_plugin.records.run import LinearRecord


@dataclass(frozen=True)
class _Seen:
    """What a rank tells the others of one observation."""

    linears: tuple[str, ...]
    columns: int


def sum_over_ranks(calibration: Calibration, names: Mapping[nn.Module, str]) -> None:
    """Give every rank the second moments and samples of all.

    Args:
        calibration: what this rank has observed; modified in place.
        names: of the linears.
    """
    modules = {n: module for module, n in names.items() if isinstance(module, nn.Linear)}
    ours = {
        names[linear]: _Seen(
            tuple(names[x] for x in observation.linears), len(observation.moments.hessian)
        )
        for linear, observation in calibration.observations.items()
    }
    # all_reduce pairs calls by their order, so that all ranks have to go by the same list
    for leader, seen in sorted(_union(ours).items()):
        linears = [modules[name] for name in seen.linears]
        observation = calibration.observations.get(modules[leader])
        if observation is None:  # an expert that got no token on this rank
            device = linears[0].weight.device
            moments = calibration.no_tokens(linears[0], seen.columns, device)
            observation = Observation(moments, linears, calibration.position_of(linears[0]))
            calibration.observations[modules[leader]] = observation
        for tensor in vars(observation.moments).values():
            distributed.all_reduce(tensor)
    for _, sample in sorted(calibration.samples_by_name().items()):
        sample.merge(gather((sample.draws, sample.rows, sample.routing)))


def keep_own_share(calibration: Calibration, names: Mapping[nn.Module, str]) -> dict[str, int]:
    """Drop what other ranks will solve; return the rank that solves each linear.

    The costliest go first, each to the rank that has least to do.

    Args:
        calibration: the same on every rank; modified in place.
        names: of the linears.
    """
    load = [0] * distributed.get_world_size()
    owners: dict[str, int] = {}
    by_cost = sorted(
        calibration.observations.items(), key=lambda item: (-_cost(item[1]), names[item[0]])
    )
    for leader, observation in by_cost:
        owner = load.index(min(load))
        load[owner] += _cost(observation)
        owners.update({names[linear]: owner for linear in observation.linears})
        if owner != distributed.get_rank():
            del calibration.observations[leader]
    return owners


def exchange(
    owners: Mapping[str, int], modules: Mapping[str, nn.Module], records: list[LinearRecord]
) -> list[LinearRecord]:
    """Give every rank the weights and records of all.

    Args:
        owners: which rank has solved each linear.
        modules: the linears by name.
        records: of what this rank has solved.

    Returns:
        The records of all ranks, in the order of their names.
    """
    for name, owner in sorted(owners.items()):
        for parameter, tensor in modules[name].named_parameters(recurse=False):
            if parameter == "bias":
                continue
            # a copy, because ranks may share the memory of the weight itself
            received = tensor.detach().clone()
            distributed.broadcast(received, src=owner)
            update_offload_parameter(modules[name], parameter, received)
    everyone = [record for part in gather(records) for record in part]
    return sorted(everyone, key=lambda record: record.name)


def _cost(observation: Observation) -> int:
    columns = len(observation.moments.hessian)
    rows = sum(len(linear.weight) for linear in observation.linears)
    return columns * columns * (columns + rows)


def _union(ours: dict[str, _Seen]) -> dict[str, _Seen]:
    return {leader: seen for part in gather(ours) for leader, seen in part.items()}
