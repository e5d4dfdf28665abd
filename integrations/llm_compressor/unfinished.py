"""Which modules a run has changed before it ended without having finished.

A model stays in memory after Ctrl-C, a full disk or an error. Part of its weights are rounded
then, and nothing in them says so: the same call on the same model would round them again.
"""

from __future__ import annotations

from collections.abc import Iterable

from compressed_tensors.quantization import QuantizationStatus
from torch import nn

_MARK = "_moeq_unfinished"


def mark_changed(module: nn.Module) -> None:
    """Note that a run is about to change a module's weights."""
    setattr(module, _MARK, True)


def mark_finished(modules: Iterable[nn.Module]) -> None:
    """Note that the run that has changed some of these modules has finished."""
    for module in modules:
        if hasattr(module, _MARK):
            delattr(module, _MARK)


def is_unfinished(module: nn.Module) -> bool:
    """Tell whether a run has changed a module, or may have, and did not finish.

    Modifiers of others leave no mark. What they calibrate when they stop has a status that says
    so, and may have been changed or not.
    """
    status = getattr(module, "quantization_status", None)
    return hasattr(module, _MARK) or status == QuantizationStatus.CALIBRATION
