"""The quantized linears in a checkpoint's files: found, checked against its config, read, written.

Both formats keep several tensors per linear, told apart by the last part of their names. Shapes
are checked from the files' headers, for all linears, before anything is converted.
"""

from __future__ import annotations

import math

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from moeq_plugin.core.gptq_format import (
    Codes,
    GPTQTensors,
    decode,
    decode_zero_points,
    encode,
)
from moeq_plugin.core.grid import Grid
from moeq_plugin.integrations.hf.gptq.config import GPTQFormat
from moeq_plugin.integrations.hf.gptq.files import WeightFiles

GPTQ_NAMES = ("qweight", "qzeros", "scales", "g_idx")
PACKED_NAMES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
_SHOWN = 20  # offenders in an error message


def linears_in(files: WeightFiles, main: str) -> list[str]:
    """Return the names of the linears that have a tensor ``main``, such as ``qweight``."""
    suffix = f".{main}"
    return [name.removesuffix(suffix) for name in files if name.endswith(suffix)]


def check_gptq(files: WeightFiles, form: GPTQFormat) -> None:
    """Refuse tensors that do not have the shapes the configuration gives them.

    Raises:
        ValueError: listing every offender.
    """
    bits = form.grid.num_bits
    problems = _leftovers(files, "qweight", GPTQ_NAMES)
    for name in linears_in(files, "qweight"):
        words, rows = files.shape(f"{name}.qweight") or (0, 0)
        columns = words * 32 // bits
        groups = _groups(columns, form.grid)
        expected: dict[str, tuple[int, ...]] = {
            "qzeros": (groups, rows * bits // 32),
            "scales": (groups, rows),
        }
        if f"{name}.g_idx" in files:  # old checkpoints without act order have none
            expected["g_idx"] = (columns,)
        problems += _misshapen(files, name, expected)
    _raise_if(problems, f"{bits} bits, group size {form.grid.group_size or -1}")


def check_packed(files: WeightFiles, grid: Grid) -> None:
    """Refuse tensors that do not have the shapes the configuration gives them.

    Raises:
        ValueError: listing every offender.
    """
    bits = grid.num_bits
    problems = _leftovers(files, "weight_packed", PACKED_NAMES)
    for name in linears_in(files, "weight_packed"):
        if f"{name}.weight_shape" not in files:
            problems.append(f"{name}.weight_shape is missing")
            continue
        rows, columns = files.tensor(f"{name}.weight_shape").tolist()
        groups = _groups(columns, grid)
        expected: dict[str, tuple[int, ...]] = {
            "weight_packed": (rows, math.ceil(columns * bits / 32)),
            "weight_scale": (rows, groups),
        }
        if not grid.symmetric:
            expected["weight_zero_point"] = (math.ceil(rows * bits / 32), groups)
        problems += _misshapen(files, name, expected)
    _raise_if(problems, str(grid))


def read_gptq_linear(files: WeightFiles, name: str, form: GPTQFormat) -> Codes:
    """Return one linear of a GPTQ-format checkpoint.

    Args:
        files: where it is.
        name: of the linear.
        form: what the configuration says.
    """
    stored = {part: files.tensor(f"{name}.{part}") for part in GPTQ_NAMES[:3]}
    stored["g_idx"] = gptq_groups(files, name, form)
    return decode(GPTQTensors(**stored), form.grid.num_bits, form.zeros)


def gptq_groups(files: WeightFiles, name: str, form: GPTQFormat) -> torch.Tensor:
    """Return ``[in]``, the group of each input column; old checkpoints do not store it."""
    if f"{name}.g_idx" in files:
        return files.tensor(f"{name}.g_idx")
    words, _ = files.shape(f"{name}.qweight") or (0, 0)
    return form.grid.group_of_column(words * 32 // form.grid.num_bits)


def gptq_zero_points(files: WeightFiles, name: str, form: GPTQFormat) -> torch.Tensor:
    """Return ``[out, groups]`` signed zero points of a linear, reading nothing else of it."""
    qzeros = files.tensor(f"{name}.qzeros")
    return decode_zero_points(qzeros, form.grid.num_bits, form.zeros)


def packed_zero_points(files: WeightFiles, name: str, grid: Grid) -> torch.Tensor:
    """Return ``[out, groups]`` signed zero points of a linear, reading nothing else of it."""
    shape = torch.Size(files.shape(f"{name}.weight_scale") or ())
    if grid.symmetric:
        return torch.zeros(shape, dtype=torch.int8)
    packed = files.tensor(f"{name}.weight_zero_point")
    unpacked: torch.Tensor = unpack_from_int32(packed, grid.num_bits, shape, packed_dim=0)
    return unpacked


def write_gptq_linear(name: str, weight: Codes, form: GPTQFormat) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear in GPTQ format.

    Args:
        name: of the linear.
        weight: its codes and grid.
        form: how to store them.

    Raises:
        ValueError: if a dimension does not fill whole words.
    """
    try:
        stored = encode(weight, form.grid.num_bits, form.zeros)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return {f"{name}.{part}": tensor for part, tensor in vars(stored).items()}


def read_packed_linear(files: WeightFiles, name: str, grid: Grid) -> Codes:
    """Return one linear of a compressed-tensors checkpoint.

    Args:
        files: where it is.
        name: of the linear.
        grid: what the configuration says.
    """
    shape = torch.Size(files.tensor(f"{name}.weight_shape").tolist())
    return Codes(
        codes=unpack_from_int32(files.tensor(f"{name}.weight_packed"), grid.num_bits, shape),
        scale=files.tensor(f"{name}.weight_scale"),
        zero_point=packed_zero_points(files, name, grid),
        group=grid.group_of_column(shape[1]),
    )


def write_packed_linear(name: str, weight: Codes, grid: Grid) -> dict[str, torch.Tensor]:
    """Return the tensors of one linear as compressed-tensors stores them.

    Args:
        name: of the linear.
        weight: its codes; groups are runs of columns.
        grid: its description.
    """
    stored = {
        "weight_packed": pack_to_int32(weight.codes, grid.num_bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not grid.symmetric:
        packed = pack_to_int32(weight.zero_point, grid.num_bits, packed_dim=0)
        stored["weight_zero_point"] = packed
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()}


def _groups(columns: int, grid: Grid) -> int:
    return 1 if grid.group_size is None else math.ceil(columns / grid.group_size)


def _leftovers(files: WeightFiles, main: str, names: tuple[str, ...]) -> list[str]:
    """Return parts of quantized linears whose main part is missing, and parts we do not know."""
    known = {f"{linear}.{part}" for linear in linears_in(files, main) for part in names}
    parts = {*GPTQ_NAMES, *PACKED_NAMES, "weight_g_idx", "weight_global_scale"}
    return [
        f"{name} belongs to no linear with a {main}"
        for name in files
        if name.rpartition(".")[2] in parts and name not in known
    ]


def _misshapen(files: WeightFiles, name: str, expected: dict[str, tuple[int, ...]]) -> list[str]:
    problems = []
    for part, shape in expected.items():
        found = files.shape(f"{name}.{part}")
        if found is None:
            problems.append(f"{name}.{part} is missing")
        elif found != shape:
            problems.append(f"{name}.{part} is {list(found)}, expected {list(shape)}")
    return problems


def _raise_if(problems: list[str], said: str) -> None:
    if problems:
        more = f"\n  ... {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        lines = "\n".join(f"  - {problem}" for problem in sorted(problems)[:_SHOWN])
        raise ValueError(
            f"{len(problems)} tensors disagree with the configuration ({said}); the checkpoint is "
            f"damaged, or was written by a version with another layout:\n{lines}{more}"
        )
