"""Are tensors called as the readers of this family call them, and each by one name?"""

from __future__ import annotations

from collections.abc import Iterator

from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.reader_names import in_file, split_tensor
from moeq_plugin.core.names import MIXTRAL_BLOCK, canonical, layer_of, of_expert


def check_names(layout: Layout) -> Iterator[Finding]:
    """Yield tensors under two names, and names of another family.

    Args:
        layout: the checkpoint.
    """
    seen: dict[str, str] = {}
    strange: dict[str, str] = {}
    architecture = layout.architecture
    for name in layout.checkpoint.tensors:
        ours = canonical(name)
        other = seen.setdefault(ours, name)
        if other != name:
            yield error("two-names", name, f"the same as {other}; readers take one of the two")
        expected = in_file(ours, architecture.family)
        if not architecture.is_known or name == expected:
            continue
        layer = layer_of(ours)
        if layer is not None and layout.is_fused(layer):  # as transformers holds experts
            continue
        if architecture.family == "mixtral" and of_expert(ours) and MIXTRAL_BLOCK in name:
            continue  # vLLM knows both spellings, and of transformers another check tells
        if split_tensor(ours)[0] in architecture.linears or ours in architecture.others:
            strange[name] = expected
    if strange:
        name, expected = next(iter(strange.items()))
        many = f", and {len(strange) - 1} more" if len(strange) > 1 else ""
        what = f"readers of {architecture.family} look for {expected}{many}"
        yield error("foreign-name", name, what)
