"""The record of a run of MoEQuantAWQModifier: what was asked for, what was smoothed, what not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from llmcompressor.core import State
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from loguru import logger
from torch import nn

from moeq_plugin.integrations.llm_compressor.awq.layer_inputs import LayerInputs
from moeq_plugin.integrations.llm_compressor.awq.mappings import judged_alone
from moeq_plugin.integrations.llm_compressor.awq.search import Choice
from moeq_plugin.integrations.llm_compressor.host import calibration_batches
from moeq_plugin.records.environment import versions
from moeq_plugin.records.run import Basis, RunRecord

_NO_TOKENS = "no token reached it"


@dataclass(frozen=True)
class Request:
    """What is asked for beside what the host's AWQ is asked for; see ``MoEQuantAWQModifier``."""

    affinity_power: float
    min_effective_tokens: float | None
    seed: int
    clip: bool


def new_record(recipe: AWQModifier, request: Request, state: State) -> RunRecord:
    """Return the record of a run that has done nothing yet.

    Args:
        recipe: whose run it is, for the fields of the host's AWQ.
        request: its other fields.
        state: the host's, with model and data.
    """
    return RunRecord(
        modifier=type(recipe).__name__,
        settings={
            **asdict(request),
            "duo_scaling": recipe.duo_scaling,
            "n_grid": recipe.n_grid,
            "mappings": [asdict(mapping) for mapping in recipe.mappings or ()] or None,
        },
        versions=versions(),
        model=getattr(state.model, "name_or_path", ""),
        calibration=f"{len(calibration_batches(state))} batches of data",
    )


def note_chosen(
    record: RunRecord,
    choices: Iterable[Choice],
    inputs: LayerInputs,
    is_weighted: Callable[[nn.Linear], bool],
) -> None:
    """Note the scales of a layer.

    Args:
        record: filled in.
        choices: what was chosen.
        inputs: of the layer.
        is_weighted: whether a router weights what a linear receives.
    """
    for choice in choices:
        linear = judged_alone(choice.mapping)
        moments = inputs.moments[linear] if linear is not None else None
        record.smoothed[choice.mapping.smooth_name] = {
            "judged by": choice.mapping.parent_name,
            "weighted": linear is not None and is_weighted(linear),
            "basis": moments.basis if moments is not None else Basis.OWN,
            "effective_tokens": moments.effective_tokens if moments is not None else None,
            "loss": choice.loss,
            "loss_unscaled": choice.loss_unscaled,
        }


def note_left_out(
    record: RunRecord, mappings: Iterable[ResolvedMapping], inputs: LayerInputs
) -> None:
    """Note why nothing was chosen for mappings of a layer; call after :func:`note_chosen`."""
    for mapping in mappings:
        if mapping.smooth_name not in record.smoothed:
            has_tokens = inputs.has_tokens(mapping)
            reason = "its output holds NaN or infinity" if has_tokens else _NO_TOKENS
            record.left_out[mapping.smooth_name] = reason


def note_uncalled(record: RunRecord, mappings: Iterable[ResolvedMapping]) -> None:
    """Note the mappings that no batch has called, once all layers are done."""
    for mapping in mappings:
        if mapping.smooth_name not in record.smoothed:
            record.left_out.setdefault(mapping.smooth_name, _NO_TOKENS)


def report(record: RunRecord) -> None:
    """Name the experts that borrowed, then say in one line what was smoothed."""
    own = {Basis.OWN, Basis.FEW}
    borrowed = [name for name, of in record.smoothed.items() if of["basis"] not in own]
    if borrowed:
        logger.warning(
            f"{len(borrowed)} modules saw fewer effective tokens than they have features; "
            f"their scales rest on their layer's tokens too: {', '.join(borrowed)}"
        )
    unseen = _NO_TOKENS in record.left_out.values()
    logger.log("WARNING" if unseen else "INFO", record.summary(len(record.smoothed)))
