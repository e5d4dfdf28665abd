"""Optimum's ``GPTQQuantizer`` for Mixture-of-Experts models.

Optimum 2.3 looks for linears and finds none among fused experts; this class has its interface and
sees every expert, weights tokens by the router, lets no expert starve, and writes the GPTQ format
that GPTQModel, AutoGPTQ and vLLM read. It needs neither optimum nor gptqmodel itself.
"""

from __future__ import annotations

import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeq_plugin.core.gptq_format import WIDTHS, ZeroPoints
from moeq_plugin.integrations.hf.coverage import block_linears
from moeq_plugin.integrations.hf.gptq.convert import convert
from moeq_plugin.integrations.hf.gptq.names import Names
from moeq_plugin.integrations.hf.quantize_model import (
    MAX_SEQ_LENGTH,
    NUM_CALIBRATION_SAMPLES,
    Calibration,
    as_dataset,
    check_names,
    quantize,
)
from moeq_plugin.integrations.llm_compressor import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.linearization import linearize

# of Optimum's arguments, what the host decides: read from a configuration, without effect here
HOST_DECIDES = (
    "true_sequential", "block_name_to_quantize", "module_name_preceding_first_block",
    "batch_size", "pad_token_id", "cache_block_outputs", "backend", "meta", "quant_method",
)  # fmt: skip
_OWN = (
    "bits", "dataset", "group_size", "damp_percent", "desc_act", "act_group_aware", "sym",
    "model_seqlen", "modules_in_block_to_quantize", "format", "tokenizer",
    "num_calibration_samples", "ignore", "names",
)  # fmt: skip
_SETTINGS = (
    "affinity_power", "min_effective_tokens", "shrinkage", "weight_gate_proj", "seed", "ebss",
)  # fmt: skip
_DAMPING = MoEQuantModifier.model_fields["dampening_frac"].default
_SERIALIZED = (
    "bits", "group_size", "damp_percent", "desc_act", "act_group_aware", "sym",
    "modules_in_block_to_quantize", "format",
)  # fmt: skip


class MoEGPTQQuantizer:
    """Quantizes a model with MoEQuant and saves it in GPTQ format.

    What it was made with is never changed, so that it can quantize one model after another.

    Args:
        bits: 2, 3, 4 or 8.
        dataset: texts, tokenized sequences, a data set or its name; ``None`` lets the model write
            its own.
        group_size: input columns that share a scale; -1 for one scale per output.
        damp_percent: fraction of the mean diagonal added to the Hessian's diagonal; that of
            :class:`moeq_plugin.MoEQuantModifier`, a tenth of Optimum's own.
        desc_act: not offered; see ``act_group_aware``.
        act_group_aware: quantize columns in the order of their activations, groups in place.
        sym: zero points in the middle of the range.
        model_seqlen: tokens per calibration sequence.
        modules_in_block_to_quantize: endings of names, as in Optimum; ``None`` means all linears.
        format: "gptq" or "gptq_v2", how zero points are stored. ``None`` means what every reader
            knows for symmetric weights, and what GPTQModel wants for asymmetric ones.
        tokenizer: ``None`` means the one beside the model.
        num_calibration_samples: sequences used.
        ignore: names of modules to leave in 16 bit.
        names: whose names tensors get, "checkpoint" or "modules"; GPTQModel reads Mixtral under
            the latter only.
        **kwargs: settings of :class:`moeq_plugin.MoEQuantModifier` (``affinity_power`` and
            others), and Optimum's arguments that llm-compressor decides itself.

    Raises:
        ValueError: if a key is unknown or a value cannot be.
    """

    def __init__(
        self,
        bits: int,
        dataset: Calibration = None,
        group_size: int = 128,
        damp_percent: float = _DAMPING,
        desc_act: bool = False,
        act_group_aware: bool = True,
        sym: bool = True,
        model_seqlen: int | None = None,
        modules_in_block_to_quantize: list[list[str]] | None = None,
        format: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        num_calibration_samples: int = NUM_CALIBRATION_SAMPLES,
        ignore: list[str] | None = None,
        names: str = Names.CHECKPOINT.value,
        **kwargs: Any,
    ) -> None:
        check_names(kwargs, [*_OWN, *_SETTINGS, *HOST_DECIDES], "MoEGPTQQuantizer")
        if bits not in WIDTHS:
            raise ValueError(f"the GPTQ format has weights of {WIDTHS} bits, got bits={bits}")
        if group_size != -1 and group_size < 1:
            raise ValueError(f"group_size must be positive or -1, got {group_size}")
        if not 0 < damp_percent < 1:
            raise ValueError(f"damp_percent must lie between 0 and 1, got {damp_percent}")
        if desc_act:
            raise ValueError(
                "desc_act=True is not offered: act_group_aware=True quantizes in the order of "
                "activations too, and stores nothing that slows a server down"
            )
        self.bits, self.group_size, self.sym = bits, group_size, sym
        self.damp_percent, self.act_group_aware = damp_percent, act_group_aware
        self.desc_act = False  # what is written says so
        self.format = format and ZeroPoints(format.lower()).value
        self.names = Names(names)
        self.dataset, self.tokenizer = as_dataset(dataset), tokenizer
        self.num_calibration_samples, self.model_seqlen = num_calibration_samples, model_seqlen
        self.modules_in_block_to_quantize = modules_in_block_to_quantize
        self.ignore = list(ignore or [])
        self.settings = {key: kwargs[key] for key in _SETTINGS if key in kwargs}
        self.quant_method = "gptq"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> MoEGPTQQuantizer:
        """Return the quantizer that a configuration describes, such as ``quantize_config.json``."""
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what describes the quantizer, without its data."""
        return {
            **{key: getattr(self, key) for key in _SERIALIZED},
            **self.settings,
            "quant_method": self.quant_method,
            "meta": {"quantizer": [f"moeq-plugin:{version('moeq-plugin')}"]},
        }

    def quantize_model(
        self, model: PreTrainedModel, tokenizer: str | PreTrainedTokenizerBase | None = None
    ) -> PreTrainedModel:
        """Quantize a model in place and return it.

        Args:
            model: loaded in 16 or 32 bit.
            tokenizer: of the data, if it is text.

        Raises:
            ValueError: if a part of the blocks would stay in 16 bit without being ignored.
        """
        linearize(model)
        modifier = MoEQuantModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": self._weights()}},
            ignore=[*self.ignore, *self._unwanted(model)],
            dampening_frac=self.damp_percent,
            actorder="static" if self.act_group_aware else None,
            **self.settings,
        )
        quantize(
            model,
            modifier,
            dataset=self.dataset,
            tokenizer=tokenizer or self.tokenizer,
            num_calibration_samples=self.num_calibration_samples,
            max_seq_length=self.model_seqlen or MAX_SEQ_LENGTH,
        )
        return model

    def save(
        self,
        model: PreTrainedModel,
        save_dir: str | Path,
        max_shard_size: str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write a quantized model in GPTQ format to a new directory.

        Args:
            model: what :meth:`quantize_model` returned.
            save_dir: does not exist yet, or is empty.
            max_shard_size: of one file.
            safe_serialization: True; other files are not written.

        Raises:
            ValueError: if the format cannot hold the model, or pickled files are asked for.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False is not offered: readers refuse pickled files"
            )
        out = Path(save_dir)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as packed:
            model.save_pretrained(packed, max_shard_size=max_shard_size)
            zeros = None if self.format is None else ZeroPoints(self.format)
            convert(packed, out, "gptq", zero_points=zeros, names=self.names)

    def _weights(self) -> dict[str, Any]:
        """Return the weight scheme as the host's recipes have it."""
        grouped = self.group_size != -1
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.sym,
            "strategy": "group" if grouped else "channel",
            "group_size": self.group_size if grouped else None,
        }

    def _unwanted(self, model: PreTrainedModel) -> list[str]:
        """Return the linears that ``modules_in_block_to_quantize`` leaves out."""
        if self.modules_in_block_to_quantize is None:
            return []
        endings = [name for group in self.modules_in_block_to_quantize for name in group]
        wanted = re.compile("|".join(rf"(^|\.){re.escape(ending)}$" for ending in endings))
        return [name for name in block_linears(model) if not wanted.search(name)]
