"""Where a running ``oneshot`` reads and writes, checked before anything is calibrated."""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.utils import patch_attr
from loguru import logger
from torch import nn

from moeq_plugin.files.new_directory import check_new_directory
from moeq_plugin.files.places import check_places
from moeq_plugin.files.publish import staged
from moeq_plugin.files.room import check_room
from moeq_plugin.files.stage import is_stage, published_as
from moeq_plugin.integrations.llm_compressor.host import enter_for_oneshot, running_oneshot
from moeq_plugin.integrations.llm_compressor.one_rank import entered_by_one
from moeq_plugin.integrations.llm_compressor.schemes import weight_args, weight_of


def stage_running_output() -> None:
    """Check the output directory of the running ``oneshot`` and keep it for this run.

    The host tells it to no modifier; an error after hours of calibration would be worse than
    looking it up. All that ``oneshot`` saves appears there by one rename when it ends, tokenizer
    and all; ranks write to one directory together.
    """
    running = running_oneshot()
    if running is None:
        logger.warning(
            "no running llmcompressor.oneshot is known, so its output directory is not checked "
            "before calibration"
        )
    elif running.output_dir:
        output_dir = Path(running.output_dir)
        if is_stage(output_dir):
            check_new_directory(output_dir)
        else:
            stage = enter_for_oneshot(entered_by_one(staged(output_dir)))
            # left before the stage: upstream would have to publish a complete directory itself
            enter_for_oneshot(patch_attr(running, "output_dir", str(stage)))


def check_apart(model: nn.Module, work_dir: str | None, **reads: str | None) -> None:
    """Refuse a work directory that meets the output, the model or a file that is read.

    Args:
        model: the model.
        work_dir: of the recipe, if it has one.
        **reads: files by the field of the recipe that names them.

    Raises:
        ValueError: naming both.
    """
    if work_dir is None:
        return
    running = running_oneshot()
    output_dir = running.output_dir if running is not None else None
    source = Path(getattr(model, "name_or_path", ""))
    check_places(
        reads={
            "model": source if source.is_dir() else None,
            **{name: Path(path) for name, path in reads.items() if path is not None},
        },
        makes={
            "work_dir": Path(work_dir),
            "output_dir": published_as(Path(output_dir)) if output_dir else None,
        },
    )


def check_running_room(model: nn.Module, work_dir: Path | None) -> None:
    """Refuse a run whose checkpoint or state will not fit on the disk.

    Counted is what is certain: a linear without a scheme may get one of a later modifier, and
    scales depend on the format.

    Args:
        model: the model, schemes attached.
        work_dir: where finished layers are kept, if anywhere.
    """
    running = running_oneshot()
    args = {module: of for module in model.modules() if (of := weight_args(module)) is not None}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) or m in args]
    needs: dict[Path, int] = {}
    if running is not None and running.output_dir:
        uncertain = {id(parameter) for m in linears for parameter in m.parameters()}
        certain = (p for p in model.parameters() if id(p) not in uncertain)
        num_bits = sum(weight_of(module).numel() * of.num_bits for module, of in args.items())
        needs[Path(running.output_dir)] = num_bits // 8 + sum(map(_num_bytes, certain))
    if work_dir is not None:
        there = sum(path.stat().st_size for path in work_dir.glob("layer-*.safetensors"))
        needs[work_dir] = max(sum(_num_bytes(weight_of(module)) for module in args) - there, 0)
    check_room(needs)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
