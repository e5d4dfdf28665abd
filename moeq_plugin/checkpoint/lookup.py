"""Which scheme a reader finds for a module: vLLM by its own names, others by transformers' names.

The rules are those of vLLM 0.32 and 0.33, compressed-tensors 0.19 and transformers 5.17.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.reader_names import fused_name, fused_parts, in_file, in_vllm
from moeq_plugin.checkpoint.schemes import Scheme, Schemes, describe

# these classes of vLLM take part in quantization; the others never do
_ROUTER_TAKES_PART = ("qwen3_moe",)


class ConflictError(ValueError):
    """The reader stops: what it fuses would have two schemes."""


class Lookup:
    """Scheme lookups of one checkpoint.

    Args:
        schemes: what its config says.
        family: the config's model type, which decides about names.
    """

    def __init__(self, schemes: Schemes, family: str) -> None:
        self._schemes, self._family = schemes, family
        self._by_target = {t: group.scheme for group in schemes.groups for t in group.targets}
        # exact names, then patterns in alphabetical order, then classes
        self._sorted = sorted(self._by_target, key=lambda target: ("re:" in target, target))
        self._matches = _Matcher(schemes.ignore)

    def by_name(self, linear: Linear) -> Scheme | None:
        """Return what compressed-tensors attaches to the linear of the transformers model."""
        if self._schemes.dialect == "gptq":
            return self._gptq(linear.name)
        stored = in_file(linear.name, self._family)
        if self._matches(linear.name) or self._matches(stored) or "Linear" in self._schemes.ignore:
            return None
        target = first_match(linear.name, self._sorted)
        if target is None and "Linear" in self._by_target:
            target = "Linear"
        return self._by_target[target] if target else None

    def in_vllm(self, linear: Linear) -> Scheme | None:
        """Return what vLLM creates for the linear.

        Raises:
            ConflictError: if vLLM refuses because what it fuses has several schemes.
        """
        if linear.role is Role.ROUTER and self._family not in _ROUTER_TAKES_PART:
            return None
        if linear.role is Role.SHARED_GATE:
            return None
        if linear.role is Role.EXPERT:
            return self._experts_in_vllm(linear)
        name = in_vllm(linear.name, self._family)
        fused = fused_name(name)
        if self._schemes.dialect == "gptq":
            return self._gptq(fused or name)
        if self._is_ignored_in_vllm(fused or name, fused is not None):
            return None
        targets = list(self._by_target)
        target = first_match(fused or name, targets)
        if target is None and fused:
            found = [first_match(part, targets) for part in fused_parts(fused)]
            target = found[0] if all(found) else None
        if target is None:
            # classes by substring; the output embedding's holds none of the usual targets
            vllm_class = "ParallelLMHead" if linear.role is Role.HEAD else "ColumnParallelLinear"
            target = next((t for t in targets if t.lower() in vllm_class.lower()), None)
        return self._by_target[target] if target else None

    def _experts_in_vllm(self, linear: Linear) -> Scheme | None:
        """Look up expert 0, as vLLM does, and take its scheme for all experts of the layer.

        Raises:
            ConflictError: if its projections differ.
        """
        block = linear.name.split(".experts.")[0]
        if self._schemes.dialect == "gptq":
            return self._gptq(f"{in_vllm(block + '.experts', self._family)}")
        found = []
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = in_vllm(f"{block}.experts.0.{projection}", self._family)
            target = None if self._matches(name) else first_match(name, list(self._by_target))
            if target is None and not self._matches(name) and "Linear" in self._by_target:
                target = "Linear"
            found.append(self._by_target[target] if target else None)
        if any(scheme != found[-1] for scheme in found):
            raise ConflictError(
                f"{in_vllm(block, self._family)}.experts.0: gate, up and down have "
                f"{', '.join(map(describe, found))}"
            )
        return found[-1]

    def _is_ignored_in_vllm(self, name: str, is_fused: bool) -> bool:
        if self._matches(name):
            return True
        parts = [self._matches(part) for part in fused_parts(name)] if is_fused else [False]
        if any(parts) and not all(parts):
            raise ConflictError(f"{name}: some of its parts are in `ignore` and some are not")
        return all(parts)

    def _gptq(self, name: str) -> Scheme | None:
        for pattern, changed in self._schemes.dynamic.items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
                return changed
        return None if self._matches(name) else self._schemes.groups[0].scheme


def transformers_experts_scheme(schemes: Schemes) -> Scheme | None:
    """Return the one scheme that transformers 5.17 applies to all experts of a model."""
    groups = schemes.groups
    named = [g for g in groups if any(t.startswith("re:") and "experts" in t for t in g.targets)]
    classes = [g for g in groups if any(not t.startswith("re:") for t in g.targets)]
    first = next(iter([*named, *classes, *groups]), None)
    return first.scheme if first else None


def first_match(name: str, targets: Iterable[str]) -> str | None:
    """Return the first target that is the name, or a pattern that matches at its start."""
    return next((target for target in targets if _is_match(name, target)), None)


class _Matcher:
    """Whether any target matches; lists of thousands of exact names are common in `ignore`."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._exact = {target for target in targets if not target.startswith("re:")}
        self._patterns = [target for target in targets if target.startswith("re:")]

    def __call__(self, name: str) -> bool:
        return name in self._exact or first_match(name, self._patterns) is not None


def _is_match(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return _compiled(target[3:]).match(name) is not None
    return name == target


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
