"""What a run is to do to a model: worked out once, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.utils import match_named_modules
from llmcompressor.modifiers.gptq import GPTQModifier
from torch import nn

from moeq_plugin.core.solver_options import SolverOptions
from moeq_plugin.integrations.llm_compressor import preflight
from moeq_plugin.integrations.llm_compressor.calibration.guard import guard
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    Observation,
)
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.moequant.routed_recipe import RoutedRecipe
from moeq_plugin.integrations.llm_compressor.two_streams.correction import correct
from moeq_plugin.integrations.llm_compressor.two_streams.counterpart import Counterpart
from moeq_plugin.integrations.llm_compressor.two_streams.paired import PairedCalibration
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.records.run import Basis


@dataclass(frozen=True)
class Request:
    """A recipe, resolved against a model.

    Attributes:
        modifier: class name of the modifier that asks.
        settings: the recipe as plain data.
        host_fields: arguments of llm-compressor's ``GPTQModifier``, schemes and ``ignore`` among
            them, which grow as schemes are decided.
        kept: targeted modules that stay in 16 bit, with the reason.
        affinity_power: see :class:`RoutedRecipe`, likewise the others.
        weight_gate_proj: likewise.
        seed: likewise.
        min_effective_tokens: likewise.
        shrinkage: likewise.
        solver: how weights are rounded.
        row_feedback: whether rows make up for each other in it.
        corrected_target: see :class:`SolverFields`.
    """

    modifier: str
    settings: Mapping[str, Any]
    host_fields: Mapping[str, Any]
    kept: Mapping[str, str]
    affinity_power: float
    weight_gate_proj: bool
    seed: int
    min_effective_tokens: float | None
    shrinkage: float
    solver: SolverOptions
    row_feedback: bool
    corrected_target: bool

    @classmethod
    def of(
        cls,
        recipe: RoutedRecipe,
        model: nn.Module,
        layers: list[MoELayer],
        groups: Mapping[str, QuantizationScheme] | None = None,
    ) -> Request:
        """Check a recipe against a model and put what stays in 16 bit by default into ``ignore``.

        Args:
            recipe: what was asked for.
            model: the linearized model.
            layers: its MoE layers.
            groups: schemes for a recipe that names none.

        Raises:
            ValueError: if a target matches nothing or something that is quantized already.
        """
        fields = recipe.host_fields()  # copies: the host completes schemes in place
        if groups is not None:
            fields |= {"scheme": None, "config_groups": dict(groups)}
        # asked of a modifier that is thrown away, since each keeps what it has worked out
        stock = GPTQModifier(**deepcopy(fields))
        targets = stock.resolved_targets
        preflight.check_targets(model, targets)
        preflight.warn_of_ignored(model, stock.ignore)
        preflight.check_groups(model, stock.resolved_config.config_groups)
        if recipe.row_feedback:
            preflight.check_backward_pass(model)
        kept = preflight.kept_by_default(model, layers, targets)
        request = cls(
            modifier=type(recipe).__name__,
            settings=recipe.settings(),
            host_fields=fields,
            kept=kept,
            affinity_power=recipe.affinity_power,
            weight_gate_proj=recipe.weight_gate_proj,
            seed=recipe.seed,
            min_effective_tokens=recipe.min_effective_tokens,
            shrinkage=recipe.shrinkage,
            solver=recipe.solver_options(),
            row_feedback=recipe.row_feedback,
            corrected_target=recipe.corrected_target,
        ).ignoring(kept)
        preflight.check_not_quantized(request.targeted(model))
        preflight.check_untouched(model)
        return request

    def targeted(self, model: nn.Module) -> dict[nn.Module, str]:
        """Return the modules that the request is about, and their names."""
        stock = self._stock()
        matched = match_named_modules(model, stock.resolved_targets, stock.ignore)
        return {module: name for name, module in matched}

    def groups(self) -> dict[str, QuantizationScheme]:
        """Return the schemes, and what each targets."""
        return dict(self._stock().resolved_config.config_groups)

    def ignoring(self, names: Iterable[str]) -> Request:
        """Return the request with further modules left alone."""
        ignore = self.host_fields["ignore"]
        more = [name for name in names if name not in ignore]
        return replace(self, host_fields={**self.host_fields, "ignore": [*ignore, *more]})

    def with_groups(self, groups: Mapping[str, QuantizationScheme]) -> Request:
        """Return the request with these schemes in the place of what it had."""
        decided = {"scheme": None, "config_groups": dict(groups)}
        return replace(self, host_fields={**self.host_fields, **decided})

    def calibration(
        self, padding: PaddingWatch, counterpart: Counterpart | None = None
    ) -> Calibration:
        """Return what measures second moments as asked for.

        Args:
            padding: knows which tokens do not count.
            counterpart: the 16-bit stream to measure them against, if there is one.
        """
        make = Calibration if counterpart is None else partial(PairedCalibration, counterpart)
        return make(
            affinity_power=self.affinity_power,
            weight_gate_proj=self.weight_gate_proj,
            seed=self.seed,
            padding=padding,
        )

    def guard(
        self, observation: Observation, calibration: Calibration
    ) -> tuple[torch.Tensor, float, Basis]:
        """Return second moments that starve no expert; see :func:`guard`."""
        return guard(
            observation,
            calibration,
            min_effective_tokens=self.min_effective_tokens,
            shrinkage=self.shrinkage,
            solver=self.solver,
        )

    def correct(self, observation: Observation, hessian: torch.Tensor, basis: Basis) -> None:
        """Correct weights against the 16-bit stream; see :func:`correct`."""
        correct(
            observation,
            hessian,
            basis,
            min_effective_tokens=self.min_effective_tokens,
            shrinkage=self.shrinkage,
        )

    def _stock(self) -> GPTQModifier:
        return GPTQModifier(**deepcopy(dict(self.host_fields)))  # which completes its schemes
