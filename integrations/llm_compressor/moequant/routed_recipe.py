"""What a recipe says of GPTQ on routed tokens: the fields that our quantizers share."""

from __future__ import annotations

import difflib
import re
from copy import deepcopy
from typing import Any

from compressed_tensors.quantization import QuantizationConfig, is_preset_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.sentinel import Sentinel
from pydantic import Field, field_validator

from moeq_plugin.core.sampling import EBSSConfig
from moeq_plugin.integrations.llm_compressor.frozen_fields import HOST_STATE
from moeq_plugin.integrations.llm_compressor.one_run import OneRun
from moeq_plugin.integrations.llm_compressor.solver_fields import SolverFields


class RoutedRecipe(SolverFields, OneRun, GPTQModifier):
    """GPTQ whose second moments are those of the tokens that the router sends to each expert.

    Arguments beside those of :class:`SolverFields` and of the host:

    Args:
        affinity_power: power of the combine weight: 1 as in the paper, 0 for plain routed GPTQ, 2
            for the exact squared error of the block's output.
        min_effective_tokens: an expert's linear with fewer effective tokens, ``(sum a)^2 /
            sum a^2``, borrows second moments from its layer. ``None`` means its number of input
            features: fewer tokens cannot give its second moments full rank.
        shrinkage: 1 fills up to the threshold, 0 borrows only when there is no token at all.
        weight_gate_proj: weight gate projections too. The paper's tables do; the argument that
            moves the weight inside is exact for up and down but approximate through the gate's
            nonlinearity (Eq. 17).
        seed: of the sample of layer tokens that starved experts borrow from.
        ebss: how the model writes its own calibration set when oneshot is given none
            (:class:`moeq_plugin.core.sampling.EBSSConfig`; a mapping of its fields in YAML).
    """

    affinity_power: float = Field(default=1.0, ge=0)
    min_effective_tokens: float | None = Field(default=None, ge=0)
    shrinkage: float = Field(default=1.0, ge=0)
    weight_gate_proj: bool = True
    seed: int = 0
    ebss: EBSSConfig = Field(default_factory=EBSSConfig)

    @field_validator("scheme", mode="before")
    @classmethod
    def _known_scheme(cls, scheme: Any) -> Any:
        names = [scheme] if isinstance(scheme, str) else list(scheme or ())
        for name in names:
            if not is_preset_scheme(name):
                near = [f"W{bits}A16" for bits in re.findall(r"[2-8]", name)[:1]]
                near += difflib.get_close_matches(name.upper(), PRESET_SCHEMES, n=2)
                meant = " or ".join(dict.fromkeys(n for n in near if is_preset_scheme(n)))
                raise ValueError(
                    f"{name!r} is not a scheme; "
                    + (f"did you mean {meant}? " if meant else f"known: {sorted(PRESET_SCHEMES)}. ")
                    + "For other grids give config_groups."
                )
        return scheme

    @field_validator("actorder", mode="before")
    @classmethod
    def _readable_order(cls, actorder: Any) -> Any:
        # the host's field still takes what compressed-tensors 0.19 has removed and no longer reads
        if actorder is True or str(getattr(actorder, "value", actorder)) in {"group", "dynamic"}:
            raise ValueError(
                f"actorder={actorder!r} has been removed from compressed-tensors: use 'static', "
                "which needs no g_idx, or None"
            )
        return actorder

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        """Return plain data: the host writes ``recipe.yaml`` from it and could not read enums."""
        kwargs.setdefault("mode", "json")
        return super().model_dump(**kwargs)

    def settings(self) -> dict[str, Any]:
        """Return what was asked for, as plain data."""
        return {name: v for name, v in self.model_dump().items() if name not in HOST_STATE}

    def given(self) -> list[str]:
        """Return the names of the fields that say something else than their default."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if name not in HOST_STATE
            and getattr(self, name) != field.get_default(call_default_factory=True)
        ]

    def host_fields(self) -> dict[str, Any]:
        """Return copies of the fields that are llm-compressor's ``GPTQModifier``'s."""
        names = GPTQModifier.model_fields.keys() - HOST_STATE
        fields = {name: getattr(self, name) for name in names}
        # the host marks by a sentinel what nobody has given, and takes none itself
        given = {name: v for name, v in fields.items() if not isinstance(v, Sentinel)}
        return deepcopy(given)

    def resolve_quantization_config(self) -> QuantizationConfig:
        """Return the schemes asked for; the host would complete those of the recipe in place."""
        return GPTQModifier(**self.host_fields()).resolve_quantization_config()
