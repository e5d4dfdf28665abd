"""Is every tensor there that the config asks for, with the right shape and dtype, and no other?"""

from __future__ import annotations

from collections.abc import Iterator

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.formats import FLOATS, Expected, is_old_packing, tensors_of
from moeq_plugin.checkpoint.headers import StoredTensor
from moeq_plugin.checkpoint.layout import FUSED_EXPERTS, Layout
from moeq_plugin.checkpoint.reader_names import in_file, split_tensor
from moeq_plugin.checkpoint.schemes import Scheme
from moeq_plugin.core.names import layer_of


def check_structure(layout: Layout) -> Iterator[Finding]:
    """Yield what is missing, left over, or of another shape or dtype."""
    yield from _missing_linears(layout)
    for linear in layout.present():
        yield from _check_linear(layout, linear)
    yield from _check_others(layout)
    yield from _unexpected(layout)


def _missing_linears(layout: Layout) -> Iterator[Finding]:
    architecture = layout.architecture
    experts: dict[str, list[Linear]] = {}
    has_mtp = any(linear.is_mtp for linear in layout.present())
    for linear in architecture.linears.values():
        if linear.name in layout.stored or (linear.is_mtp and not has_mtp):
            continue
        if linear.role is Role.EXPERT:
            if linear.layer is None or not layout.is_fused(linear.layer):
                experts.setdefault(linear.name.rpartition(".")[0], []).append(linear)
            continue
        check = "missing-router" if linear.role is Role.ROUTER else "missing-tensor"
        yield error(check, in_file(linear.name, architecture.family), f"no {linear.role} weight")
    for expert, linears in experts.items():
        where = in_file(expert, architecture.family)
        if len(linears) == 3:
            yield error("missing-expert", where, "none of its tensors is there")
        else:
            for linear in linears:
                name = in_file(linear.name, architecture.family)
                yield error("missing-tensor", name, "no weight in any form")
    if architecture.num_mtp_layers and not has_mtp:
        yield warning(
            "mtp-dropped",
            "config.json",
            f"num_nextn_predict_layers is {architecture.num_mtp_layers}, the file has no such "
            "layer; transformers drops them when it loads a model",
        )


def _check_linear(layout: Layout, linear: Linear) -> Iterator[Finding]:
    found, scheme = layout.modules[linear.name], layout.stored[linear.name]
    where = in_file(linear.name, layout.architecture.family)
    if linear.role is Role.ROUTER and scheme is not None:
        yield error("router-quantized", where, f"stored as {scheme.describe()}")
        return
    declared = layout.declared(linear)
    expected = tensors_of(scheme, linear.shape)
    if expected is None:
        yield warning("unknown-format", where, f"format {scheme.form if scheme else ''}")
        return
    for suffix, wanted in expected.items():
        if suffix not in found:
            if not wanted.is_optional:
                is_zero_point = suffix == "weight_zero_point"
                check = "missing-zero-point" if is_zero_point else "missing-tensor"
                yield error(check, f"{where}.{suffix}", f"{_format(scheme)} needs it")
            continue
        packing = suffix == "weight_packed" and len(found[suffix].shape) == 2 and declared
        if packing and is_old_packing(found[suffix].shape[1], packing.num_bits, linear.shape[1]):
            yield error("old-packing", where, f"{packing.num_bits}-bit codes padded to words")
            continue
        yield from _check_tensor(found[suffix], wanted)
    for suffix in found.keys() - expected.keys() - {"bias", "input_scale", "weight_g_idx"}:
        yield error("unexpected-tensor", found[suffix].name, f"{_format(scheme)} has no {suffix}")


def _check_tensor(tensor: StoredTensor, wanted: Expected) -> Iterator[Finding]:
    if tensor.dtype not in wanted.dtypes:
        yield error(
            "wrong-dtype", tensor.name, f"{tensor.dtype}, expected {' or '.join(wanted.dtypes)}"
        )
    shape, expected = list(tensor.shape), list(wanted.shape)
    if shape == expected:
        return
    if sorted(shape) == sorted(expected) and len(shape) == 2:
        yield error("transposed", tensor.name, f"{shape}, expected {expected}")
    elif shape or expected != [1]:  # a scale per tensor may be a scalar
        yield error("wrong-shape", tensor.name, f"{shape}, expected {expected}")


def _check_others(layout: Layout) -> Iterator[Finding]:
    """Check norms, embeddings and biases."""
    architecture = layout.architecture
    has_mtp = any(linear.is_mtp for linear in layout.present())
    for name, shape in architecture.others.items():
        layer = layer_of(name)
        is_mtp = layer is not None and layer >= architecture.num_layers
        is_fused = ".experts." in name and layer is not None and layout.is_fused(layer)
        module, suffix = split_tensor(name)
        tensor = layout.modules.get(module, {}).get(suffix)
        if tensor is not None:
            yield from _check_tensor(tensor, Expected(FLOATS, shape))
        elif not is_fused and (has_mtp or not is_mtp):
            yield error("missing-tensor", in_file(name, architecture.family), "not in any file")


def _unexpected(layout: Layout) -> Iterator[Finding]:
    architecture = layout.architecture
    if not architecture.is_known:
        return
    known = set(architecture.others)
    if "lm_head" not in architecture.linears:
        known.add("lm_head.weight")  # tied, and stored all the same
    for layer in architecture.moe_layers:
        experts = f"model.layers.{layer}.mlp.experts"
        known |= {f"{experts}.{name}{tail}" for name in FUSED_EXPERTS for tail in ("", "_bias")}
    for module, tensors in layout.modules.items():
        for suffix, tensor in tensors.items():
            name = f"{module}.{suffix}" if suffix else module
            if name not in known and (module not in architecture.linears or suffix == "bias"):
                what = f"{architecture.family} with this config has no such tensor"
                if not name.endswith(("inv_freq", "_scale")):  # of old files, of KV caches
                    yield error("unexpected-tensor", tensor.name, what)


def _format(scheme: Scheme | None) -> str:
    return f"{scheme.form} {scheme.describe()}" if scheme else "a 16-bit weight"
