"""The linears of a model, the options of each, and what they take: all but the losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from moeq_plugin.core.sensitivity import LayerInteraction, SensitivityTable
from moeq_plugin.integrations.llm_compressor.allocation.options import Option, parse_options
from moeq_plugin.integrations.llm_compressor.allocation.target_linears import (
    other_bytes,
    target_linears,
)
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.models.scheme_units import unit_labels


@dataclass(frozen=True)
class Choices:
    """What there is to choose, before anything is known of losses.

    Attributes:
        names: the linears that get an option each, and their names; rows of tables.
        options: what there is for each of them; columns of tables.
        units: for each target, a label for each linear; linears of one label get one option.
        fixed_bytes: of all tensors of the checkpoint that belong to none of these linears.
    """

    names: Mapping[nn.Linear, str]
    options: tuple[Option, ...]
    units: Mapping[str, tuple[str, ...]]
    fixed_bytes: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: list[MoELayer],
        *,
        options: Iterable[str],
        targets: Iterable[str],
        ignore: Iterable[str],
        weight_observer: str | None,
    ) -> Choices:
        """Look up what a recipe says in a model.

        Args:
            model: the linearized model.
            layers: its MoE layers.
            options: names, see :func:`parse_options`.
            targets: as for quantization.
            ignore: as for quantization.
            weight_observer: the host's observer that chooses scales, ``None`` for its default.

        Raises:
            ValueError: if an option is unknown, a target matches nothing or no linear is left.
        """
        names = target_linears(model, layers, targets, ignore)
        return cls(
            names=names,
            options=tuple(parse_options(options, weight_observer)),
            units=unit_labels(list(names.values()), layers, dict(model.named_modules())),
            fixed_bytes=other_bytes(model, names),
        )

    def fits(self) -> np.ndarray:
        """Return ``[linears, options]`` bool, whether an option's groups divide the columns."""
        return np.array([[o.fits(linear) for o in self.options] for linear in self.names])

    def num_bytes(self) -> np.ndarray:
        """Return ``[linears, options]`` int64, of all tensors stored for a linear's weight."""
        return np.array([[o.num_bytes(linear) for o in self.options] for linear in self.names])

    def check_fit(self) -> None:
        """Refuse linears that no option fits.

        Raises:
            ValueError: listing the first ten.
        """
        unmatched = [
            f"  - {name} (columns={linear.weight.shape[1]})"
            for (linear, name), fits in zip(self.names.items(), self.fits(), strict=True)
            if not fits.any()
        ]
        if unmatched:
            raise ValueError(
                f"the group sizes of the options {[o.name for o in self.options]} divide the input "
                f"columns of none of these {len(unmatched)} linears. Add an option with a smaller "
                "group, such as W4A16_G32, or put them into `ignore`:\n" + "\n".join(unmatched[:10])
            )

    def table(
        self,
        loss: np.ndarray,
        domains: tuple[str, ...],
        *,
        undercovered: Iterable[str] = (),
        interactions: Mapping[str, LayerInteraction] | None = None,
    ) -> SensitivityTable:
        """Return the table that these losses make.

        Args:
            loss: ``[domains, linears, options]``, in nats per token.
            domains: names of the kinds of text.
            undercovered: names of linears that saw too few tokens to be judged by them.
            interactions: by name of the layer, where it was measured.
        """
        undercovered = set(undercovered)
        return SensitivityTable(
            rows=tuple(self.names.values()),
            options=tuple(option.name for option in self.options),
            domains=domains,
            loss=loss,
            num_bytes=self.num_bytes(),
            num_weights=np.array([linear.weight.numel() for linear in self.names]),
            units=self.units,
            fixed_bytes=self.fixed_bytes,
            undercovered=tuple(name for name in self.names.values() if name in undercovered),
            interactions=interactions or {},
        )
