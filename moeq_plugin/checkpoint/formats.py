"""Which tensors stand for a weight in each format, with dtype and shape; and back from them.

Weights are ``[out, in]``; compressed-tensors packs codes densely into int32 along the input (zero
points along the output), GPTQ stores the transpose and packs along the input as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moeq_plugin.checkpoint.headers import StoredTensor
from moeq_plugin.checkpoint.schemes import GPTQ_FORMS, Scheme

FLOATS = ("BF16", "F16", "F32")
_LOW_FLOATS = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Expected:
    """A tensor that a format asks for.

    Attributes:
        dtypes: any of these.
        shape: its shape.
        is_optional: readers do without it.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    is_optional: bool = False


def num_groups(scheme: Scheme, columns: int) -> int:
    """Return how many scales a row has."""
    return -(-columns // scheme.group_size) if scheme.group_size else 1


def tensors_of(scheme: Scheme | None, shape: tuple[int, int]) -> dict[str, Expected] | None:
    """Return the tensors of a weight by suffix, ``None`` for formats that we do not know.

    Args:
        scheme: how it is stored; ``None`` for 16 bit.
        shape: ``(out, in)``.
    """
    rows, columns = shape
    if scheme is None:
        return {"weight": Expected(FLOATS, shape)}
    groups = num_groups(scheme, columns)
    if scheme.form in GPTQ_FORMS:
        packed_rows = _words(rows, scheme.num_bits)
        return {
            "qweight": Expected(("I32",), (_words(columns, scheme.num_bits), rows)),
            "qzeros": Expected(("I32",), (groups, packed_rows)),
            "scales": Expected(FLOATS, (groups, rows)),
            "g_idx": Expected(("I32",), (columns,), is_optional=True),
        }
    scale = Expected(FLOATS, _scale_shape(scheme, shape))
    if scheme.form == "pack-quantized" and not scheme.is_float:
        tensors = {
            "weight_packed": Expected(("I32",), (rows, _words(columns, scheme.num_bits))),
            "weight_scale": scale,
            "weight_shape": Expected(("I64", "I32"), (2,)),
        }
        if not scheme.symmetric:
            packed = (_words(rows, scheme.num_bits), groups)
            tensors["weight_zero_point"] = Expected(("I32",), packed)
        return tensors
    if scheme.form not in {"int-quantized", "float-quantized", "naive-quantized"}:
        return None
    dtypes = _LOW_FLOATS if scheme.is_float else ("I8",)
    tensors = {"weight": Expected(dtypes, shape), "weight_scale": scale}
    if not scheme.symmetric:
        tensors["weight_zero_point"] = Expected(("I8",), scale.shape)
    return tensors


def _scale_shape(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, ...]:
    if scheme.strategy == "tensor":
        return (1,)
    if scheme.strategy == "block":
        return (-(-shape[0] // 128), -(-shape[1] // 128))
    return (shape[0], num_groups(scheme, shape[1]))


def _words(values: int, num_bits: int) -> int:
    return -(-values * num_bits // 32)


def stored_scheme(
    found: Mapping[str, StoredTensor], shape: tuple[int, int], declared: Scheme | None
) -> Scheme | None:
    """Return the scheme that the tensors of a weight are in, ``None`` for 16 bit.

    Args:
        found: the weight's tensors by suffix.
        shape: ``(out, in)`` of the weight.
        declared: by the config; what the tensors leave open is taken from it.
    """
    columns = shape[1]
    base = declared or Scheme(form="unknown", num_bits=0)
    if declared and _is_transposed(found, shape, declared):
        return declared  # one thing is wrong, not all that its shape would mean
    if "qweight" in found:
        rows = found["qweight"].shape[:1]
        scales = found["scales"].shape[:1] if "scales" in found else ()
        bits = _bits(rows, columns, base)
        form = base.form if base.form in GPTQ_FORMS else "gptq"
        return _grouped(replace(base, form=form, num_bits=bits), scales, columns)
    if "weight_packed" in found:
        packed = found["weight_packed"]
        if base.form != "pack-quantized" and (declared or packed.dtype != "I32"):
            return base
        scale = found["weight_scale"].shape[1:] if "weight_scale" in found else ()
        scheme = replace(
            base,
            form="pack-quantized",
            num_bits=_bits(packed.shape[1:], columns, base),
            symmetric=declared.symmetric if declared else "weight_zero_point" not in found,
        )
        return _grouped(scheme, scale, columns)
    weight = found.get("weight")
    if weight is None or weight.dtype in FLOATS:
        return None
    is_float = weight.dtype in _LOW_FLOATS
    scheme = replace(base, num_bits=8, is_float=is_float)
    if base.form not in {"int-quantized", "float-quantized", "naive-quantized"}:
        scheme = replace(scheme, form="float-quantized" if is_float else "int-quantized")
    if scheme.strategy in {"tensor", "block"} or "weight_scale" not in found:
        return scheme
    return _grouped(scheme, found["weight_scale"].shape[1:], columns)


def _is_transposed(
    found: Mapping[str, StoredTensor], shape: tuple[int, int], declared: Scheme
) -> bool:
    """Tell whether a tensor is the other way round, and the others are as the config has them."""
    expected = tensors_of(declared, shape) or {}
    wrong = [
        (found[suffix].shape, wanted.shape)
        for suffix, wanted in expected.items()
        if suffix in found and found[suffix].shape != wanted.shape
    ]
    return bool(wrong) and all(one == other[::-1] for one, other in wrong)


def is_old_packing(packed_columns: int, num_bits: int, columns: int) -> bool:
    """Tell whether codes are padded to whole words, as compressed-tensors did before 0.18."""
    padded = -(-columns // (32 // num_bits))
    return 32 % num_bits != 0 and packed_columns == padded != _words(columns, num_bits)


def _bits(packed: tuple[int, ...], columns: int, declared: Scheme) -> int:
    if packed[:1] == (_words(columns, declared.num_bits),):
        return declared.num_bits  # where the last word is not full the count alone would mislead
    return packed[0] * 32 // columns if packed and columns else 0


def _grouped(scheme: Scheme, groups: tuple[int, ...], columns: int) -> Scheme:
    """Return the scheme with the groups that a scale of this shape means."""
    count = groups[0] if groups else 0
    if count == num_groups(scheme, columns) or not count:
        return scheme
    if count == 1:
        return replace(scheme, group_size=None, strategy="channel")
    return replace(scheme, group_size=-(-columns // count), strategy="group")


def is_same(one: Scheme | None, other: Scheme | None, columns: int) -> bool:
    """Tell whether two schemes ask for the same tensors of a weight with these columns."""
    if one is None or other is None:
        return one is other
    return (
        (one.form, one.num_bits, one.symmetric, one.is_float)
        == (other.form, other.num_bits, other.symmetric, other.is_float)
    ) and num_groups(one, columns) == num_groups(other, columns)
