"""Whether the result can be saved, and read where it is saved."""

from __future__ import annotations

from transformers import PreTrainedModel

from moeq_plugin.integrations.llm_compressor.checkpoint.reader_limits import UNCOMPRESSED
from moeq_plugin.integrations.llm_compressor.host import running_oneshot
from moeq_plugin.models.moe import MoELayer


def check_saving(model: PreTrainedModel, layers: list[MoELayer]) -> None:
    """Refuse what would fail, or could not be read, after hours of calibration.

    Args:
        model: the model that will be saved.
        layers: its MoE layers.

    Raises:
        ValueError: saying what to change.
    """
    running = running_oneshot()
    if layers and running is not None and not running.model_args.save_compressed:
        raise ValueError(UNCOMPRESSED)
    if not model.can_generate() or model.generation_config is None:
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            "the model's generation_config cannot be saved, so neither can the result. Set "
            "model.generation_config.do_sample = True, or take its sampling flags out of "
            f"generation_config.json, before quantizing: {reason}"
        ) from error
