"""Whether a model can be rounded against its 16-bit stream at all."""

from __future__ import annotations

from collections.abc import Container

from llmcompressor.modifiers import Modifier
from loguru import logger
from torch import nn

from moeq_plugin.integrations.llm_compressor.schemes import scheme_of
from moeq_plugin.integrations.llm_compressor.two_streams.streams import (
    NewCalibration,
    TwoStreams,
)
from moeq_plugin.models.decoders import all_decoder_layers
from moeq_plugin.models.moe import MoELayer, UnsupportedModelError
from moeq_plugin.records.run import RunRecord


def begin_streams(
    model: nn.Module,
    moe_layers: list[MoELayer],
    targeted: Container[nn.Module],
    new_calibration: NewCalibration,
    modifier: Modifier,
    record: RunRecord,
) -> TwoStreams | None:
    """Return what carries the 16-bit stream, hooks registered; ``None`` where there is none.

    What modifiers before this one have rotated or scaled is no obstacle: the stream is that of the
    model as it is now. Weights that are rounded already are one, since they are not 16-bit.

    Args:
        model: the model, before any batch.
        moe_layers: its MoE layers.
        targeted: what is to be rounded.
        new_calibration: makes what observes a stage.
        modifier: the host's.
        record: gets the reason, in ``uncorrected``.
    """
    try:
        layers = all_decoder_layers(model)
        _check_16_bit(model, targeted)
    except UnsupportedModelError as error:
        logger.warning(f"no corrected target: {error}")
        record.uncorrected["model"] = str(error)
        return None
    streams = TwoStreams(model, layers, moe_layers, new_calibration, modifier, record.uncorrected)
    streams.attach()
    return streams


def _check_16_bit(model: nn.Module, targeted: Container[nn.Module]) -> None:
    """Refuse a model of which others have quantized a part.

    Raises:
        UnsupportedModelError: naming the first of them.
    """
    for name, module in model.named_modules():
        if scheme_of(module) is not None and module not in targeted:
            raise UnsupportedModelError(
                f"{name} was quantized before, so that there is no 16-bit stream to round against"
            )
