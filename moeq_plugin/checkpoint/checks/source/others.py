"""Compare what is not quantized: norms, embeddings, biases, other towers; all has to be there."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.checks.source.originals import Originals, plain_name
from moeq_plugin.checkpoint.checks.source.recipe import Rewrites
from moeq_plugin.checkpoint.checks.source.same import difference, unequal
from moeq_plugin.checkpoint.codes import can_read, read_tensor
from moeq_plugin.checkpoint.headers import StoredTensor
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.reader_names import split_tensor
from moeq_plugin.core.names import canonical, is_prediction, layer_of, of_expert, role_of

_KEPT_NORMS = ("q_norm.weight", "k_norm.weight")  # within a head: neither scaled nor turned
_WRITERS = ("o_proj.bias", "down_proj.bias")  # are turned like the residual stream
_BUFFERS = ("inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def check_others(
    layout: Layout, originals: Originals, rewrites: Rewrites, wrong: Collection[str]
) -> Iterator[Finding]:
    """Yield tensors beside quantized linears that are not the source's, or not there.

    Args:
        layout: the checkpoint.
        originals: of the source.
        rewrites: what may have been changed on purpose.
        wrong: linears of which something has been said; their biases went with them.
    """
    for module, tensors in layout.modules.items():
        for suffix, tensor in tensors.items():
            is_of_linear = module in layout.stored and suffix != "bias"
            name = f"{module}.{suffix}" if suffix else module
            if is_of_linear or module in wrong or _is_rewritten(name, rewrites):
                continue
            what = _difference(plain_name(name), plain_name(module), suffix, tensor, originals)
            if what:
                yield error("far-from-source", tensor.name, what)
    yield from _missing(layout, originals)


def _difference(
    name: str, module: str, suffix: str, tensor: StoredTensor, originals: Originals
) -> str | None:
    original = originals.modules.get(module, {}).get(suffix)
    if original is not None:
        return difference(tensor, original)
    bias = originals.bias(name)
    if bias is None or bias.shape != tensor.shape or not can_read(tensor):
        return None
    return unequal(read_tensor(tensor).float(), bias.float(), {tensor.dtype, "BF16"})


def _is_rewritten(name: str, rewrites: Rewrites) -> bool:
    if rewrites.rotated and not name.endswith(_KEPT_NORMS):
        return "norm" in name or "embed" in name or name.endswith(_WRITERS)
    if rewrites.pruned_experts and (".experts." in name or "gate." in name or "router" in name):
        return True
    if not rewrites.rescaled:
        return False
    is_norm = name.endswith("norm.weight") and layer_of(name) is not None
    return (is_norm and not name.endswith(_KEPT_NORMS)) or name.endswith(".bias")


def _missing(layout: Layout, originals: Originals) -> Iterator[Finding]:
    """Yield what the source has and the checkpoint has in no form, one finding for each kind."""
    here = {plain_name(module): tensors for module, tensors in layout.modules.items()}
    in_codebooks = {plain_name(canonical(module)) for module in layout.checkpoint.codebooks}
    kinds: dict[str, list[str]] = {}
    predictions = _predictions(layout)
    for name in originals.source.checkpoint.tensors:
        module, suffix = split_tensor(plain_name(canonical(name)))
        found = here.get(module)
        is_there = found is not None and (suffix in found or suffix == "weight")
        if not predictions and is_prediction(name, layout.architecture.num_layers):
            continue
        is_there = is_there or (module in in_codebooks and suffix == "weight")
        if not is_there and not _is_dispensable(layout, originals, module, name):
            kinds.setdefault(role_of(name), []).append(name)
    for names in kinds.values():
        many = f", and {len(names) - 1} more like it" if len(names) > 1 else ""
        yield error("not-in-checkpoint", names[0], f"the source has it{many}")
    dropped = _predictions(originals.source)
    if dropped and not predictions:
        yield warning(
            "mtp-dropped", dropped[0], f"the source has it, and {len(dropped) - 1} more tensors of "
            "layers for next-token prediction",
        )  # fmt: skip


def _predictions(layout: Layout) -> list[str]:
    num_layers = layout.architecture.num_layers
    return [name for name in layout.checkpoint.tensors if is_prediction(name, num_layers)]


def _is_dispensable(layout: Layout, originals: Originals, module: str, name: str) -> bool:
    """Tell whether a checkpoint can do without a tensor of its source."""
    layer = layer_of(name)
    is_expert = of_expert(name) is not None and (
        originals.experts or (layer is not None and layout.is_fused(layer))
    )
    is_tied = module == "lm_head" and layout.checkpoint.config.get("tie_word_embeddings") is True
    return bool(is_expert or is_tied or originals.is_stacked(name) or name.endswith(_BUFFERS))
