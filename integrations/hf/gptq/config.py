"""What a quantized checkpoint says about its weights, in both formats: one :class:`Grid` for all.

compressed-tensors describes groups of modules, the GPTQ format the whole model. Everything that
one of them can say and the other cannot is refused here, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import compressed_tensors
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)

from moeq_plugin.core.gptq_format import WIDTHS, ZeroPoints
from moeq_plugin.core.grid import Grid

PACKED = "pack-quantized"
_STRATEGIES = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)


@dataclass(frozen=True)
class GPTQFormat:
    """What a GPTQ-format checkpoint says of its weights.

    Attributes:
        grid: of every quantized weight.
        zeros: how zero points are stored.
        act_order: whether ``g_idx`` may be out of order (``desc_act``).
    """

    grid: Grid
    zeros: ZeroPoints
    act_order: bool = False


def read_gptq(section: Mapping[str, Any]) -> GPTQFormat:
    """Return what the ``quantization_config`` of a GPTQ-format checkpoint says.

    Args:
        section: that, or the content of ``quantize_config.json``.

    Raises:
        ValueError: if it is another method, says something else than one grid for all weights, or
            lacks a field.
    """
    method = section.get("quant_method", "gptq")
    if method != "gptq":
        raise ValueError(f"expected quant_method 'gptq', got {method!r}")
    missing = [key for key in ("bits", "group_size", "sym") if key not in section]
    if missing:
        raise ValueError(f"the GPTQ configuration lacks {missing}; got {sorted(section)}")
    mixed = sorted(name for name in section.get("dynamic") or {} if not name.startswith("-:"))
    if mixed:
        raise ValueError(
            f"`dynamic` gives some modules a scheme of their own: {mixed}. Only one scheme for all "
            "quantized weights can be converted."
        )
    named = section.get("checkpoint_format") or section.get("format") or ZeroPoints.V1.value
    if named not in list(ZeroPoints):
        raise ValueError(
            f"checkpoint_format {named!r} is not a portable GPTQ format; expected "
            f"{[zeros.value for zeros in ZeroPoints]}"
        )
    _check_width(section["bits"])
    size = section["group_size"]
    grid = Grid(section["bits"], None if size == -1 else size, section["sym"])
    return GPTQFormat(grid, ZeroPoints(named), bool(section.get("desc_act", False)))


def write_gptq(form: GPTQFormat, unquantized: list[str], made_by: str) -> dict[str, Any]:
    """Return the content of ``quantize_config.json``, which is ``quantization_config`` as well.

    Args:
        form: what to say.
        unquantized: modules that a reader may take for quantized ones, but are not; GPTQModel and
            vLLM are told by rules of ``dynamic``.
        made_by: name and version of the program.
    """
    section = {
        "bits": form.grid.num_bits,
        "group_size": form.grid.group_size or -1,
        "sym": form.grid.symmetric,
        "desc_act": form.act_order,
        "damp_percent": 0.01,  # some readers want it; the weights do not depend on it any more
        "true_sequential": True,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": form.zeros.value,
        "meta": {"quantizer": [made_by]},
    }
    if unquantized:
        escaped = (name.replace(".", r"\.") for name in unquantized)
        section["dynamic"] = {f"-:^{name}$": {} for name in escaped}
    return section


def read_compressed_tensors(section: Mapping[str, Any]) -> Grid:
    """Return the grid of all quantized weights of a compressed-tensors checkpoint.

    Args:
        section: its ``quantization_config``.

    Raises:
        ValueError: if the GPTQ format cannot express it; the message says why.
    """
    method = section.get("quant_method")
    if method != "compressed-tensors":
        raise ValueError(f"expected quant_method 'compressed-tensors', got {method!r}")
    config = QuantizationConfig.model_validate(dict(section))
    grids: dict[Grid, str] = {}
    for name, group in config.config_groups.items():
        assert isinstance(group, QuantizationScheme)  # validation has resolved preset names
        grids.setdefault(_grid_of_group(name, group, config.format), name)
    if config.kv_cache_scheme is not None:
        raise ValueError("the GPTQ format cannot express a quantized KV cache (kv_cache_scheme)")
    if (section.get("transform_config") or {}).get("config_groups"):
        raise ValueError("the GPTQ format cannot express transforms (transform_config)")
    if len(grids) != 1:
        described = "; ".join(f"{name}: {grid}" for grid, name in grids.items())
        raise ValueError(
            f"the GPTQ format has one scheme for all weights, the checkpoint has {len(grids)} "
            f"({described}). Keep it as compressed-tensors, or quantize with one scheme."
        )
    return next(iter(grids))


def write_compressed_tensors(grid: Grid, ignore: list[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint whose linears all have ``grid``.

    Args:
        grid: of every quantized weight.
        ignore: modules with plain weights.
    """
    strategy = QuantizationStrategy.CHANNEL if grid.group_size is None else "group"
    weights = QuantizationArgs(
        num_bits=grid.num_bits,
        type=QuantizationType.INT,
        symmetric=grid.symmetric,
        strategy=strategy,
        group_size=grid.group_size,
    )
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        format=PACKED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    section: dict[str, Any] = config.model_dump(mode="json")
    section["config_groups"]["group_0"]["format"] = PACKED
    return section | {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
    }


def _grid_of_group(name: str, group: QuantizationScheme, overall: str) -> Grid:
    weights, form = group.weights, group.format or overall
    if weights is None or form != PACKED:
        raise ValueError(f"{name}: expected packed integer weights ({PACKED}), got format {form!r}")
    if group.input_activations is not None or group.output_activations is not None:
        raise ValueError(f"{name}: the GPTQ format quantizes weights, not activations")
    if weights.type != QuantizationType.INT or weights.strategy not in _STRATEGIES:
        raise ValueError(
            f"{name}: the GPTQ format has integer weights with a scale per group or per output, "
            f"got {weights.type} with strategy {weights.strategy}"
        )
    _check_width(weights.num_bits)
    return Grid(weights.num_bits, weights.group_size, weights.symmetric)


def _check_width(num_bits: int) -> None:
    if num_bits not in WIDTHS:
        raise ValueError(f"the GPTQ format has weights of {WIDTHS} bits, the checkpoint {num_bits}")
