"""Make ``save_pretrained`` write expert names that load, and the run record beside the weights."""

from __future__ import annotations

import re
from functools import wraps
from pathlib import Path
from typing import Any

from llmcompressor.modeling.moe.conversion_mappings import set_save_conversion_mapping
from loguru import logger
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

from moeq_plugin.integrations.llm_compressor.limits import reload_limits, serving_limits
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.report.record import RunRecord, save_records

# how a linearized expert calls what transformers fuses into one tensor
_FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_PER_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight\$?$")


def prepare_saving(model: PreTrainedModel, layers: list[MoELayer], record: RunRecord) -> None:
    """Fix the names of experts and write ``record`` whenever the model is saved, in place.

    Args:
        model: the linearized model, schemes attached.
        layers: its MoE layers.
        record: the run's record; its ``limits`` are filled in here and logged.
    """
    has_expert_names = _use_checkpoint_names(model)
    record.limits += reload_limits(layers, has_expert_names) + serving_limits(layers)
    for limit in record.limits:
        logger.warning(limit)
    _write_record_on_save(model, record)


def _use_checkpoint_names(model: PreTrainedModel) -> bool:
    """Let saving write each expert projection under the name that loading expects.

    transformers keeps the rule that fuses ``experts.*.w1.weight`` into ``gate_up_proj`` at load;
    the host linearizes the fused tensor but saves ``experts.0.gate_proj``, which Mixtral-like
    architectures then do not find. The names are read off that rule.

    Returns:
        Whether there is such a rule.
    """
    loaded = getattr(model, "_weight_conversions", None)
    conversions = get_model_conversion_mapping(model) if loaded is None else list(loaded)
    names = _names_in_checkpoint(conversions)
    renamed = {ours: theirs for ours, theirs in names.items() if ours != theirs}
    if renamed:
        renamings = [
            WeightRenaming(rf"\.experts\.(\d+)\.{theirs}\.", rf".experts.\1.{ours}.")
            for ours, theirs in renamed.items()
        ]
        kept = [c for c in conversions if not _names_in_checkpoint([c])]
        set_save_conversion_mapping(model, kept + renamings)
    return bool(names) or _is_loaded_linearized(conversions)


def _names_in_checkpoint(conversions: list[WeightTransform]) -> dict[str, str]:
    """Return for each projection of an expert what a checkpoint calls it."""
    names: dict[str, str] = {}
    for conversion in conversions:
        if not isinstance(conversion, WeightConverter):
            continue
        targets = [str(pattern) for pattern in conversion.target_patterns]
        sources = [_PER_EXPERT.search(str(source)) for source in conversion.source_patterns]
        fused = _FUSED.get(targets[0].rsplit(".", 1)[-1]) if len(targets) == 1 else None
        if fused and len(fused) == len(sources) and all(sources):
            names.update(zip(fused, (m.group(1) for m in sources if m), strict=True))
    return names


def _is_loaded_linearized(conversions: list[WeightTransform]) -> bool:
    """Tell whether the host loaded per-expert tensors as they are, which it then saves likewise."""
    return any(re.search(r"experts.*(\\d|\*)", str(c.source_patterns)) for c in conversions)


def _write_record_on_save(model: PreTrainedModel, record: RunRecord) -> None:
    """Wrap ``save_pretrained`` once per model; later modifiers add their records."""
    records: list[RunRecord] | None = getattr(model.save_pretrained, "_moeq_records", None)
    if records is not None:
        records.append(record)
        return
    records = [record]
    save_pretrained = model.save_pretrained

    @wraps(save_pretrained)
    def save(save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        save_pretrained(save_directory, *args, **kwargs)
        save_records(records, Path(save_directory))

    save._moeq_records = records  # type: ignore[attr-defined]
    model.save_pretrained = save
