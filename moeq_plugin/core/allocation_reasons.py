"""Say why a unit got its option: what the next smaller and the next larger one would change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np


def reasons_for(
    options: Sequence[str],
    loss: np.ndarray,
    num_bytes: np.ndarray,
    choice: np.ndarray,
    price: float | None,
) -> Iterator[str]:
    """Yield a sentence for each unit.

    Args:
        options: their names.
        loss: ``[units, options]`` float64, in nats per token; ``inf`` forbids an option.
        num_bytes: ``[units, options]`` int64.
        choice: ``[units]`` int64, the option of each unit.
        price: nats per token that the next byte would save; 0 where the budget does not bind,
            ``None`` if it is not known.
    """
    for chosen, of_loss, of_bytes in zip(
        choice.tolist(), loss.tolist(), num_bytes.tolist(), strict=True
    ):
        changes = [
            _change(
                options[other],
                of_bytes[other] - of_bytes[chosen],
                of_loss[other] - of_loss[chosen],
                price,
            )
            for other in _neighbours(of_loss, of_bytes, chosen)
        ]
        text = "; ".join(changes) or "no other option is both allowed and a trade"
        unbound = "; the budget does not bind" if price == 0 else ""
        yield f"{options[chosen]}: {text}{unbound}."


def _neighbours(loss: list[float], num_bytes: list[int], chosen: int) -> list[int]:
    """Return the next smaller option and the next larger one that loses less, where they exist."""
    options = range(len(loss))
    smaller = [o for o in options if num_bytes[o] < num_bytes[chosen] and loss[o] < math.inf]
    larger = [o for o in options if num_bytes[o] > num_bytes[chosen] and loss[o] < loss[chosen]]
    found = []
    if smaller:
        found.append(min(smaller, key=lambda o: (-num_bytes[o], loss[o])))
    if larger:
        found.append(min(larger, key=lambda o: (num_bytes[o], loss[o])))
    return found


def _change(option: str, extra_bytes: int, extra_loss: float, price: float | None) -> str:
    verb, bytes_ = ("take", extra_bytes) if extra_bytes > 0 else ("save", -extra_bytes)
    effect = "cost" if extra_loss >= 0 else "save"
    text = f"{option} would {verb} {bytes_ / 1e6:.3g} MB and {effect} {abs(extra_loss):.3g} nats"
    if price:
        text += f", {abs(extra_loss) / (price * bytes_):.3g} times what those bytes save elsewhere"
    return text
