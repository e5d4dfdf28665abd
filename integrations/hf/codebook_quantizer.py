"""Load checkpoints with codebook weights in transformers: ``quant_method: moeq``.

All weights stay packed in memory and are decoded as they are multiplied, those in codebook format
as well as the scalar ones, whose tensors are compressed-tensors' own. ``model.dequantize()`` makes
all of them plain.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CompressedTensorsConfig, PreTrainedModel
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeq_plugin.core.packed_codebook import (
    FORMAT_VERSION,
    READABLE_VERSIONS,
    PackedFormat,
)
from moeq_plugin.integrations.hf.packed_linears import keep_linears_packed, unpack_linears
from moeq_plugin.models.packed import (
    check_packed,
    pack_modules,
    renew_packed,
    unpack_modules,
)

METHOD = "moeq"


@register_quantization_config(METHOD)
class CodebookConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint with codebook weights.

    Args:
        codebooks: for each format the fields of :class:`PackedFormat` and ``targets``, the names
            of the modules that have it.
        scalar: the compressed-tensors configuration of the other quantized weights, if any.
        format_version: what wrote it.
        dequantize: make all weights plain once they are loaded.
        quant_method: always ``moeq``.

    Raises:
        ValueError: if another version of the format wrote it.
    """

    def __init__(
        self,
        codebooks: list[dict[str, Any]],
        scalar: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        dequantize: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        if format_version not in READABLE_VERSIONS:
            raise ValueError(
                f"the checkpoint has codebook format version {format_version}, this package reads "
                f"{' and '.join(map(str, READABLE_VERSIONS))}: install the version of moeq-plugin "
                "that wrote it"
            )
        self.codebooks, self.scalar = codebooks, scalar
        self.format_version, self.dequantize = format_version, dequantize
        # transformers' enumeration lists only its own methods; what is registered is a plain string
        self.quant_method = quant_method  # type: ignore[assignment]

    def forms(self) -> dict[str, PackedFormat]:
        """Return the format of every codebook module by name."""
        forms: dict[str, PackedFormat] = {}
        for group in self.codebooks:
            fields = {key: value for key, value in group.items() if key != "targets"}
            forms |= dict.fromkeys(group["targets"], PackedFormat(**fields))
        return forms


@register_quantizer(METHOD)
class CodebookQuantizer(HfQuantizer):
    """Builds packed modules before weights are loaded, and leaves the rest to compressed-tensors.

    Args:
        quantization_config: the checkpoint's section.
        **kwargs: see ``HfQuantizer``.
    """

    requires_calibration = True  # an unquantized model is quantized by oneshot, not here
    quantization_config: CodebookConfig

    def __init__(self, quantization_config: CodebookConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._scalar: CompressedTensorsHfQuantizer | None = None
        if quantization_config.scalar is not None:
            section = {**quantization_config.scalar, "dequantize": quantization_config.dequantize}
            config = CompressedTensorsConfig(**section)
            self._scalar = CompressedTensorsHfQuantizer(config, **kwargs)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Leave it to compressed-tensors: codebooks need nothing that is not here."""
        if self._scalar is not None:
            self._scalar.validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        pack_modules(model, self.quantization_config.forms())
        if self._scalar is not None:
            self._scalar._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_packed(model)  # transformers compares no shapes where there is a quantizer
        if self.quantization_config.format_version != FORMAT_VERSION:
            renew_packed(model)
            self.quantization_config.format_version = FORMAT_VERSION  # what is saved from now on
        if self._scalar is not None:
            self._scalar._process_model_after_weight_loading(model, **kwargs)
        if self.quantization_config.dequantize:
            unpack_modules(model)
        else:
            keep_linears_packed(model)

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        if self._scalar is not None:
            self._scalar.compressor.decompress_model(model)  # what has no packed form
        unpack_linears(model)
        unpack_modules(model)
        return model

    def is_serializable(self) -> bool:
        """Say that a loaded model can be saved again: what is packed stays packed."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that indices cannot be trained."""
        return False
