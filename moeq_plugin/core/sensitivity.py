"""What every weight loses at every option, and what it costs: the input of bit allocation.

Rows are linears, options are schemes. Losses of rows add up to a model's loss as long as errors
are small and do not conspire; :mod:`moeq_plugin.core.correlation` measures how far they do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeq_plugin.untrusted.broken import BROKEN, sentence
from moeq_plugin.untrusted.reading import MAX_LIST_BYTES, read_text

SCHEMA_VERSION = 1


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


@dataclass(frozen=True)
class LayerInteraction:
    """How far the losses of a layer's experts fail to add up.

    Attributes:
        eigenvalue: see :class:`moeq_plugin.core.correlation.Certificate`; 1 where they add up.
        factor: no choice is better than the additive optimum by more; ``None`` without bound.
        coactivation: ``[experts][experts]``, the share of tokens routed to both.
    """

    eigenvalue: float
    factor: float | None
    coactivation: list[list[float]]


@dataclass(frozen=True)
class SensitivityTable:
    """Loss and bytes of every linear at every option.

    Attributes:
        rows: names of the linears.
        options: names of the options.
        domains: names of the kinds of text that losses were measured on, at least one.
        loss: ``[domains, rows, options]`` float64, in nats per token; ``inf`` where a row cannot
            have an option.
        num_bytes: ``[rows, options]`` int64, of all tensors that a checkpoint stores for the row.
        num_weights: ``[rows]`` int64.
        units: for each target, ``[rows]`` labels; rows of one label get one option.
        fixed_bytes: of all tensors of the checkpoint that belong to no row.
        undercovered: rows that saw too few tokens to be judged by them.
        interactions: layer name to how its experts' errors interact, where it was measured.
    """

    rows: tuple[str, ...]
    options: tuple[str, ...]
    domains: tuple[str, ...]
    loss: np.ndarray
    num_bytes: np.ndarray
    num_weights: np.ndarray
    units: Mapping[str, tuple[str, ...]]
    fixed_bytes: int = 0
    undercovered: tuple[str, ...] = ()
    interactions: Mapping[str, LayerInteraction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.domains), len(self.rows), len(self.options))
        if not all(shape):
            raise ValueError(f"expected domains, rows and options, got {shape} of them")
        expected = {"loss": shape, "num_bytes": shape[1:], "num_weights": shape[1:2]}
        found = {name: getattr(self, name).shape for name in expected}
        if found != expected:
            raise ValueError(f"arrays must have the shapes {expected}, got {found}")
        if len(set(self.rows)) < len(self.rows):
            raise ValueError("every row needs a name of its own")
        bad = [self.rows[row] for row in np.flatnonzero((~(self.loss >= 0)).any((0, 2)))]
        if bad:
            raise ValueError(f"losses must be >= 0 and not NaN; they are not for {bad[:10]}")
        short = {t: len(labels) for t, labels in self.units.items() if len(labels) != shape[1]}
        if short:
            raise ValueError(f"units must label {shape[1]} rows, got {short}")

    def floored(self) -> SensitivityTable:
        """Return the table in which no undercovered row may have its smallest option.

        Where a row's fate is its own, few tokens are little evidence that it can do with little.
        """
        loss = self.loss.copy()
        for row, name in enumerate(self.rows):
            if name in self.undercovered:
                allowed = np.isfinite(loss[:, row]).all(0)
                sizes = np.unique(self.num_bytes[row, allowed])
                if len(sizes) > 1:
                    loss[:, row, self.num_bytes[row] == sizes[0]] = np.inf
        return replace(self, loss=loss)

    def save(self, path: str | Path) -> None:
        """Write JSON; infinite losses become null."""
        loss = self.loss.astype(object)
        loss[~np.isfinite(self.loss)] = None
        content = {
            "schema_version": SCHEMA_VERSION,
            **vars(self),
            "loss": loss.tolist(),
            "num_bytes": self.num_bytes.tolist(),
            "num_weights": self.num_weights.tolist(),
            "interactions": {name: vars(found) for name, found in self.interactions.items()},
        }
        Path(path).write_text(json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SensitivityTable:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not such a table.
        """
        try:
            text = read_text(Path(path), MAX_LIST_BYTES)
            content: dict[str, Any] = json.loads(text, parse_constant=_refuse)
            version = content.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise ValueError(f"schema version {ascii(version)}, expected {SCHEMA_VERSION}")
            loss = np.array(content["loss"], dtype=np.float64)  # null becomes NaN
            content["loss"] = np.where(np.isnan(loss), np.inf, loss)
            for name in ("num_bytes", "num_weights"):
                content[name] = np.array(content[name], dtype=np.int64)
            for name in ("rows", "options", "domains", "undercovered"):
                content[name] = tuple(content[name])
            content["units"] = {t: tuple(labels) for t, labels in content["units"].items()}
            found = content["interactions"]
            content["interactions"] = {name: LayerInteraction(**of) for name, of in found.items()}
            return cls(**content)
        except BROKEN as error:
            raise ValueError(f"{path} is not a sensitivity table: {sentence(error)}") from error


def quadratic_losses(
    difference: torch.Tensor, second_moment: torch.Tensor, row_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what each output adds to ``sum_i g_i E[((difference @ x)_i)^2] / 2``.

    With ``g_i`` the mean squared gradient of the log-likelihood at output ``i`` this is the
    second-order change of the model's output distribution in nats (a diagonal Fisher matrix);
    with ``g_i = 1`` it is half the squared error of the output.

    Args:
        difference: ``[out, in]``, quantized minus original weight.
        second_moment: ``[in, in]``, ``E[x x^T]``.
        row_weights: ``[out]``, the ``g_i``; ``None`` means 1.

    Returns:
        ``[out]`` float64, never negative.

    Example:
        >>> quadratic_losses(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([4.0]))
        tensor([10.], dtype=torch.float64)
    """
    # the moments are positive semidefinite, their float32 sums only nearly so
    losses = ((difference @ second_moment) * difference).sum(1, dtype=torch.float64).clamp(min=0)
    return losses / 2 if row_weights is None else losses * row_weights.to(losses) / 2


def smoothed_shares(weights: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """Return what each expert of a layer receives per token, with one pseudo-token for each.

    That an expert was not used in a sample is no evidence that it never will be: shares are the
    posterior mean of a Dirichlet prior of one token of mean weight per expert. They add up to
    what the layer as a whole received per token.

    Args:
        weights: ``[experts]`` sums over tokens of an expert's (squared) combine weight.
        num_tokens: that the layer saw; without tokens all shares are 0.

    Example:
        >>> smoothed_shares(torch.tensor([6.0, 2.0, 0.0, 0.0]), 8)
        tensor([0.5833, 0.2500, 0.0833, 0.0833])
    """
    if num_tokens == 0:
        return torch.zeros_like(weights)
    return (weights + weights.sum() / num_tokens) / (num_tokens + len(weights))
