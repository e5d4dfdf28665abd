"""The batches of a data loader, each with where it is from, and what cannot be calibrated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from llmcompressor.datasets.utils import DataCollatorWithTruncation

_LISTED = 5


def batches(calib: Any) -> Iterator[tuple[str, Any, int | None]]:
    """Yield where each batch is from, the batch, and how many tokens its rows had uncut.

    Raises:
        ValueError: naming a row without tokens.
    """
    collate, sampler = getattr(calib, "collate_fn", None), getattr(calib, "batch_sampler", None)
    if sampler is None or not isinstance(collate, DataCollatorWithTruncation):
        yield from ((f"batch {index}", batch, None) for index, batch in enumerate(calib))
        return
    longest = collate.max_seq_length
    for rows in sampler:
        features = [dict(calib.dataset[row]) for row in rows]
        lengths = [len(feature.get("input_ids") or ()) for feature in features]
        listed = ", ".join(map(str, rows[:_LISTED]))
        where = f"row {listed} of the calibration data"
        if not all(lengths):
            empty = rows[lengths.index(0)]
            raise ValueError(
                f"row {empty} of the calibration data has no tokens: its text is empty. Leave such "
                "rows out, such as with dataset.filter"
            )
        uncut = sum(length if longest is None else min(length, longest) for length in lengths)
        yield where, collate(features), uncut


def check_batch(where: str, batch: object) -> None:
    """Refuse what is no mapping, holds nothing, or holds NaN or infinity.

    Args:
        where: the batch is from.
        batch: of the loader.

    Raises:
        ValueError: naming where it is from.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{where} is a {type(batch).__name__}, expected a dict of tensors with `input_ids`. "
            "Give the DataLoader a collate_fn that makes one."
        )
    for name, tensor in batch.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if not tensor.numel():
            raise ValueError(f"{where} has no tokens: `{name}` is empty. Leave it out.")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where} has NaN or infinity in `{name}`")


def check_ids(where: str, ids: torch.Tensor, vocabulary: int | None) -> None:
    """Refuse ids that the model has no embedding for.

    Args:
        where: the ids are from.
        ids: of tokens.
        vocabulary: number of ids that the model knows, ``None`` if unknown.

    Raises:
        ValueError: naming one of them.
    """
    if ids.is_floating_point():
        raise ValueError(f"{where} has `input_ids` of {ids.dtype}, expected integers")
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or (vocabulary is not None and largest >= vocabulary):
        wrong = smallest if smallest < 0 else largest
        raise ValueError(
            f"{where} has the token id {wrong}, which the model does not have: its ids go from 0 "
            f"to {'its last' if vocabulary is None else vocabulary - 1}. Was another tokenizer "
            "used?"
        )
