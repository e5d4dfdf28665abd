"""What every weight loses at every option, and what it costs: the input of bit allocation.

Rows are linears, options are schemes. Losses of rows add up to a model's loss as long as errors
are small and do not conspire; :mod:`moeq_plugin.core.correlation` measures how far they do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA_VERSION = 1


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
    """

    rows: tuple[str, ...]
    options: tuple[str, ...]
    domains: tuple[str, ...]
    loss: np.ndarray
    num_bytes: np.ndarray
    num_weights: np.ndarray
    units: Mapping[str, tuple[str, ...]]
    fixed_bytes: int = 0

    def __post_init__(self) -> None:
        shape = (len(self.domains), len(self.rows), len(self.options))
        if not all(shape):
            raise ValueError(f"expected domains, rows and options, got {shape} of them")
        expected = {"loss": shape, "num_bytes": shape[1:], "num_weights": shape[1:2]}
        found = {name: getattr(self, name).shape for name in expected}
        if found != expected:
            raise ValueError(f"arrays must have the shapes {expected}, got {found}")
        bad = [self.rows[row] for row in np.flatnonzero((~(self.loss >= 0)).any((0, 2)))]
        if bad:
            raise ValueError(f"losses must be >= 0 and not NaN; they are not for {bad[:10]}")
        short = {t: len(labels) for t, labels in self.units.items() if len(labels) != shape[1]}
        if short:
            raise ValueError(f"units must label {shape[1]} rows, got {short}")

    def save(self, path: str | Path) -> None:
        """Write JSON; infinite losses become null."""
        content = {
            "schema_version": SCHEMA_VERSION,
            **vars(self),
            "loss": np.where(np.isfinite(self.loss), self.loss, None).tolist(),
            "num_bytes": self.num_bytes.tolist(),
            "num_weights": self.num_weights.tolist(),
        }
        Path(path).write_text(json.dumps(content, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SensitivityTable:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not such a table.
        """
        try:
            content: dict[str, Any] = json.loads(Path(path).read_text())
            version = content.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise ValueError(f"schema version {version}, expected {SCHEMA_VERSION}")
            loss = np.array(content["loss"], dtype=np.float64)  # null becomes NaN
            content["loss"] = np.where(np.isnan(loss), np.inf, loss)
            for name in ("num_bytes", "num_weights"):
                content[name] = np.array(content[name], dtype=np.int64)
            for name in ("rows", "options", "domains"):
                content[name] = tuple(content[name])
            content["units"] = {t: tuple(labels) for t, labels in content["units"].items()}
            return cls(**content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a sensitivity table: {error}") from error
