"""Does the file have several schemes for what a reader holds in one?"""

from __future__ import annotations

from collections.abc import Iterator

from moeq_plugin.checkpoint.architecture import Linear
from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.formats import is_same
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.reader_names import fused_name
from moeq_plugin.checkpoint.schemes import Scheme, describe
from moeq_plugin.core.names import FUSED


def check_mixed_schemes(layout: Layout, target: str) -> Iterator[Finding]:
    """Yield what a reader holds in one scheme and the file in several.

    Args:
        layout: the checkpoint.
        target: the reader.
    """
    for layer, linears in layout.architecture.experts().items():
        schemes = _schemes(layout, linears)
        if len(schemes) > 1 and target != "gguf":
            what = f"vLLM applies expert 0's scheme to all experts, stored are {_counts(schemes)}"
            severe = error if target == "vllm" else warning
            yield severe("mixed-layer", f"model.layers.{layer}", what)
        if target == "gguf":
            for projection in ("gate_proj", "up_proj", "down_proj"):
                schemes = _schemes(layout, [e for e in linears if e.name.endswith(projection)])
                if len(schemes) > 1:
                    where = f"model.layers.{layer}.*.{projection}"
                    yield error("gguf-mixed", where, f"one tensor in GGUF, {_counts(schemes)}")
    if target == "vllm":
        yield from _check_fused(layout)


def _check_fused(layout: Layout) -> Iterator[Finding]:
    groups: dict[str, list[Linear]] = {}
    for linear in layout.present():
        whole = fused_name(linear.name)
        if whole:
            groups.setdefault(whole, []).append(linear)
    for whole, linears in groups.items():
        schemes = _schemes(layout, linears)
        if len(schemes) > 1:
            parts = "+".join(FUSED[whole.rpartition(".")[2]])
            where = f"{whole.rpartition('.')[0]}.{parts}"
            yield error("mixed-fused-group", where, f"one matrix in vLLM, {_counts(schemes)}")


def _schemes(layout: Layout, linears: list[Linear]) -> dict[Scheme | None, int]:
    """Return the different schemes among the linears that are there, and how many have each."""
    counts: dict[Scheme | None, int] = {}
    for linear in linears:
        if linear.name not in layout.stored:
            continue
        scheme, columns = layout.stored[linear.name], linear.shape[1]
        alike = next((s for s in counts if is_same(s, scheme, columns)), scheme)
        counts[alike] = counts.get(alike, 0) + 1
    return counts


def _counts(schemes: dict[Scheme | None, int]) -> str:
    return ", ".join(f"{count} x {describe(scheme)}" for scheme, count in schemes.items())
