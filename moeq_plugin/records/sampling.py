"""The report of a sampled calibration set: is it balanced, and is it text at all?

A beam search likes to repeat itself, and a set of repetitions has second moments of low rank
everywhere, also in attention. The median share of distinct 4-grams tells: natural text has 0.9 and
more, the set that MoEQuant's authors published for Mixtral 0.02. Standard library only.
"""

from __future__ import annotations

import math
import statistics
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

_DEGENERATE = 0.2  # median share of distinct 4-grams
_NUM_SAMPLES = 5
_SAMPLE_LENGTH = 300  # characters


@dataclass(frozen=True)
class SamplingReport:
    """What a set is like.

    Attributes:
        num_sequences: how many.
        unique_sequences: how many differ.
        num_tokens: in all of them.
        perplexity: of the model on its own text, start tokens left out.
        imbalance: sigma of the whole set, the mean of ``layer_imbalance``.
        layer_imbalance: sigma of each MoE layer.
        sequence_imbalance: mean over sequences of their own sigma.
        min_load: slots of the least loaded expert of any layer.
        median_load: of all experts.
        max_load: of the most loaded expert.
        distinct_4gram: median over sequences of distinct by all 4-grams, 1 for those without any.
        compression_ratio: bytes by bytes after zlib, of the text or else of the token ids.
        starved: experts that did not reach ``min_expert_tokens``, by layer.
        samples: the beginnings of a few sequences, empty without a tokenizer.
        load: ``[layers][experts]``, slots that each expert received.
    """

    num_sequences: int
    unique_sequences: int
    num_tokens: int
    perplexity: float
    imbalance: float
    layer_imbalance: list[float]
    sequence_imbalance: float
    min_load: int
    median_load: float
    max_load: int
    distinct_4gram: float
    compression_ratio: float
    starved: dict[str, list[int]]
    samples: list[str]
    load: list[list[int]] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """Return what a user should know before calibrating with the set, a sentence each."""
        found = []
        if self.distinct_4gram < _DEGENERATE:
            found.append(
                f"the sampled text repeats itself: median share of distinct 4-grams "
                f"{self.distinct_4gram:.3f}, below {_DEGENERATE}; set no_repeat_ngram (4 or 5), "
                "or calibrate with a data set"
            )
        if self.unique_sequences < self.num_sequences:
            found.append(
                f"{self.num_sequences - self.unique_sequences} of {self.num_sequences} sequences "
                "are copies of others; raise prefix_tokens"
            )
        if self.min_load == 0:
            found.append("at least one expert received no token of the sampled set")
        if self.starved:
            short = sum(len(experts) for experts in self.starved.values())
            found.append(f"{short} experts did not reach min_expert_tokens: {self.starved}")
        return found

    def summary(self) -> str:
        """Return one line for a log."""
        return (
            f"{self.num_sequences} sequences, {self.num_tokens} tokens, perplexity "
            f"{self.perplexity:.2f}, imbalance {self.imbalance:.4f} (a sequence "
            f"{self.sequence_imbalance:.4f}), expert load {self.min_load} to {self.max_load} "
            f"(median {self.median_load:.0f}), distinct 4-grams {self.distinct_4gram:.2f}, "
            f"zlib {self.compression_ratio:.1f}"
        )


def report_on_samples(
    input_ids: Sequence[Sequence[int]],
    *,
    nll: Sequence[float],
    sequence_imbalance: Sequence[float],
    layer_imbalance: Sequence[float],
    load: Sequence[Sequence[int]],
    starved: dict[str, list[int]],
    texts: Sequence[str],
) -> SamplingReport:
    """Describe a set.

    Args:
        input_ids: token ids of each sequence; at least one.
        nll: mean negative log-probability per predicted token of each sequence.
        sequence_imbalance: sigma of each sequence.
        layer_imbalance: sigma of each layer over the whole set.
        load: ``[layers][experts]`` over the whole set.
        starved: experts without enough tokens, by layer name.
        texts: decoded sequences; may be empty.

    Raises:
        ValueError: if there is no sequence.
    """
    if not input_ids:
        raise ValueError("expected at least one sequence to report on, got none")
    loads = [slots for layer in load for slots in layer]
    lengths = [len(ids) for ids in input_ids]
    raw = "\n".join(texts).encode() or b"".join(array("I", ids).tobytes() for ids in input_ids)
    return SamplingReport(
        num_sequences=len(input_ids),
        unique_sequences=len({tuple(ids) for ids in input_ids}),
        num_tokens=sum(lengths),
        perplexity=math.exp(statistics.fmean(nll, weights=[length - 1 for length in lengths])),
        imbalance=statistics.fmean(layer_imbalance),
        layer_imbalance=list(layer_imbalance),
        sequence_imbalance=statistics.fmean(sequence_imbalance),
        min_load=min(loads),
        median_load=statistics.median(loads),
        max_load=max(loads),
        distinct_4gram=statistics.median(distinct_ngrams(ids, 4) for ids in input_ids),
        compression_ratio=len(raw) / len(zlib.compress(raw)),
        starved=dict(starved),
        samples=[text[:_SAMPLE_LENGTH] for text in texts[:_NUM_SAMPLES]],
        load=[list(layer) for layer in load],
    )


def distinct_ngrams(input_ids: Sequence[int], size: int) -> float:
    """Return the share of n-grams that are distinct, 1 if the sequence is too short for any.

    Example:
        >>> distinct_ngrams([7, 7, 7, 7, 7], 2)
        0.25
    """
    grams = list(zip(*(input_ids[start:] for start in range(size)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
