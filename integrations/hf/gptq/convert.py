"""Convert checkpoints between compressed-tensors and the GPTQ format without changing a number.

Codes, scales and zero points move from one layout to the other; nothing is rounded again. What the
other format cannot say is refused before anything is written, and the new directory appears under
its name once it is complete. One file's tensors are in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moeq_plugin.checkpoint.checks.gptq_config import differences
from moeq_plugin.checkpoint.codebooks import METHOD as CODEBOOKS
from moeq_plugin.checkpoint.weight_files import INDEX
from moeq_plugin.core.gptq_format import ZeroPoints, groups_are_runs
from moeq_plugin.core.grid import Grid
from moeq_plugin.files.new_directory import check_new_directory
from moeq_plugin.files.places import check_places
from moeq_plugin.files.publish import staged
from moeq_plugin.integrations.hf.gptq import config as gptq_config
from moeq_plugin.integrations.hf.gptq import tensors as stored_linears
from moeq_plugin.integrations.hf.gptq.companions import companions
from moeq_plugin.integrations.hf.gptq.config import GPTQFormat
from moeq_plugin.integrations.hf.gptq.files import (
    ShardWriter,
    WeightFiles,
    write_json,
)
from moeq_plugin.integrations.hf.gptq.names import Names, rename_modules, renamer
from moeq_plugin.untrusted.reading import read_json

FORMATS = ("gptq", "compressed-tensors")
QUANTIZE_CONFIG = "quantize_config.json"
# what is written anew, and the model card, which describes the other format
OWN_FILES = frozenset({"config.json", QUANTIZE_CONFIG, INDEX, "README.md"})

Rename = Callable[[str], str]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Plan:
    """How to convert a checkpoint that has been checked.

    Attributes:
        main: last part of the name of the tensor that stands for a linear in the source.
        parts: of all its tensors.
        section: ``quantization_config`` of the result.
        convert_linear: returns a linear's new tensors by name.
        rename: applied to the names of all other tensors.
    """

    main: str
    parts: tuple[str, ...]
    section: dict[str, Any]
    convert_linear: Callable[[str], Tensors]
    rename: Rename


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    zero_points: ZeroPoints | None = None,
    names: Names = Names.CHECKPOINT,
) -> int:
    """Write ``source`` in another format to the new directory ``out``.

    Args:
        source: a checkpoint in compressed-tensors' packed format or in GPTQ format.
        out: does not exist yet, or is empty.
        to: "gptq" or "compressed-tensors".
        zero_points: how to store zero points in GPTQ format. ``None`` means version 1 for
            symmetric weights, which every reader knows, and version 2 for asymmetric ones, since
            GPTQModel reads those in no other way.
        names: of tensors in GPTQ format; GPTQModel wants those of modules where they differ.

    Returns:
        The number of converted linears.

    Raises:
        ValueError: if it cannot be done without loss; nothing is written then.
    """
    source, out = Path(source), Path(out)
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; expected one of {list(FORMATS)}")
    check_places(reads={"source": source}, makes={"out": out})
    check_new_directory(out)
    config = read_json(source / "config.json")
    copied, _ = companions(source, without=OWN_FILES)
    section = _section(source, config, to)
    files = WeightFiles(source)
    if to == "gptq":
        plan = _plan_gptq(section, files, zero_points, renamer(config["model_type"], names))
    else:
        plan = _plan_packed(section, files, renamer(config["model_type"], Names.CHECKPOINT))
    with staged(out) as unfinished:
        _write_weights(files, plan, ShardWriter(unfinished))
        if to == "gptq":
            write_json(unfinished / QUANTIZE_CONFIG, plan.section)
        write_json(unfinished / "config.json", config | {"quantization_config": plan.section})
        for path in copied:
            shutil.copyfile(path, unfinished / path.name)  # with modes of its own
    return len(stored_linears.linears_in(files, plan.main))


def _plan_gptq(
    section: dict[str, Any], files: WeightFiles, zero_points: ZeroPoints | None, rename: Rename
) -> _Plan:
    grid = gptq_config.read_compressed_tensors(section)
    stored_linears.check_packed(files, grid)
    form = GPTQFormat(grid, zero_points or (ZeroPoints.V1 if grid.symmetric else ZeroPoints.V2))
    if form.zeros is ZeroPoints.V1 and not grid.symmetric:
        _check_zero_points_fit_v1(files, grid)
    in_blocks = [name for name in _plain_matrices(files) if any(map(str.isdigit, name.split(".")))]

    def convert_linear(name: str) -> Tensors:
        weight = stored_linears.read_packed_linear(files, name, grid)
        return stored_linears.write_gptq_linear(_renamed(name, rename), weight, form)

    made_by = f"moeq-plugin:{version('moeq-plugin')}"
    return _Plan(
        main="weight_packed",
        parts=stored_linears.PACKED_NAMES,
        section=gptq_config.write_gptq(form, rename_modules(in_blocks, rename), made_by),
        convert_linear=convert_linear,
        rename=rename,
    )


def _plan_packed(section: dict[str, Any], files: WeightFiles, rename: Rename) -> _Plan:
    form = gptq_config.read_gptq(section)
    stored_linears.check_gptq(files, form)
    _check_groups_and_zero_points(files, form)

    def convert_linear(name: str) -> Tensors:
        weight = stored_linears.read_gptq_linear(files, name, form)
        return stored_linears.write_packed_linear(_renamed(name, rename), weight, form.grid)

    ignore = rename_modules(_plain_matrices(files), rename)
    return _Plan(
        main="qweight",
        parts=stored_linears.GPTQ_NAMES,
        section=gptq_config.write_compressed_tensors(form.grid, ignore),
        convert_linear=convert_linear,
        rename=rename,
    )


def _section(source: Path, config: dict[str, Any], to: str) -> dict[str, Any]:
    """Return what the checkpoint says of its quantization.

    Raises:
        ValueError: if it says nothing, or nothing that can be converted.
    """
    section: dict[str, Any] | None = config.get("quantization_config")
    other = read_json(source / QUANTIZE_CONFIG) if (source / QUANTIZE_CONFIG).is_file() else None
    if section is None:
        section = other
    elif other is not None and section.get("quant_method") == "gptq":
        for key, what in differences(section, other):
            raise ValueError(f"{QUANTIZE_CONFIG} says another {key}: {what}; which is right?")
    if section is None:
        raise ValueError(f"{source} is not quantized: its config.json has no quantization_config")
    method = section.get("quant_method", "gptq")
    if method == CODEBOOKS:
        raise ValueError(
            f"{source} has weights in codebooks, which neither format can hold: they are not steps "
            "of an even grid. Quantize the 16-bit model to a scheme such as W4A16_G64 instead"
        )
    if method not in FORMATS:
        raise ValueError(f"{source} has quant_method {method!r}; can convert {list(FORMATS)}")
    if method == to:
        raise ValueError(f"{source} is in the format {to!r} already")
    return section


def _write_weights(files: WeightFiles, plan: _Plan, writer: ShardWriter) -> None:
    """Write all files: linears converted, each where its main part was, the rest as it is."""
    linears = stored_linears.linears_in(files, plan.main)
    of_linears = {f"{name}.{part}" for name in linears for part in plan.parts}
    for path in files.files:
        tensors: Tensors = {}
        for name in files.names_in(path):
            if name.endswith(f".{plan.main}"):
                tensors |= plan.convert_linear(name.removesuffix(f".{plan.main}"))
            elif name not in of_linears:
                tensors[plan.rename(name)] = files.tensor(name)
        if tensors:
            writer.write(path.name, tensors)
    writer.finish()


def _renamed(linear: str, rename: Rename) -> str:
    return rename_modules([linear], rename)[0]


def _plain_matrices(files: WeightFiles) -> list[str]:
    """Return the modules with a plain matrix: routers, embeddings, linears left in 16 bit."""
    suffix = ".weight"
    return [
        name.removesuffix(suffix)
        for name in files
        if name.endswith(suffix) and len(files.shape(name) or ()) == 2
    ]


def _check_zero_points_fit_v1(files: WeightFiles, grid: Grid) -> None:
    """Refuse zero points of 0, which version 1 stores as -1: readers disagree what that means.

    Raises:
        ValueError: listing the linears.
    """
    wrapped = []
    for name in stored_linears.linears_in(files, "weight_packed"):
        if bool((stored_linears.packed_zero_points(files, name, grid) == grid.lowest).any()):
            wrapped.append(name)
    if wrapped:
        raise ValueError(
            f"{len(wrapped)} linears have a zero point of 0, which version 1 of the GPTQ format "
            f"stores as -1 and readers take for other numbers: {', '.join(wrapped[:10])}. "
            "Use version 2 (gptq_v2)."
        )


def _check_groups_and_zero_points(files: WeightFiles, form: GPTQFormat) -> None:
    """Refuse groups that are no runs of columns, and zero points that symmetric weights lack.

    Raises:
        ValueError: listing the linears.
    """
    shuffled, shifted = [], []
    for name in stored_linears.linears_in(files, "qweight"):
        groups = stored_linears.gptq_groups(files, name, form)
        if not groups_are_runs(groups, form.grid.group_size):
            shuffled.append(name)
        zero_point = stored_linears.gptq_zero_points(files, name, form)
        if form.grid.symmetric and bool((zero_point != 0).any()):
            shifted.append(name)
    if shuffled:
        raise ValueError(
            f"{len(shuffled)} linears have act order (g_idx is not in order), which "
            f"compressed-tensors cannot express: {', '.join(shuffled[:10])}. Quantize again with "
            "desc_act=False or static groups."
        )
    if shifted:
        raise ValueError(
            f"the configuration says sym, but {len(shifted)} linears have other zero points than "
            f"the middle of the range: {', '.join(shifted[:10])}"
        )
