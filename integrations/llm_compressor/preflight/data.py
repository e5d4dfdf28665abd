"""Whether calibration data can be calibrated on: what batches hold, and how much of it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from torch import nn

from moeq_plugin.integrations.llm_compressor.preflight.batch_checks import (
    batches,
    check_batch,
    check_ids,
)


@dataclass(frozen=True)
class TokenCount:
    """How many tokens there are to calibrate on.

    Attributes:
        num_batches: of the data loader.
        num_tokens: that count, in all batches.
        num_cut: tokens of rows that were cut to the shortest row of their batch.
        num_padding: ids at the ends of rows that look like padding and that no mask tells of.
    """

    num_batches: int
    num_tokens: int = 0
    num_cut: int = 0
    num_padding: int = 0

    def in_words(self) -> str:
        """Return what the data are, for the record of the run."""
        cut = f", {self.num_cut} tokens cut off by the collator" if self.num_cut else ""
        tokens = f"{self.num_tokens:,} tokens in " if self.num_tokens else ""
        batches = "1 batch" if self.num_batches == 1 else f"{self.num_batches} batches"
        return f"{tokens}{batches}{cut}"

    def warn(self) -> None:
        """Say what makes less, or something else, count than was given."""
        if self.num_cut:
            logger.warning(
                f"{self.num_cut} of {self.num_cut + self.num_tokens} calibration tokens are lost: "
                "rows are cut to the shortest of their batch. Use batch_size=1, or "
                "data_collator='padding'."
            )
        if self.num_padding:
            logger.warning(
                f"{self.num_padding} of {self.num_tokens} calibration tokens look like padding and "
                "count as text, since no attention_mask says otherwise. Add that column."
            )


def check_data(calib: Any, modifier: str, *, has_experts: bool) -> None:
    """Refuse calibration data that are empty, or missing where the model cannot write its own.

    Args:
        calib: the host's data loader, or ``None``.
        modifier: name of the modifier that asks.
        has_experts: whether the model has MoE layers.

    Raises:
        ValueError: saying what to pass.
    """
    if calib is not None and len(calib) == 0:
        raise ValueError("the calibration data set is empty; expected at least one sequence")
    if calib is None and not has_experts:
        raise ValueError(
            f"{modifier} needs calibration data for a model without experts: pass dataset=... to "
            "oneshot (a datasets.Dataset with `input_ids` or `text`, a DataLoader, or the name of "
            "a data set)"
        )


def count_tokens(calib: Any, model: nn.Module) -> TokenCount:
    """Look at every batch once, before anything is calibrated, and count what is in it.

    Args:
        calib: the host's data loader.
        model: that the batches are for.

    Raises:
        ValueError: naming the rows that cannot be calibrated on, and why.
    """
    vocabulary, pad_id = _vocabulary(model), _pad_id(model)
    num_batches = num_tokens = num_cut = num_padding = 0
    # what a loader draws to shuffle is drawn again by the run: the same order, the same results
    with torch.random.fork_rng(devices=[]):
        for where, batch, longest in batches(calib):
            num_batches += 1
            check_batch(where, batch)
            ids = batch.get("input_ids")
            if ids is None:
                continue  # embeddings, which have no ids
            check_ids(where, ids, vocabulary)
            mask = batch.get("attention_mask")
            num_tokens += int(ids.numel() if mask is None else mask.bool().sum())
            num_cut += longest - ids.numel() if longest is not None else 0
            if mask is None and pad_id is not None:
                num_padding += _num_outer(ids, pad_id)
    return TokenCount(num_batches, num_tokens, num_cut, num_padding)


def _vocabulary(model: nn.Module) -> int | None:
    """Return the number of token ids that a model has an embedding for, ``None`` if unknown."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return int(embedding.weight.shape[0]) if isinstance(embedding, nn.Embedding) else None


def _pad_id(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    found = getattr(config.get_text_config(), "pad_token_id", None) if config is not None else None
    return found if isinstance(found, int) and found >= 0 else None


def _num_outer(ids: torch.Tensor, pad_id: int) -> int:
    """Return how many ids at the ends of rows are padding; one may be the end of a text."""
    is_pad = (ids == pad_id).long()
    runs = torch.stack([is_pad.cumprod(-1).sum(-1), is_pad.flip(-1).cumprod(-1).sum(-1)])
    return int(runs[runs > 1].sum().clamp(max=ids.numel()))
