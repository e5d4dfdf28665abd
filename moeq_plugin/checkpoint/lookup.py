"""Which scheme a reader finds for a module: vLLM by its own names, others by transformers' names.

The rules are those of vLLM 0.32 and 0.33, compressed-tensors 0.19 and transformers 5.17.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.reader_names import fused_name, fused_parts, in_file, in_vllm
from moeq_plugin.checkpoint.schemes import Scheme, Schemes, describe
from moeq_plugin.checkpoint.targets import Targets

# these classes of vLLM take part in quantization; the others never do
_ROUTER_TAKES_PART = ("qwen3_moe",)
_LINEAR_IN_VLLM, _HEAD_IN_VLLM = "ColumnParallelLinear", "ParallelLMHead"


class ConflictError(ValueError):
    """The reader stops: what it fuses would have two schemes."""


class Lookup:
    """Scheme lookups of one checkpoint.

    Args:
        schemes: what its config says.
        family: the config's model type, which decides about names.
        spelled: what the file calls modules, by canonical name; for families that we do not know,
            whose names servers take as they are.
    """

    def __init__(
        self, schemes: Schemes, family: str, spelled: Mapping[str, str] | None = None
    ) -> None:
        self._schemes, self._family, self._spelled = schemes, family, spelled or {}
        self._by_target = {t: group.scheme for group in schemes.groups for t in group.targets}
        # exact names, then patterns in alphabetical order, then classes
        by_kind = sorted(self._by_target, key=lambda target: ("re:" in target, target))
        self._sorted, self._targets = Targets(by_kind), Targets(self._by_target)
        self._ignore = Targets(schemes.ignore)
        self._changed: dict[str, Scheme | None] = {}
        for pattern, scheme in schemes.dynamic.items():
            unsigned = pattern.removeprefix("-:").removeprefix("+:")
            self._changed.setdefault(f"re:{unsigned}", scheme)
        self._dynamic = Targets(self._changed)
        # of a class by a part of its name; the output embedding's holds none of the usual targets
        self._of_class = {
            of: next((t for t in self._by_target if t.lower() in of.lower()), None)
            for of in (_LINEAR_IN_VLLM, _HEAD_IN_VLLM)
        }
        self._of_experts = cache(self._scheme_of_experts)  # asked for by every expert

    @property
    def num_patterns(self) -> int:
        """Return how many patterns a name may have to be compared with."""
        return self._targets.num_patterns + self._ignore.num_patterns + self._dynamic.num_patterns

    def by_name(self, linear: Linear) -> Scheme | None:
        """Return what compressed-tensors attaches to the linear of the transformers model."""
        if self._schemes.dialect == "gptq":
            return self._gptq(linear.name)
        stored = self._spelled.get(linear.name, in_file(linear.name, self._family))
        if "Linear" in self._schemes.ignore or linear.name in self._ignore:
            return None
        if stored != linear.name and stored in self._ignore:
            return None
        target = self._sorted.first(linear.name)
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
            return self._experts_in_vllm(linear.name.split(".experts.")[0])
        name = self._in_vllm(linear.name)
        fused = fused_name(name)
        if self._schemes.dialect == "gptq":
            return self._gptq(fused or name)
        if self._is_ignored_in_vllm(fused or name, fused is not None):
            return None
        target = self._targets.first(fused or name)
        if target is None and fused:
            found = [self._targets.first(part) for part in fused_parts(fused)]
            target = found[0] if all(found) else None
        if target is None:
            is_head = linear.role is Role.HEAD
            target = self._of_class[_HEAD_IN_VLLM if is_head else _LINEAR_IN_VLLM]
        return self._by_target[target] if target else None

    def _in_vllm(self, name: str) -> str:
        return self._spelled.get(name) or in_vllm(name, self._family)

    def _experts_in_vllm(self, block: str) -> Scheme | None:
        """Look up expert 0, as vLLM does, and take its scheme for all experts of the layer.

        Raises:
            ConflictError: if its projections differ.
        """
        if self._schemes.dialect == "gptq":
            return self._gptq(in_vllm(f"{block}.experts", self._family))
        found = self._of_experts(block)
        if any(scheme != found[-1] for scheme in found):
            raise ConflictError(
                f"{in_vllm(block, self._family)}.experts.0: gate, up and down have "
                f"{', '.join(map(describe, found))}"
            )
        return found[-1]

    def _scheme_of_experts(self, block: str) -> list[Scheme | None]:
        found: list[Scheme | None] = []
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = self._in_vllm(f"{block}.experts.0.{projection}")
            is_ignored = name in self._ignore
            target = None if is_ignored else self._targets.first(name)
            if target is None and not is_ignored and "Linear" in self._by_target:
                target = "Linear"
            found.append(self._by_target[target] if target else None)
        return found

    def _is_ignored_in_vllm(self, name: str, is_fused: bool) -> bool:
        if name in self._ignore:
            return True
        parts = [part in self._ignore for part in fused_parts(name)] if is_fused else [False]
        if any(parts) and not all(parts):
            raise ConflictError(f"{name}: some of its parts are in `ignore` and some are not")
        return all(parts)

    def _gptq(self, name: str) -> Scheme | None:
        changed = self._dynamic.first(name)
        if changed is not None:
            return self._changed[changed]
        return None if name in self._ignore else self._schemes.groups[0].scheme


def transformers_experts_scheme(schemes: Schemes) -> Scheme | None:
    """Return the one scheme that transformers 5.17 applies to all experts of a model."""
    groups = schemes.groups
    named = [g for g in groups if any(t.startswith("re:") and "experts" in t for t in g.targets)]
    classes = [g for g in groups if any(not t.startswith("re:") for t in g.targets)]
    first = next(iter([*named, *classes, *groups]), None)
    return first.scheme if first else None
