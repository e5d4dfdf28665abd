"""No weight is quantized twice: not by two modifiers, not by two schemes, not by two runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.utils import match_name, match_named_modules
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from torch import nn

from moeq_plugin.integrations.llm_compressor.frozen_fields import FrozenFields
from moeq_plugin.integrations.llm_compressor.preflight.targets import kept_by_default
from moeq_plugin.integrations.llm_compressor.recipe import neighbours
from moeq_plugin.integrations.llm_compressor.unfinished import is_unfinished
from moeq_plugin.models.moe import MoELayer

_DONE = (QuantizationStatus.FROZEN, QuantizationStatus.COMPRESSED)
_LISTED = 10


def check_alone(modifier: Modifier, model: nn.Module, layers: list[MoELayer]) -> None:
    """Refuse a recipe in which another modifier quantizes what this one does.

    The host attaches the schemes of all modifiers before any of them calibrates, then lets each
    round what it targets: the weights would be rounded twice, to the scheme that came last.

    Args:
        modifier: ours, in the recipe that runs.
        model: the linearized model.
        layers: its MoE layers.

    Raises:
        ValueError: naming the other modifier and what both cover.
    """
    before, after = neighbours(modifier)
    own = _covered(modifier, model, layers)
    for other in (*before, *after):
        twice = [name for name in _covered(other, model, layers) if name in own]
        if twice:
            raise ValueError(
                f"{type(modifier).__name__} and {type(other).__name__} of this recipe both "
                f"quantize {len(twice)} modules, whose weights would be rounded twice: "
                f"{', '.join(twice[:_LISTED])}. Use one modifier with several config_groups, or "
                "put what the other one covers into `ignore`."
            )


def check_groups(model: nn.Module, groups: Mapping[str, QuantizationScheme]) -> None:
    """Refuse schemes that claim the same linears with equal right.

    A name stands above a regular expression, and that above a class name; so a scheme for
    ``Linear`` may have exceptions. Between two expressions the host decides by the alphabet.

    Args:
        model: the linearized model.
        groups: schemes by the names of their groups.

    Raises:
        ValueError: naming both groups and what they share.
    """
    if len(groups) < 2:
        return
    by_name = _owners((t, g) for g, s in groups.items() for t in s.targets if not _is_regex(t))
    regexes = [(t, g) for g, s in groups.items() for t in s.targets if _is_regex(t)]
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        claims = by_name.get(name) or {group for t, group in regexes if match_name(name, t)}
        if not claims:
            classes = (cls.__name__ for cls in type(module).__mro__)
            claims = set().union(*(by_name.get(cls, set()) for cls in classes))
        if len(claims) > 1:
            shared.setdefault(tuple(sorted(claims)), []).append(name)
    for claimed_by, names in shared.items():
        raise ValueError(
            f"config_groups {' and '.join(claimed_by)} both target {len(names)} modules, and "
            f"nothing says which scheme they get: {', '.join(names[:_LISTED])}. Make the targets "
            "of one of them narrower."
        )


def check_not_quantized(linears: Mapping[nn.Linear, str] | Mapping[nn.Module, str]) -> None:
    """Refuse modules that hold quantized weights already.

    Args:
        linears: the targeted modules and their names.

    Raises:
        ValueError: listing the first ten of them.
    """
    unfinished = [name for module, name in linears.items() if is_unfinished(module)]
    if unfinished:
        raise ValueError(
            f"{len(unfinished)} of {len(linears)} targeted modules were quantized by a run that "
            f"did not finish, load the model again: {', '.join(unfinished[:_LISTED])}"
        )
    done = [
        name
        for module, name in linears.items()
        if getattr(module, "quantization_status", None) in _DONE
        or "weight_packed" in module._parameters
    ]
    if done:
        raise ValueError(
            f"{len(done)} of {len(linears)} targeted modules are quantized already, quantizing "
            f"them again would add error to error: {', '.join(done[:_LISTED])}. Load the 16-bit "
            "checkpoint, or put these modules into `ignore`."
        )


def check_untouched(model: nn.Module) -> None:
    """Refuse a model in which a run that did not finish has changed something, targeted or not.

    Raises:
        ValueError: listing the first ten modules.
    """
    changed = [name for name, module in model.named_modules() if is_unfinished(module)]
    if changed:
        raise ValueError(
            f"{len(changed)} modules of the model were changed by a run that did not finish, load "
            f"the model again: {', '.join(changed[:_LISTED])}"
        )


def _covered(modifier: Modifier, model: nn.Module, layers: list[MoELayer]) -> dict[str, nn.Module]:
    """Return the modules, by name, whose weights a modifier quantizes; of any make."""
    if not isinstance(modifier, QuantizationMixin):
        return {}
    targets, ignore = modifier.resolved_targets, list(modifier.ignore)
    if isinstance(modifier, FrozenFields):  # ours, which leave more alone than they are told to
        ignore += kept_by_default(model, layers, targets)
    return {
        name: module
        for name, module in match_named_modules(model, targets, ignore)
        if isinstance(module, nn.Linear | nn.Embedding)
    }


def _owners(claims: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    owners: dict[str, set[str]] = {}
    for target, group in claims:
        owners.setdefault(target, set()).add(group)
    return owners


def _is_regex(target: str) -> bool:
    return target.startswith("re:")
