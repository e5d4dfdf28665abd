"""A calibration set that the model writes itself, as a data set for ``oneshot``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.distributed import is_source_process
from datasets import Dataset
from loguru import logger

from moeq_plugin.core.sampling import EBSSConfig, SampledSequence, expert_imbalance
from moeq_plugin.files.sampled_set import SampledSetFile
from moeq_plugin.integrations.llm_compressor.self_sampling.set_writer import (
    SetWriter,
    TokenProgress,
)
from moeq_plugin.models.self_sampling import SelfSampler
from moeq_plugin.records.sampling import SamplingReport, report_on_samples

_LIBRARIES = ("moeq-plugin", "torch", "transformers", "datasets")


@dataclass(frozen=True)
class SampledSet:
    """A sampled calibration set.

    Attributes:
        dataset: columns ``input_ids``, ``nll`` and ``imbalance``.
        report: what the set is like.
    """

    dataset: Dataset
    report: SamplingReport


def ebss_dataset(
    model: Any, tokenizer: Any = None, config: EBSSConfig | None = None, **options: Any
) -> Dataset:
    """Return only the data set of :func:`sample_set`, whose further arguments are ``options``."""
    return sample_set(model, tokenizer, config, **options).dataset


def sample_set(
    model: Any,
    tokenizer: Any = None,
    config: EBSSConfig | None = None,
    *,
    prompts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    path: str | Path | None = None,
    max_cached_tokens: int = 2**16,
) -> SampledSet:
    """Let ``model`` write its own calibration set, with evenly loaded experts (EBSS).

    arXiv:2505.03804, Section 4.2. Logs the report and its warnings. An interrupted call with
    ``path`` is continued by the same call.

    Args:
        model: a causal language model of transformers with MoE layers.
        tokenizer: names the special tokens, decodes samples for the report and encodes prompts.
            ``None`` takes the special tokens from the model's configuration.
        config: what to sample; ``None`` for the defaults.
        prompts: texts or token ids to start from, taken in turn, such as the first words of
            documents of the domains that matter. ``None`` for one random token each.
        path: JSON lines to write while sampling, and to continue.
        max_cached_tokens: tokens, over all branches, that the cache may hold at a time; lower it
            if memory runs out. Has no influence on the result.

    Returns:
        The data set, in the order of its sequences, and the report.

    Raises:
        ValueError: if prompts are texts and there is no tokenizer.
        KeyboardInterrupt: with ``path``, finished sequences are in the file.
    """
    config = config or EBSSConfig()
    starts = _token_ids(prompts, tokenizer)
    file = SampledSetFile(Path(path)) if path is not None and is_source_process() else None
    special, end = _special_ids(model, tokenizer)
    progress = TokenProgress(config.num_sequences * config.seq_len)
    writer = SetWriter(file)
    sampler = SelfSampler(
        model,
        config,
        special_ids=special,
        end_id=end,
        prompts=starts,
        max_cached_tokens=max_cached_tokens,
        on_finished=writer.write,
        on_step=progress.advance,
    )
    # one rank reads and writes the file; what it knows reaches the others in sampler.run()
    with nullcontext() if file is None else file.held():
        if file is not None:
            known = file.begin(_manifest(model, config, starts))
            sampler.finished = {sequence.index: sequence for sequence in known}
            progress.advance(sum(len(sequence.input_ids) for sequence in known))
        try:
            sequences = sampler.run()
        except KeyboardInterrupt:
            kept = f", kept in {file.path}" if file else " and lost: pass path= to keep them"
            logger.warning(f"interrupted; {len(sampler.finished)} sequences are finished{kept}")
            raise
        finally:
            progress.close()
        writer.complete()
    return _as_set(sequences, sampler.starved, tokenizer)


def _as_set(
    sequences: list[SampledSequence],
    starved: dict[str, list[int]],
    tokenizer: Any,
) -> SampledSet:
    ids = [sequence.input_ids for sequence in sequences]
    nll = [sequence.nll for sequence in sequences]
    imbalance = [sequence.imbalance for sequence in sequences]
    load = torch.tensor([sequence.load for sequence in sequences]).sum(0)  # [layers, experts]
    num_tokens = sum(len(row) for row in ids)
    report = report_on_samples(
        ids,
        nll=nll,
        sequence_imbalance=imbalance,
        layer_imbalance=expert_imbalance(load[:, None], num_tokens).tolist(),
        load=load.tolist(),
        starved=starved,
        texts=[] if tokenizer is None else tokenizer.batch_decode(ids),
    )
    logger.info(f"EBSS: {report.summary()}")
    for warning in report.warnings:
        logger.warning(f"EBSS: {warning}")
    columns = {"input_ids": ids, "nll": nll, "imbalance": imbalance}
    return SampledSet(Dataset.from_dict(columns), report)


def _token_ids(
    prompts: Sequence[str] | Sequence[Sequence[int]] | None, tokenizer: Any
) -> list[list[int]] | None:
    if prompts is None:
        return None
    if any(isinstance(prompt, str) for prompt in prompts):
        if tokenizer is None:
            raise ValueError("prompts are texts, so a tokenizer is needed; or pass token ids")
        return [list(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    return [[int(token) for token in prompt] for prompt in prompts]


def _special_ids(model: Any, tokenizer: Any) -> tuple[list[int], int | None]:
    """Return ids that text does not consist of, and the end-of-sequence token."""
    vocabulary = model.config.get_text_config().vocab_size
    if tokenizer is not None:
        padding_rows = range(len(tokenizer), vocabulary)  # of the embedding: no token has them
        return sorted({*tokenizer.all_special_ids, *padding_rows}), tokenizer.eos_token_id
    found: dict[str, list[int]] = {}
    for settings in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(settings, name, None)
            ids = value if isinstance(value, list) else [value]
            found.setdefault(name, []).extend(i for i in ids if i is not None)
    special = {i for ids in found.values() for i in ids if 0 <= i < vocabulary}
    return sorted(special), next(iter(found["eos_token_id"]), None)


def _manifest(model: Any, config: EBSSConfig, prompts: list[list[int]] | None) -> dict[str, Any]:
    settings = {
        name: str(value) if value == math.inf else value for name, value in asdict(config).items()
    }
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {
        "model": getattr(model, "name_or_path", "") or type(model).__name__,
        "config": settings,
        "prompts": None if prompts is None else digest,
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
