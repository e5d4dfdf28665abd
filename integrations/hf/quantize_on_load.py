"""Quantize while loading: ``from_pretrained(path, quantization_config=MoEQuantConfig(...))``.

transformers loads the weights as they are; then llm-compressor quantizes the model, and nothing of
this quantizer remains. ``save_pretrained`` writes an ordinary compressed-tensors checkpoint, which
loads without this package.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeq_plugin.integrations.hf.quantize_model import (
    MAX_SEQ_LENGTH,
    NUM_CALIBRATION_SAMPLES,
    Calibration,
    as_dataset,
    check_names,
    quantize,
)
from moeq_plugin.integrations.llm_compressor import MoEQuantModifier

METHOD = "moeq_on_load"  # never written to a checkpoint: what is saved is compressed-tensors


@register_quantization_config(METHOD)
class MoEQuantConfig(QuantizationConfigMixin):
    """What to do to a model while it is loaded; never changed once it is made.

    Args:
        scheme: such as ``W4A16``; or give ``config_groups`` or ``bits_per_weight``.
        dataset: a data set with ``text`` or ``input_ids``, a path or several of what
            :func:`moeq_plugin.read_dataset` reads, a list of texts or of tokenized sequences, or a
            name that llm-compressor knows. ``None`` lets the model write its own (EBSS).
        tokenizer: ``None`` means the one beside the model.
        num_calibration_samples: sequences used.
        max_seq_length: tokens of each.
        ignore: names of modules to leave in 16 bit.
        **settings: any other argument of :class:`moeq_plugin.MoEQuantModifier`.

    Raises:
        ValueError: if a key is unknown or a setting cannot be.
    """

    def __init__(
        self,
        scheme: str | None = None,
        *,
        dataset: Calibration = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        num_calibration_samples: int | None = NUM_CALIBRATION_SAMPLES,
        max_seq_length: int | None = MAX_SEQ_LENGTH,
        ignore: list[str] | None = None,
        **settings: Any,
    ) -> None:
        self.quant_method = settings.pop("quant_method", METHOD)
        own = ("dataset", "tokenizer", "num_calibration_samples", "max_seq_length")
        check_names(settings, [*MoEQuantModifier.model_fields, *own], "MoEQuantConfig")
        self.dataset = as_dataset(dataset)
        self.tokenizer = tokenizer
        self.num_calibration_samples = num_calibration_samples
        self.max_seq_length = max_seq_length
        named = {"scheme": scheme} if scheme is not None else {}
        self.settings = {**settings, **named, "ignore": list(ignore or [])}
        self.modifier()  # says what is wrong before gigabytes are read

    def modifier(self) -> MoEQuantModifier:
        """Return a modifier that has not run yet."""
        return MoEQuantModifier(**self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Return what was asked for, without data and tokenizer."""
        return {
            "quant_method": self.quant_method,
            "num_calibration_samples": self.num_calibration_samples,
            "max_seq_length": self.max_seq_length,
            **self.settings,
        }


@register_quantizer(METHOD)
class OnLoadQuantizer(HfQuantizer):
    """Runs llm-compressor once the weights are there, and leaves an ordinary model behind."""

    requires_calibration = False
    quantization_config: MoEQuantConfig

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        """Do nothing: weights are loaded as they are."""

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Quantize the loaded model."""
        self.remove_quantization_config(model)  # the host refuses what looks quantized already
        config = self.quantization_config
        quantize(
            model,
            config.modifier(),
            dataset=config.dataset,
            tokenizer=config.tokenizer,
            num_calibration_samples=config.num_calibration_samples,
            max_seq_length=config.max_seq_length,
        )
        return model

    def is_serializable(self) -> bool:
        """Say that the result can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that quantized weights cannot be trained."""
        return False
