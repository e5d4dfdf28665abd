"""Quantize a loaded model by running llm-compressor: common to all entry points.

Those of transformers and of Optimum both go through ``oneshot`` and :class:`MoEQuantModifier`, so
that the same data and seed give the same codes through either.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset
from llmcompressor import oneshot
from loguru import logger
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moeq_plugin.files.data_source import DataSource
from moeq_plugin.files.datasets import read_dataset
from moeq_plugin.integrations.hf.coverage import Coverage, check_coverage
from moeq_plugin.integrations.llm_compressor import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.linearization import linearize

NUM_CALIBRATION_SAMPLES = 512  # the host's defaults
MAX_SEQ_LENGTH = 2048

Calibration: TypeAlias = (
    Dataset | str | Path | Sequence[Path] | Sequence[str] | Sequence[Mapping[str, Any]] | None
)


def quantize(
    model: PreTrainedModel,
    modifier: MoEQuantModifier,
    *,
    dataset: Calibration = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    num_calibration_samples: int | None = NUM_CALIBRATION_SAMPLES,
    max_seq_length: int | None = MAX_SEQ_LENGTH,
) -> Coverage:
    """Quantize a model in place and log how much of it was reached.

    Args:
        model: loaded in 16 or 32 bit; its experts are made linears.
        modifier: what to do.
        dataset: as for ``oneshot``, a path or several of what :func:`moeq_plugin.read_dataset`
            reads, a list of texts, or a list of tokenized sequences. ``None`` lets the model write
            its own.
        tokenizer: ``None`` means the one beside the model.
        num_calibration_samples: sequences used.
        max_seq_length: tokens of each.

    Raises:
        ValueError: if a part of the blocks would stay in 16 bit without being ignored by name.
    """
    linearize(model)
    coverage = check_coverage(model, modifier)
    data = as_dataset(dataset)
    if isinstance(data, tuple):
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(
                tokenizer or model.name_or_path, trust_remote_code=False
            )
        read = read_dataset(
            data,
            num_calibration_samples or NUM_CALIBRATION_SAMPLES,
            tokenizer=tokenizer,
            max_seq_length=max_seq_length or MAX_SEQ_LENGTH,
        )
        logger.info(f"calibrating on {read.summary}")
        data = read.dataset
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=modifier,
        dataset=data,
        # its arguments class allows None, for all sequences; only the function's signature does not
        num_calibration_samples=num_calibration_samples,  # type: ignore[arg-type]
        max_seq_length=max_seq_length,
        shuffle_calibration_samples=False,  # sums in one order give the same codes every time
    )
    logger.info(str(coverage))
    return coverage


def as_dataset(data: Calibration) -> Dataset | str | tuple[Path, ...] | None:
    """Return what ``oneshot`` takes for the forms that Optimum takes, and files as they are.

    Raises:
        ValueError: if it is a list of something else.
    """
    if isinstance(data, Path) or (isinstance(data, str) and _is_file(data)):
        return (Path(data),)
    if data is None or isinstance(data, str | Dataset):
        return data
    samples = list(data)
    paths = tuple(sample for sample in samples if isinstance(sample, Path))
    if paths and len(paths) == len(samples):
        return paths
    if samples and all(isinstance(sample, str) for sample in samples):
        return Dataset.from_dict({"text": samples})
    if samples and all(isinstance(s, Mapping) and "input_ids" in s for s in samples):
        return Dataset.from_list([_plain(sample) for sample in samples])
    raise ValueError(
        "dataset must be a data set, its name, paths, a list of texts or a list of mappings with "
        f"input_ids, got {type(data).__name__} of {sorted({type(s).__name__ for s in samples})}"
    )


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse names that nobody knows, instead of passing them over.

    Args:
        given: keys of a configuration.
        known: those that mean something.
        what: the configuration.

    Raises:
        ValueError: listing each with the nearest known ones.
    """
    known = sorted(known)
    lines = []
    for name in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(name, known, n=2)
        lines.append(f"  - {name!r}" + (f", did you mean {near}?" if near else ""))
    if lines:
        raise ValueError(f"{what} has unknown keys:\n" + "\n".join(lines) + f"\nknown: {known}")


def _is_file(name: str) -> bool:
    """Tell a path from the name of a data set that llm-compressor knows."""
    return "\0" not in name and Path(DataSource.parse(name).name).exists()


def _plain(sample: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return one sequence's columns as lists, from lists or tensors of one row."""
    columns = {k: v.tolist() if hasattr(v, "tolist") else list(v) for k, v in sample.items()}
    return {k: v[0] if v and isinstance(v[0], list) else v for k, v in columns.items()}
