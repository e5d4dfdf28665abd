"""A checkpoint's tensors sorted by the linears that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from moeq_plugin.checkpoint.architecture import Architecture, Linear, Role
from moeq_plugin.checkpoint.config import Config
from moeq_plugin.checkpoint.families import FAMILIES, architecture_of
from moeq_plugin.checkpoint.formats import stored_scheme
from moeq_plugin.checkpoint.headers import StoredTensor
from moeq_plugin.checkpoint.infer_architecture import infer_architecture
from moeq_plugin.checkpoint.lookup import Lookup
from moeq_plugin.checkpoint.open_checkpoint import Checkpoint
from moeq_plugin.checkpoint.read_schemes import read_schemes
from moeq_plugin.checkpoint.reader_names import split_tensor
from moeq_plugin.checkpoint.schemes import Scheme, Schemes
from moeq_plugin.core.names import canonical, layer_of

# the tensors that transformers fuses the experts of a layer into
FUSED_EXPERTS = ("gate_up_proj", "down_proj")
Build = Callable[[Checkpoint], Architecture]  # what says of a model what it consists of
_MAX_COMPARISONS = 5 * 10**7  # a minute or two


@dataclass(frozen=True)
class Layout:
    """A checkpoint, what its config describes, and which tensors belong to what.

    Attributes:
        checkpoint: the files.
        architecture: what is to be there.
        schemes: what the config says about quantization.
        lookup: which of them readers find for a linear.
        modules: tensors by canonical name of their module and by suffix.
        stored: the scheme that each linear present is stored in, ``None`` for 16 bit.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    schemes: Schemes
    lookup: Lookup
    modules: dict[str, dict[str, StoredTensor]]
    stored: dict[str, Scheme | None]

    def declared(self, linear: Linear) -> Scheme | None:
        """Return the scheme that the config gives to a linear by its name."""
        if linear.role is Role.ROUTER:  # in transformers no linear, so `Linear` does not mean it
            return None
        return self.lookup.by_name(linear)

    def is_fused(self, layer: int) -> bool:
        """Tell whether a layer's experts are stored as transformers holds them in memory."""
        if self.architecture.is_known:
            return f"model.layers.{layer}.mlp.experts.gate_up_proj" in self.modules
        return layer in self.stacked

    @cached_property
    def stacked(self) -> frozenset[int]:
        """Return the layers that hold a tensor with a matrix for each expert."""
        num_experts = self.architecture.num_experts
        shapes = (
            (layer_of(module), tensor.shape)
            for module, tensors in self.modules.items()
            for tensor in tensors.values()
        )
        return frozenset(
            layer
            for layer, shape in shapes
            if layer is not None and len(shape) == 3 and shape[0] == num_experts > 1
        )

    def present(self, role: Role | None = None) -> list[Linear]:
        """Return the linears that have tensors of their own."""
        linears = (self.architecture.linears[name] for name in self.stored)
        return [linear for linear in linears if role in {None, linear.role}]


def lay_out(checkpoint: Checkpoint, architecture: Architecture | None = None) -> Layout:
    """Sort the tensors of a checkpoint.

    Args:
        checkpoint: the files.
        architecture: of the model, if it is known from elsewhere than config and files.

    Raises:
        ValueError: if its config cannot be one.
    """
    config = Config(checkpoint.config)
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        module, suffix = split_tensor(canonical(name))
        modules.setdefault(module, {})[suffix] = tensor
    if architecture is None:
        is_known = config.family in FAMILIES and not config.is_part
        architecture = architecture_of(config) if is_known else infer_architecture(config, modules)
    schemes = read_schemes(checkpoint.config)
    lookup = Lookup(schemes, config.family, None if architecture.is_known else _spelled(modules))
    _check_size(lookup.num_patterns, len(architecture.linears))
    laid_out = Layout(checkpoint, architecture, schemes, lookup, modules, {})
    for linear in architecture.linears.values():
        found = modules.get(linear.name, {})
        if found.keys() - {"bias"}:
            declared = laid_out.declared(linear)
            laid_out.stored[linear.name] = stored_scheme(found, linear.shape, declared)
    return laid_out


def _spelled(modules: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, str]:
    """Return what the file calls modules, by canonical name."""
    return {m: split_tensor(next(iter(of.values())).name)[0] for m, of in modules.items()}


def _check_size(num_patterns: int, num_linears: int) -> None:
    if num_patterns * num_linears > _MAX_COMPARISONS:
        raise ValueError(
            f"config.json: {num_patterns} patterns for {num_linears} linears are more than can be "
            "compared; name the linears instead"
        )
