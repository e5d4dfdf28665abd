"""Make ``save_pretrained`` write expert names that load, and the run record beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from compressed_tensors.distributed import is_source_process
from llmcompressor.modeling.moe.conversion_mappings import set_save_conversion_mapping
from loguru import logger
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from moeq_plugin.core.small_linears import Kind
from moeq_plugin.files.publish import joined
from moeq_plugin.integrations.llm_compressor.checkpoint.expert_names import (
    linearized_rules,
    loading_rules,
)
from moeq_plugin.integrations.llm_compressor.checkpoint.ignored_names import mend_ignored
from moeq_plugin.integrations.llm_compressor.checkpoint.prediction import copy_predictions
from moeq_plugin.integrations.llm_compressor.checkpoint.reader_limits import (
    UNCOMPRESSED,
    fusion_limits,
    reload_limits,
    serving_limits,
    storage_limits,
)
from moeq_plugin.integrations.llm_compressor.checkpoint.recipe_file import introduce_recipe
from moeq_plugin.integrations.llm_compressor.host import (
    exact_codes,
    parameters_stay_parameters,
    replace_saving,
)
from moeq_plugin.integrations.llm_compressor.one_rank import entered_by_one
from moeq_plugin.integrations.llm_compressor.unfinished import is_unfinished
from moeq_plugin.models.auto_class import loader_of
from moeq_plugin.models.expert_rules import names_by_config, names_in_checkpoint
from moeq_plugin.models.moe import MoELayer, find_moe_layers
from moeq_plugin.records.progress import Progress, report_progress
from moeq_plugin.records.run import RunRecord, save_records
from moeq_plugin.report.model_card import save_model_card

_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_UPLOAD = (
    "Save to a directory, then upload it: huggingface_hub.upload_folder(repo_id=..., "
    "folder_path=...)"
)
_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def prepare_saving(
    model: PreTrainedModel,
    layers: list[MoELayer],
    record: RunRecord,
    save_more: Callable[[Path], None] = lambda _directory: None,
) -> None:
    """Fix the names of experts and write ``record`` whenever the model is saved, in place.

    The host saves ``experts.0.gate_proj``, which Mixtral-like architectures do not find again:
    they load ``w1``. Saving reverses the model's loading rules, so those are what is mended.

    Args:
        model: the linearized model, schemes attached.
        layers: its MoE layers.
        record: the run's record; its ``limits`` are filled in here and logged.
        save_more: writes further files into the directory of the checkpoint.
    """
    # long before the model is saved: whoever saves it, by whatever call, then does it right
    rules = loading_rules(model)
    names = names_in_checkpoint(rules)
    if any(ours != theirs for ours, theirs in names.items()):
        set_save_conversion_mapping(model, linearized_rules(rules))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    of_experts = {module for layer in layers for module in layer.experts.modules()}
    others = {name: m for name, m in linears.items() if m not in of_experts}
    # what the host has loaded one by one it saves under the names that it has found
    names = names or names_by_config(model.config.to_dict())
    record.limits += reload_limits(layers, names, others.values(), loader_of(model))
    record.limits += serving_limits(layers) + fusion_limits(others)
    record.limits += storage_limits(linears.values())
    for limit in record.limits:
        logger.warning(limit)
    _write_on_save(model, record, save_more)


def _write_on_save(
    model: PreTrainedModel, record: RunRecord, save_more: Callable[[Path], None]
) -> None:
    """Wrap ``save_pretrained`` once per model; later modifiers add to what it writes."""
    # the list hangs on the function, so that it lives as long as the model is saved by it
    noted = getattr(model.save_pretrained, "_moeq_noted", None)
    if noted is not None:
        noted.append((record, save_more))
        return
    noted = [(record, save_more)]
    save_pretrained = model.save_pretrained

    @wraps(save_pretrained)
    def save(save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        _check_saving(model, kwargs)
        # a run that failed before it changed anything has left a record of nothing
        finished = [(record, save_more) for record, save_more in noted if record.run]
        wanted = Path(save_directory)
        with (
            entered_by_one(joined(wanted)) as directory,
            parameters_stay_parameters(),
            exact_codes(),
        ):
            count = sum(len(record.linears) for record, _ in finished)
            # linears are weights, so that one word holds for all
            unit = "weights" if any(r.unit == "weights" for r, _ in finished) else "linears"
            report_progress(Progress("save", 0, count, unit))
            # the host's, which packs the codes and calls the method of transformers in turn
            try:
                save_pretrained(directory, *args, **kwargs)
            except SafetensorError as error:  # a full disk, which is no OSError there
                raise OSError(f"{wanted} cannot be written: {error}") from error
            # all ranks save their share, one writes what describes it
            if not is_source_process():
                return
            _copy_processors(Path(model.name_or_path or ""), directory)
            if not finished:
                return
            _mend_config(model, directory)
            mend_ignored(model, directory)
            introduce_recipe(directory)
            records = [record for record, _ in finished]
            for prefix in copy_predictions(model, directory):
                records[0].kept[prefix.rstrip(".")] = Kind.PREDICTION.value
            save_records(records, directory)
            for _, save_more in finished:
                save_more(directory)
            # last: it reads what the others wrote
            save_model_card(records, directory, published=wanted)

    push_to_hub = model.push_to_hub

    @wraps(push_to_hub)
    def push(*args: Any, **kwargs: Any) -> str:
        if any(record.run for record, _ in noted):
            raise ValueError(
                "push_to_hub replaces the model card that describes the quantization by one of its "
                f"own. {_UPLOAD}"
            )
        pushed: str = push_to_hub(*args, **kwargs)
        return pushed

    save._moeq_noted = noted  # type: ignore[attr-defined]
    replace_saving(model, save, push)


def _check_saving(model: PreTrainedModel, asked: Mapping[str, Any]) -> None:
    """Refuse to write what is not complete, or would not be when it is uploaded.

    Args:
        model: the model.
        asked: arguments of ``save_pretrained``.

    Raises:
        ValueError: saying what to do instead; nothing has been written then.
    """
    changed = sum(is_unfinished(module) for module in model.modules())
    if changed:
        raise ValueError(
            f"{changed} modules of this model were changed by a run that did not finish: it is "
            "neither the model nor a quantized one. Load the model again."
        )
    if asked.get("push_to_hub"):
        raise ValueError(
            "push_to_hub=True uploads before quantization_config, moeq_run.json and the model card "
            f"are written. {_UPLOAD}"
        )
    if not asked.get("save_compressed", True) and find_moe_layers(model):
        raise ValueError(UNCOMPRESSED)


def _copy_processors(source: Path, directory: Path) -> None:
    """Copy what says how images and sound become inputs, which belongs to no tokenizer."""
    for name in _PROCESSORS:
        if (source / name).is_file() and not (directory / name).exists():
            shutil.copyfile(source / name, directory / name)


def _mend_config(model: PreTrainedModel, directory: Path) -> None:
    """Write the number of experts that a checkpoint has, where pruning has changed it.

    The host (0.14) writes the source's ``config.json`` and carries changes over for the keys that
    it knows; DeepSeek's ``n_routed_experts`` is not among them.
    """
    path = directory / "config.json"
    written = json.loads(path.read_text())
    text = written.get("text_config", written)
    current = model.config.get_text_config().to_dict()
    counts = {key: current[key] for key in _EXPERT_COUNTS if key in text and key in current}
    if any(text[key] != count for key, count in counts.items()):
        text.update(counts)
        path.write_text(json.dumps(written, indent=2, sort_keys=True))
