"""Measure what every linear loses at each of llama.cpp's types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from moeq_plugin.core.solver_options import SolverOptions
from moeq_plugin.integrations.llama_cpp.column_importance import column_mean_squares
from moeq_plugin.integrations.llama_cpp.ggml import dequantize, quantize
from moeq_plugin.integrations.llama_cpp.tensor_names import tensor_names
from moeq_plugin.integrations.llama_cpp.tensor_types import (
    DEFAULT_TYPES,
    other_bytes,
    parse_types,
)
from moeq_plugin.integrations.llm_compressor.allocation.choices import Choices
from moeq_plugin.integrations.llm_compressor.allocation.options import Option
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import SensitivityModifier
from moeq_plugin.integrations.llm_compressor.allocation.target_linears import target_linears
from moeq_plugin.integrations.llm_compressor.allocation.trial_rounding import (
    GuardedMoments,
    TrialRounding,
)
from moeq_plugin.integrations.llm_compressor.calibration.output_moments import OutputMoments
from moeq_plugin.models.scheme_units import unit_labels


class TypeSensitivityModifier(SensitivityModifier):
    """Measure a table whose options are types of llama.cpp.

    Each linear is rounded by llama.cpp's own code, with the importance matrix that the rounding
    half of the data gives, and judged on the other half.

    Args:
        options: names of types, such as ``Q3_K``.
        ignore: as for quantization; the output has a type of its own, see `other_bytes`.
        min_effective_tokens: as for :class:`ImportanceModifier`.
    """

    options: list[str] = Field(default_factory=lambda: list(DEFAULT_TYPES))
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])
    min_effective_tokens: float | None = Field(default=64.0, ge=0)

    def _find_choices(self, model: PreTrainedModel) -> Choices:
        names = target_linears(model, self._layers, self.targets, self.ignore)
        config = model.config.get_text_config()
        # what has no name in the end is not worth the measuring
        tensor_names(names.values(), config.model_type)
        return Choices(
            names=names,
            options=parse_types(self.options),
            units=unit_labels(list(names.values()), self._layers, dict(model.named_modules())),
            fixed_bytes=other_bytes(model, names),
        )

    def _trial_rounding(self, outputs: OutputMoments | None) -> TrialRounding:
        # llama.cpp rounds: nothing that our solver is told has a say
        return _TypeRounding(self.min_effective_tokens, self.shrinkage, SolverOptions(), outputs)


class _TypeRounding(TrialRounding):
    """Rounds as ``llama-quantize`` does."""

    def differences(
        self, option: Option, moments: Sequence[GuardedMoments]
    ) -> Iterator[tuple[nn.Linear, torch.Tensor]]:
        """Yield what rounding changes of each linear, ``[out, in]`` float32."""
        for of in moments:
            columns = column_mean_squares(of.hessian, of.weight_sum).cpu().numpy()
            for linear in of.linears:
                if option.fits(linear):
                    weight = linear.weight.detach().float().cpu().numpy()
                    rounded = dequantize(quantize(weight, option.name, columns), option.name)
                    yield linear, torch.from_numpy(rounded - weight).to(linear.weight.device)
