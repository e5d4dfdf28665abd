"""What transformers 5.17 and vLLM 0.32 and 0.33 cannot read, or not everywhere.

Seen by running them, except where a GPU or GPT-OSS would be needed: that is from their source.
"""

from __future__ import annotations

from collections.abc import Iterator

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.checks.findings import Finding, counted, error, warning
from moeq_plugin.checkpoint.formats import is_same
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.lookup import transformers_experts_scheme
from moeq_plugin.checkpoint.reader_names import split_tensor
from moeq_plugin.checkpoint.schemes import GPTQ_FORMS, KERNEL_BITS, Scheme, describe
from moeq_plugin.models.expert_reading import Grid, misread_experts
from moeq_plugin.models.expert_rules import names_by_config

_ONLY_WITH_US = "read it with moeq_plugin.integrations.llm_compressor.load_dequantized(directory)"
_WITHOUT_US = {"gpt_oss": "; servers take GPT-OSS as it was published, in MXFP4"}
# vLLM has one loader for both
_EXPERTS_IN_ONE_TENSOR = ("gpt_oss", "openai_privacy_filter")
_RWKV = ("rwkv", "rwkv5", "rwkv6", "rwkv7")
_WITH_OUR_RWKV = "import moeq_plugin.rwkv, and load it with transformers"
_PACKED_BITS = range(2, 9)


def check_transformers(layout: Layout, target: str) -> Iterator[Finding]:
    """Yield why ``from_pretrained`` of transformers would misread the experts.

    Args:
        layout: the checkpoint.
        target: the reader whose misreading is an error.
    """
    severe = error if target == "transformers" else warning
    if layout.schemes.dialect != "compressed-tensors" or not any(layout.stored.values()):
        return
    family = layout.architecture.family
    way_out = _ONLY_WITH_US + _WITHOUT_US[family] if family in _WITHOUT_US else ""
    for sentence in _misreadings(layout):
        yield severe("transformers-misreads", "routed experts", sentence, way_out)


def _misreadings(layout: Layout) -> Iterator[str]:
    experts = [e for e in layout.present(Role.EXPERT) if not e.is_mtp]
    if not experts:
        return
    grids = {_grid(layout.stored[expert.name]) for expert in experts}
    names = names_by_config(layout.checkpoint.config)
    yield from misread_experts(grids, names, _names_in_file(layout, experts), "transformers")
    if grids == {None}:
        return
    one = transformers_experts_scheme(layout.schemes)
    others = [e for e in experts if not is_same(one, layout.stored[e.name], e.shape[1])]
    if others:
        yield (
            f"one scheme is applied to all experts of the model, {describe(one)}; {len(others)} of "
            f"{len(experts)} expert linears are stored in another and come out wrong, silently"
        )


def _grid(scheme: Scheme | None) -> Grid | None:
    if scheme is None:
        return None
    return Grid(
        num_bits=scheme.num_bits,
        is_float=scheme.is_float,
        symmetric=scheme.symmetric,
        has_second_scale=scheme.strategy == "tensor_group",
        has_groups=scheme.strategy == "group",
        is_packed=scheme.form == "pack-quantized",
    )


def _names_in_file(layout: Layout, experts: list[Linear]) -> set[str]:
    """Return what the file calls the projections of its experts."""
    tensors = (t for e in experts for t in layout.modules.get(e.name, {}).values())
    return {split_tensor(tensor.name)[0].rpartition(".")[2] for tensor in tensors}


def check_vllm(layout: Layout, target: str) -> Iterator[Finding]:
    """Yield what vLLM refuses or serves only with some kernels.

    Args:
        layout: the checkpoint.
        target: nothing is said unless it is ``vllm``.
    """
    if target != "vllm":
        return
    family = layout.architecture.family
    if family in _RWKV:
        what = f"vLLM 0.32 has no {family}"
        yield warning("vllm-refuses", "config.json", what, _WITH_OUR_RWKV)
    if family in _EXPERTS_IN_ONE_TENSOR and layout.present(Role.EXPERT):
        yield error(
            "vllm-refuses",
            "routed experts",
            f"experts of {family} are read from one tensor per layer; tensors per expert are "
            "skipped, silently",
            _ONLY_WITH_US + _WITHOUT_US.get(family, ""),
        )
    refused: dict[str, list[str]] = {}
    rare: dict[str, list[str]] = {}
    for linear in layout.present():
        scheme = layout.stored[linear.name]
        if scheme is None:
            continue
        refusal = _refusal(scheme, linear.role, layout)
        if refusal:
            refused.setdefault(refusal, []).append(linear.name)
        elif scheme.needs_humming:
            rare.setdefault(f"{scheme.describe()} needs Humming kernels", []).append(linear.name)
    for what, names in refused.items():
        yield error("vllm-refuses", names[0], _with_others(what, names))
    for what, names in rare.items():
        yield warning("vllm-kernel", names[0], _with_others(what, names))


def _with_others(what: str, names: list[str]) -> str:
    """Say of how many linears it is true beside the one that is named."""
    others = len(names) - 1
    return f"{what}, here and in {counted(others, 'more linear')}" if others else what


def _refusal(scheme: Scheme, role: Role, layout: Layout) -> str | None:
    if scheme.form in GPTQ_FORMS:
        if scheme.num_bits not in KERNEL_BITS or not scheme.symmetric:
            return f"of the GPTQ format 4 and 8 bits, symmetric, are read; not {scheme.describe()}"
        if layout.schemes.desc_act and scheme.group_size:
            return "desc_act with groups is no longer read"
        return None
    if scheme.actorder in {"group", "dynamic"}:
        return f"actorder {scheme.actorder!r} is no longer read"
    if role is Role.EXPERT and not scheme.is_float and not scheme.has_activations:
        if scheme.form != "pack-quantized":
            return f"experts with integer weights alone must be pack-quantized, not {scheme.form}"
        if scheme.num_bits not in _PACKED_BITS:
            return f"experts may have 2 to 8 bits, not {scheme.num_bits}"
    return None
