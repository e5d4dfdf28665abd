"""From guarded second moments to what each input column of each tensor counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from moeq_plugin.integrations.llama_cpp.conversion import Conversion, parts_of
from moeq_plugin.integrations.llama_cpp.matrix_file import Importance
from moeq_plugin.integrations.llm_compressor.calibration.guard import guard
from moeq_plugin.integrations.llm_compressor.calibration.observations import Calibration
from moeq_plugin.records.run import Basis

# Of a row's mean: what a column counts at least. Some of llama.cpp's types divide by what the
# columns of a block count together, and a block of columns that are always zero must not be 0 / 0.
_FLOOR = 1e-6
_AS_IT_IS = Conversion()


class ColumnImportance:
    """Collects what columns count, layer by layer.

    Args:
        tensors: module name to llama.cpp's name of the tensor.
        min_effective_tokens: an expert with fewer borrows from its layer.
        shrinkage: as for quantization.
        conversion: what the converter does to inputs.

    Attributes:
        borrowed: modules that did not have enough tokens of their own.
    """

    def __init__(
        self,
        tensors: Mapping[str, str],
        *,
        min_effective_tokens: float,
        shrinkage: float,
        conversion: Conversion = _AS_IT_IS,
    ) -> None:
        self.borrowed: set[str] = set()
        self._tensors, self._conversion = tensors, conversion
        self._keys: dict[str, Importance] = {}  # by tensor
        self._min_effective_tokens, self._shrinkage = min_effective_tokens, shrinkage
        self._rows: dict[str, tuple[torch.Tensor, float]] = {}  # by module name

    def add(self, calibration: Calibration, names: Mapping[nn.Module, str]) -> None:
        """Keep what a layer's linears rest on.

        Args:
            calibration: what was observed of the layer.
            names: of the linears.
        """
        for observation in calibration.observations.values():
            hessian, weight_sum, basis = guard(
                observation,
                calibration,
                min_effective_tokens=self._min_effective_tokens,
                shrinkage=self._shrinkage,
            )
            row = column_mean_squares(hessian, weight_sum)
            tokens = max(1.0, round(observation.moments.effective_tokens))
            for linear in observation.linears:
                name = names[linear]
                order = self._conversion.orders.get(name)
                self._rows[name] = row if order is None else row[order.to(row.device)], tokens
                queries = self._conversion.queries.get(name)
                if queries is not None:
                    squares = queries.mean_squares(linear.weight, hessian, weight_sum)
                    rows = torch.stack([floored(head) for head in squares])
                    self._keys[queries.keys] = _importance(rows, [tokens] * len(rows))
                if basis in {Basis.SHRUNK, Basis.LAYER, Basis.NONE}:
                    self.borrowed.add(name)

    def tensors(self) -> dict[str, Importance]:
        """Return what columns count, by tensor, experts in their order.

        Raises:
            ValueError: naming linears that no batch has called.
        """
        unseen = self._tensors.keys() - self._rows.keys()
        if unseen:
            some = ", ".join(sorted(unseen)[:3])
            raise ValueError(
                f"{len(unseen)} linears were never called while calibrating, such as {some}: "
                "there is nothing to say what their columns count"
            )
        members: dict[str, list[str]] = {}
        for module, tensor in self._tensors.items():  # in the order of the model: of the experts
            for part in (tensor, *parts_of(module, tensor)):
                members.setdefault(part, []).append(module)
        heads = {of.values: of.num_heads for of in self._conversion.queries.values()}
        found = {}
        for tensor, modules in members.items():
            seen = [self._rows[module] for module in modules] * heads.get(tensor, 1)
            rows, tokens = zip(*seen, strict=True)
            found[tensor] = _importance(torch.stack(rows), tokens)
        return found | self._keys


def _importance(rows: torch.Tensor, tokens: Sequence[float]) -> Importance:
    return Importance(rows.cpu().numpy(), np.array(tokens, dtype=np.float32))


def column_mean_squares(hessian: torch.Tensor, weight_sum: float) -> torch.Tensor:
    """Return ``[in]`` float32 mean squares of the inputs, none of them zero.

    Args:
        hessian: ``[in, in]``, twice the weighted sum of outer products of the inputs.
        weight_sum: of the weights.

    Example:
        >>> column_mean_squares(torch.diag(torch.tensor([4.0, 2.0])), 2.0)
        tensor([1.0000, 0.5000])
        >>> column_mean_squares(torch.zeros(2, 2), 0.0)
        tensor([1., 1.])
    """
    return floored(hessian.diagonal().float() / (2 * weight_sum or 1))


def floored(squares: torch.Tensor) -> torch.Tensor:
    """Return ``[in]`` mean squares with none zero, or all of them 1 where all are."""
    mean = squares.mean()
    return squares.clamp(min=_FLOOR * mean) if mean > 0 else torch.ones_like(squares)
