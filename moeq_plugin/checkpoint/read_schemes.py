"""Read a ``quantization_config`` of either dialect, compressed-tensors or GPTQ."""

from __future__ import annotations

from typing import Any

from moeq_plugin.checkpoint.schemes import Group, Scheme, Schemes
from moeq_plugin.untrusted.patterns import compiled

_STRATEGIES = ("group", "tensor_group", "channel", "tensor", "block", "attn_head")


def read_schemes(config: dict[str, Any]) -> Schemes:
    """Return the schemes of a checkpoint from the content of its ``config.json``.

    Raises:
        ValueError: if they are not in a dialect that we read, or contradict themselves.
    """
    content = config.get("quantization_config", config.get("compression_config"))
    if content is None:
        return Schemes()
    if not isinstance(content, dict):
        raise ValueError("config.json: quantization_config must be an object")
    method = content.get("quant_method")
    readers = {"compressed-tensors": _read_compressed_tensors, "gptq": _read_gptq}
    if method not in tuple(readers):
        raise ValueError(
            f"config.json: quant_method {ascii(method)} is not one of {', '.join(readers)}, "
            "the formats that are read here"
        )
    return readers[method](content)


def _read_compressed_tensors(content: dict[str, Any]) -> Schemes:
    groups = content.get("config_groups")
    if not isinstance(groups, dict):
        raise ValueError("config.json: quantization_config has no config_groups")
    return Schemes(
        dialect="compressed-tensors",
        groups=tuple(_group(name, group, content.get("format")) for name, group in groups.items()),
        ignore=_patterns("ignore", content.get("ignore") or []),
    )


def _group(name: str, group: Any, form: Any) -> Group:
    key = f"config_groups.{ascii(name)[1:-1]}"
    where = f"config.json: {key}"
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"{where} has no `weights`, which every group needs")
    kind = weights.get("type", "int")
    if kind not in ("int", "float"):  # no sets below: what a file says may not be hashable
        raise ValueError(f"{where}: weights.type must be int or float, got {ascii(kind)}")
    group_size = weights.get("group_size")
    if group_size is not None and (type(group_size) is not int or group_size < -1):
        raise ValueError(f"{where}: weights.group_size must be a number, got {ascii(group_size)}")
    group_size = group_size if group_size and group_size > 0 else None
    strategy = weights.get("strategy") or ("group" if group_size else "tensor")
    if strategy not in _STRATEGIES:
        raise ValueError(f"{where}: weights.strategy {ascii(strategy)} is not known")
    if (strategy == "group") != (group_size is not None) and strategy != "tensor_group":
        raise ValueError(f"{where}: strategy {strategy} does not go with group_size {group_size}")
    actorder = weights.get("actorder")
    return Group(
        targets=_patterns(f"{key}.targets", group.get("targets")),
        scheme=Scheme(
            form=_form(
                where, group.get("format") or form, kind, bool(group.get("input_activations"))
            ),
            num_bits=_bits(where, weights.get("num_bits")),
            group_size=group_size,
            symmetric=weights.get("symmetric", True) is not False,
            is_float=kind == "float",
            strategy=strategy,
            actorder=actorder if isinstance(actorder, str) else None,
            has_activations=bool(group.get("input_activations")),
        ),
    )


def _form(where: str, form: Any, kind: str, has_activations: bool) -> str:
    if form is None or form == "mixed-precision":
        # what compressed-tensors infers where a group does not say it
        whole = "float-quantized" if kind == "float" else "int-quantized"
        return whole if has_activations or kind == "float" else "pack-quantized"
    if not isinstance(form, str):
        raise ValueError(f"{where}: format must be a name, got {ascii(form)}")
    return form


def _bits(where: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 16:
        raise ValueError(f"{where}: bits must be a number from 1 to 16, got {ascii(value)}")
    return value


def _patterns(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise ValueError(f"config.json: {where} must be a list of names and patterns")
    for target in value:
        if target.startswith("re:"):
            _check_pattern(where, target.removeprefix("re:"))
    return tuple(value)


def _check_pattern(where: str, pattern: str) -> None:
    try:
        compiled(pattern)
    except ValueError as cause:
        raise ValueError(f"config.json: {where}: {cause}") from None


def _read_gptq(content: dict[str, Any]) -> Schemes:
    where = "config.json: quantization_config"
    base = _gptq_scheme(where, content, {})
    dynamic = content.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ValueError(f"{where}: dynamic must be an object")
    changed: dict[str, Scheme | None] = {}
    for pattern, changes in dynamic.items():
        _check_pattern("dynamic", pattern.removeprefix("-:").removeprefix("+:"))
        if pattern.startswith("-:"):
            changed[pattern] = None
        elif isinstance(changes, dict):
            changed[pattern] = _gptq_scheme(f"{where}: dynamic", changes, content)
        else:
            raise ValueError(f"{where}: dynamic[{ascii(pattern)}] must be an object")
    return Schemes(
        dialect="gptq",
        groups=(Group(("Linear",), base),),
        ignore=("lm_head",) if not content.get("lm_head") else (),
        dynamic=changed,
        desc_act=content.get("desc_act") is True,
    )


def _gptq_scheme(where: str, content: dict[str, Any], default: dict[str, Any]) -> Scheme:
    group_size = content.get("group_size", default.get("group_size", -1))
    if type(group_size) is not int or group_size < -1 or group_size == 0:
        raise ValueError(f"{where}: group_size must be -1 or positive, got {ascii(group_size)}")
    form = content.get("checkpoint_format", default.get("checkpoint_format"))
    return Scheme(
        form="gptq_v2" if form == "gptq_v2" else "gptq",
        num_bits=_bits(where, content.get("bits", default.get("bits"))),
        group_size=group_size if group_size > 0 else None,
        symmetric=content.get("sym", default.get("sym", True)) is not False,
        strategy="group" if group_size > 0 else "channel",
    )
