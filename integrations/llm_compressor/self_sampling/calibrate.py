"""Calibrate on text that the model writes itself (EBSS), inside the host's ordinary flow.

Without a data set the host runs its data-free pipeline, in which a modifier may do as it likes at
the start of calibration: there we sample, and run the host's sequential pipeline on the result.
``dataset="ebss"`` samples where the host tokenizes its data sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressed_tensors.utils import patch_attr
from datasets import Dataset
from llmcompressor.args import DatasetArguments
from llmcompressor.core import State
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modeling.moe import context as moe_context
from llmcompressor.pipelines.sequential import SequentialPipeline
from llmcompressor.transformers.data.base import TextGenerationDataset
from llmcompressor.utils.helpers import DisableQuantization
from loguru import logger
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, default_data_collator

from moeq_plugin.core.sampling import EBSSConfig
from moeq_plugin.integrations.llm_compressor.calibration.ranks import own_part
from moeq_plugin.integrations.llm_compressor.host import running_oneshot
from moeq_plugin.integrations.llm_compressor.self_sampling.dataset import ebss_dataset, sample_set
from moeq_plugin.records.sampling import SamplingReport

_BATCH_TOKENS = 2048


def calibrate_on_own_text(
    state: State, config: EBSSConfig, path: Path | None = None
) -> SamplingReport:
    """Sample a set, make it the state's calibration data, run the host's sequential pipeline.

    Args:
        state: holds the linearized model, its modifier initialized.
        config: what to sample.
        path: where to keep the set, so that an interrupted run continues it.

    Returns:
        What the set is like.
    """
    model = state.model
    logger.info(
        f"no data set given: the model writes its own, {config.num_sequences} sequences of "
        f"{config.seq_len} tokens, {'sampled' if config.tau is None else 'balanced by EBSS'} "
        f"(seed {config.seed})"
    )
    running = running_oneshot()
    # every token to every expert would give the same text, many times slower; and the schemes of
    # linears that are not quantized yet have no scales
    routed_only = patch_attr(moe_context, "_CALIBRATE_ALL_EXPERTS", False)
    with routed_only, DisableQuantization(model):
        sampled = sample_set(model, _tokenizer(running), config, path=path)
    rows = sampled.dataset.select_columns(["input_ids"])
    loader = DataLoader(
        rows.select(own_part(range(len(rows)))),
        batch_size=max(1, _BATCH_TOKENS // config.seq_len),
        collate_fn=default_data_collator,
    )
    arguments = running.dataset_args if running is not None else DatasetArguments()
    state.data.calib = loader
    SequentialPipeline()(model, loader, arguments)
    return sampled.report


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
        arguments: Any = self.dataset_args
        config = EBSSConfig(
            num_sequences=arguments.num_calibration_samples or EBSSConfig.num_sequences,
            seq_len=arguments.max_seq_length or EBSSConfig.seq_len,
        )
        return ebss_dataset(running.model, _tokenizer(running), config)


def _tokenizer(running: Oneshot | None) -> PreTrainedTokenizerBase | None:
    processor = getattr(running, "processor", None)
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
