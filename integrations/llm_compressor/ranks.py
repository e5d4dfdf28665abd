"""What several processes of ``torch.distributed`` have seen, added up on each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from moeq_plugin.integrations.llm_compressor.calibration import Calibration


def sum_over_ranks(calibration: Calibration) -> None:
    """Give every rank the second moments and samples of all; each then solves the same problems.

    Args:
        calibration: what this rank has observed; modified in place.
    """
    for observation in calibration.observations.values():
        moments = observation.moments
        for tensor in vars(moments).values():
            distributed.all_reduce(tensor)
    for sample in calibration.samples.values():
        parts: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, sample.rows)
        sample.rows = torch.cat([part.to(sample.rows.device) for part in parts])
