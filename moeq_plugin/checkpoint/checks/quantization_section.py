"""Does the ``quantization_config`` of compressed-tensors describe what lies beside it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.reader_names import in_file

_SECTION = "config.json: quantization_config"
_CACHE = ("k_scale", "v_scale")
_INTEGERS = {"pack-quantized", "int-quantized"}
_FLOATS = {"float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"}
_PLAIN = {"dense"}


def check_quantization_section(layout: Layout) -> Iterator[Finding]:
    """Yield what readers take from the section and do not find, or find and do not expect."""
    section = layout.checkpoint.config.get("quantization_config")
    if not isinstance(section, Mapping) or layout.schemes.dialect != "compressed-tensors":
        return
    yield from _check_status(section, layout)
    yield from _check_cache(section, layout)
    yield from _check_groups(section)
    yield from _check_inputs(section, layout)
    yield from _check_order(layout)


def _check_status(section: Mapping[str, Any], layout: Layout) -> Iterator[Finding]:
    status = section.get("quantization_status")
    if status not in (None, "compressed"):
        what = f"quantization_status is {ascii(status)[:40]}: readers look for plain weights then"
        yield error("not-compressed", _SECTION, what)
    form = section.get("format")
    plain = _PLAIN | {None} if any(layout.stored.values()) else set()
    if form in tuple(_PLAIN) or (form is None and not plain):
        what = "format is 'dense': weights are stored in 16 bit with scales beside them"
        yield error("not-compressed", _SECTION, what)
    sparsity = section.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense"):
        what = f"sparsity_config asks for {ascii(sparsity.get('format'))[:40]}, weights are dense"
        yield error("section", _SECTION, what)
    if layout.checkpoint.config.get("sparsity_config"):
        yield error("section", "config.json", "sparsity_config: weights are dense")


def _check_cache(section: Mapping[str, Any], layout: Layout) -> Iterator[Finding]:
    scheme = section.get("kv_cache_scheme")
    if scheme is None:
        return
    if not isinstance(scheme, Mapping):
        yield error("section", _SECTION, "kv_cache_scheme is no object")
    elif not scheme.get("dynamic"):
        names = layout.checkpoint.tensors
        found = {suffix for suffix in _CACHE if any(n.endswith(f".{suffix}") for n in names)}
        for suffix in sorted(set(_CACHE) - found):
            what = f"kv_cache_scheme is static, and there is no {suffix}: readers make one up"
            yield error("missing-scale", _SECTION, what)


def _check_groups(section: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield formats that are not of the type that they are given."""
    groups = section.get("config_groups")
    taken: dict[str, str] = {}
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        where = f"{_SECTION}.config_groups.{name}"
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        form, kind = group.get("format") or section.get("format"), weights.get("type", "int")
        if isinstance(form, str) and (
            (form in _INTEGERS and kind == "float") or (form in _FLOATS and kind == "int")
        ):
            yield error("section", where, f"weights.type is {kind}, but the format is {form}")
        if weights.get("dynamic") not in (None, False):
            yield error("section", where, "weights.dynamic is not false: no weight is")
        for target in group.get("targets") or ():
            other = taken.setdefault(str(target), name)
            if other != name:
                yield error("section", where, f"{ascii(target)[:60]} is a target of {other} too")


def _check_inputs(section: Mapping[str, Any], layout: Layout) -> Iterator[Finding]:
    """Yield linears whose activations have a fixed scale that is not there."""
    if not any(_is_static(group) for group in _groups(section)):
        return
    dynamic_too = any(not _is_static(group) for group in _groups(section))
    lone = []
    for linear in layout.present():
        scheme = layout.declared(linear)
        if layout.stored[linear.name] is None or scheme is None or not scheme.has_activations:
            continue
        if "input_scale" not in layout.modules[linear.name] and not dynamic_too:
            lone.append(linear)
    if lone:
        where = in_file(lone[0].name, layout.architecture.family)
        what = f"no input_scale, nor for {len(lone) - 1} more linears: readers make one up"
        yield error("missing-scale", f"{where}.input_scale", what)


def _groups(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = section.get("config_groups")
    return (
        [g for g in groups.values() if isinstance(g, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )


def _is_static(group: Mapping[str, Any]) -> bool:
    inputs = group.get("input_activations")
    return isinstance(inputs, Mapping) and inputs.get("dynamic") in (None, False)


def _check_order(layout: Layout) -> Iterator[Finding]:
    """Yield groups of columns in an order that readers do not look for."""
    for linear in layout.present():
        found, scheme = layout.modules[linear.name], layout.declared(linear)
        if "weight_g_idx" not in found or (scheme and scheme.actorder in {"group", "dynamic"}):
            continue
        what = "the config has no act order by groups, so readers do not look at it"
        yield error("unexpected-tensor", found["weight_g_idx"].name, what)
