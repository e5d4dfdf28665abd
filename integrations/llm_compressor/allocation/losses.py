"""The losses of all linears at every option, as they come in layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from loguru import logger
from torch import nn

from moeq_plugin.integrations.llm_compressor.allocation.choices import Choices


class MeasuredLosses:
    """Losses by linear.

    Args:
        choices: the linears and their options.
        num_domains: on how many kinds of text each is judged.

    Attributes:
        by_name: ``[domains, options]`` float64 of the linears judged so far, ``inf`` where an
            option does not fit.
    """

    def __init__(self, choices: Choices, num_domains: int) -> None:
        self.by_name: dict[str, np.ndarray] = {}
        self._choices, self._num_domains = choices, num_domains

    def expect(self, linears: Iterable[nn.Linear]) -> None:
        """Make room for linears that are about to be judged."""
        shape = (self._num_domains, len(self._choices.options))
        for linear in linears:
            self.by_name[self._choices.names[linear]] = np.full(shape, np.inf)

    def put(self, linear: nn.Linear, option: int, losses: float | Sequence[float]) -> None:
        """Note what a linear loses.

        Args:
            linear: one that is expected.
            option: index of the option.
            losses: one per domain, or one for all.
        """
        self.by_name[self._choices.names[linear]][:, option] = losses

    def pending(self) -> list[str]:
        """Return the names of the linears that nothing is known of yet."""
        return [name for name in self._choices.names.values() if name not in self.by_name]

    def complete(self) -> np.ndarray:
        """Return ``[domains, linears, options]``.

        Linears that no batch has called cannot be judged: they keep the fitting option with the
        most bytes, at no loss.
        """
        unseen = self.pending()
        if unseen:
            logger.warning(
                f"{len(unseen)} linears were never called while calibrating and keep the option "
                f"with the most bytes: {', '.join(unseen[:5])}"
            )
        fits, num_bytes = self._choices.fits(), self._choices.num_bytes()
        # infinity for all other options, so that no budget can take these bytes away
        largest = np.where(fits, num_bytes, 0).max(1, keepdims=True)
        keep = np.where(fits & (num_bytes == largest), 0.0, np.inf)
        losses = [
            self.by_name.get(name, np.broadcast_to(of_row, (self._num_domains, len(of_row))))
            for name, of_row in zip(self._choices.names.values(), keep, strict=True)
        ]
        return np.stack(losses, axis=1)
