"""What transformers 5.17 and vLLM 0.32 and 0.33 cannot read, or not everywhere.

Seen by running them, except where a GPU or GPT-OSS would be needed: that is from their source.
"""

from __future__ import annotations

from collections.abc import Iterator

from moeq_plugin.checkpoint.architecture import Role
from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.formats import is_same
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.lookup import transformers_experts_scheme
from moeq_plugin.checkpoint.schemes import GPTQ_FORMS, Scheme, describe

_ONLY_WITH_US = (
    "read it with moeq_plugin.integrations.llm_compressor.load_dequantized(directory); "
    "servers take GPT-OSS as it was published, in MXFP4"
)
_PACKED_BITS, _KERNEL_BITS = range(2, 9), (4, 8)


def check_transformers(layout: Layout, target: str) -> Iterator[Finding]:
    """Yield why ``AutoModelForCausalLM.from_pretrained`` would misread the experts.

    Args:
        layout: the checkpoint.
        target: the reader whose misreading is an error.
    """
    severe = error if target == "transformers" else warning
    if layout.schemes.dialect != "compressed-tensors":
        return
    way_out = _ONLY_WITH_US if layout.architecture.family == "gpt_oss" else ""
    for sentence in _misreadings(layout):
        yield severe("transformers-misreads", "routed experts", sentence, way_out)


def _misreadings(layout: Layout) -> Iterator[str]:
    experts = [e for e in layout.present(Role.EXPERT) if not e.is_mtp]
    schemes = {layout.stored[expert.name] for expert in experts}
    quantized = [scheme for scheme in schemes if scheme]
    if not quantized:
        return
    if layout.architecture.family == "gpt_oss":
        yield "no rule to read GPT-OSS from one tensor per expert: random experts, silently"
    if layout.architecture.family == "mixtral" and _has_names_of_others(layout):
        yield "Mixtral's experts are read as w1, w2, w3: random experts, silently; rename them"
    one = transformers_experts_scheme(layout.schemes)
    others = [e for e in experts if not is_same(one, layout.stored[e.name], e.shape[1])]
    if others:
        yield (
            f"one scheme is applied to all experts of the model, {describe(one)}; {len(others)} of "
            f"{len(experts)} expert linears are stored in another and come out wrong, silently"
        )
    if any(not scheme.symmetric for scheme in quantized):
        yield "zero points of experts are not read: it fails"
    if any(scheme.form != "pack-quantized" and not scheme.is_float for scheme in quantized):
        yield "integer experts are read only if packed (pack-quantized): it fails"


def _has_names_of_others(layout: Layout) -> bool:
    return any(".experts." in name and "_proj." in name for name in layout.checkpoint.tensors)


def check_vllm(layout: Layout, target: str) -> Iterator[Finding]:
    """Yield what vLLM refuses or serves only with some kernels.

    Args:
        layout: the checkpoint.
        target: nothing is said unless it is ``vllm``.
    """
    if target != "vllm":
        return
    if layout.architecture.family == "gpt_oss" and layout.present(Role.EXPERT):
        yield error(
            "vllm-refuses",
            "routed experts",
            "GPT-OSS experts are read from one tensor per layer; tensors per expert are skipped, "
            "silently",
            _ONLY_WITH_US,
        )
    seen: dict[str, tuple[str, bool]] = {}
    for linear in layout.present():
        scheme = layout.stored[linear.name]
        if scheme is None:
            continue
        refusal = _refusal(scheme, linear.role, layout)
        if refusal:
            seen.setdefault(refusal, (linear.name, True))
        elif not scheme.is_float and _needs_rare_kernel(scheme):
            seen.setdefault(f"{scheme.describe()} needs Humming kernels", (linear.name, False))
    for what, (where, is_refused) in seen.items():
        if is_refused:
            yield error("vllm-refuses", where, what)
        else:
            yield warning("vllm-kernel", where, what)


def _refusal(scheme: Scheme, role: Role, layout: Layout) -> str | None:
    if scheme.form in GPTQ_FORMS:
        if scheme.num_bits not in _KERNEL_BITS or not scheme.symmetric:
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


def _needs_rare_kernel(scheme: Scheme) -> bool:
    """Tell whether neither Marlin nor Triton takes it: they read int4 and symmetric int8."""
    return scheme.num_bits not in _KERNEL_BITS or (scheme.num_bits == 8 and not scheme.symmetric)
