"""Calibration text that the model writes itself (EBSS), inside the host's ordinary flow.

Without a data set a modifier has text made at the start of calibration and runs a pass of its own
over it. ``dataset="ebss"`` has it made where the host tokenizes its data sets.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from llmcompressor.transformers.data.base import TextGenerationDataset
from llmcompressor.utils.helpers import DisableQuantization
from loguru import logger
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, default_data_collator

from moeq_plugin.core.sampling import EBSSConfig
from moeq_plugin.integrations.llm_compressor.calibration.ranks import own_part
from moeq_plugin.integrations.llm_compressor.host import (
    run_routed_tokens_only,
    running_oneshot,
    running_tokenizer,
)
from moeq_plugin.integrations.llm_compressor.self_sampling.dataset import ebss_dataset, sample_set
from moeq_plugin.records.sampling import SamplingReport

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class OwnText:
    """Calibration batches that the model wrote, this rank's part of them, and what they are like.

    Attributes:
        batches: of ``input_ids``.
        report: on the whole set.
    """

    batches: DataLoader[Any]
    report: SamplingReport


def write_own_text(model: PreTrainedModel, config: EBSSConfig, path: Path | None = None) -> OwnText:
    """Let the model write its calibration set.

    Args:
        model: the linearized model.
        config: what to sample.
        path: where to keep the set, so that an interrupted run continues it.
    """
    logger.info(
        f"no data set given: the model writes its own, {config.num_sequences} sequences of "
        f"{config.seq_len} tokens, {'sampled' if config.tau is None else 'balanced by EBSS'} "
        f"(seed {config.seed})"
    )
    # every token to every expert would give the same text, many times slower; and the schemes of
    # linears that are not quantized yet have no scales
    with ExitStack() as undo, DisableQuantization(model):
        run_routed_tokens_only(model, undo)
        sampled = sample_set(model, running_tokenizer(), config, path=path)
    # the other columns are of the report, and no arguments of the model
    rows = sampled.dataset.select_columns(["input_ids"])
    batches = DataLoader(
        # every rank holds the whole set and calibrates on its part
        rows.select(own_part(range(len(rows)))),
        batch_size=max(1, _BATCH_TOKENS // config.seq_len),
        collate_fn=default_data_collator,
    )
    return OwnText(batches, sampled.report)


@TextGenerationDataset.register(name="ebss")
class EBSSDataset(TextGenerationDataset):
    """``dataset="ebss"``: as many sequences, as long, as oneshot's arguments say."""

    def __call__(self, add_labels: bool = False) -> Dataset:
        """Sample the set with the model of the running oneshot.

        Raises:
            ValueError: if no oneshot is running.
        """
        del add_labels  # calibration has none
        running = running_oneshot()
        if running is None:
            raise ValueError(
                'dataset="ebss" needs the model of a running oneshot; elsewhere use '
                "moeq_plugin.ebss_dataset(model)"
            )
        # the model of the oneshot, because the host hands a data set nothing but arguments; it is
        # not linearized yet when the data are made
        arguments: Any = self.dataset_args
        config = EBSSConfig(
            num_sequences=arguments.num_calibration_samples or EBSSConfig.num_sequences,
            seq_len=arguments.max_seq_length or EBSSConfig.seq_len,
        )
        return ebss_dataset(running.model, running_tokenizer(), config)
