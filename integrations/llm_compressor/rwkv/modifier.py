"""RWKVQuantModifier: a scalar grid for weights of evenly spread values, codebooks for the rest."""

from __future__ import annotations

from copy import copy
from dataclasses import asdict
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_offloading, update_offload_parameter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import distributed, nn

from moeq_plugin.core.channel_power import ChannelPower
from moeq_plugin.core.codebook import CodebookFormat, CodebookWeight, encode
from moeq_plugin.core.codebook_solver import solve_codebook
from moeq_plugin.core.hybrid import choose_scalar, choose_scalar_below
from moeq_plugin.core.uniformity import Gaps, UniformityScore
from moeq_plugin.integrations.llm_compressor import preflight
from moeq_plugin.integrations.llm_compressor.calibration.observations import Calibration
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.calibration.ranks import sum_over_ranks
from moeq_plugin.integrations.llm_compressor.host import listen_to_batches
from moeq_plugin.integrations.llm_compressor.moequant.modifier import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.rwkv.saving import keep_packed
from moeq_plugin.integrations.llm_compressor.rwkv.scheme_choice import (
    deciding_together,
    scalar_bits,
    scheme_groups,
    score_weights,
    weights_of_scheme,
)
from moeq_plugin.integrations.llm_compressor.schemes import weight_args
from moeq_plugin.integrations.llm_compressor.solving import guard
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.models.packed import packed_modules
from moeq_plugin.records.run import Basis, LinearRecord
from moeq_plugin.rwkv import ElementwiseScale, elementwise_parameters

W3_GROUP_64 = {"num_bits": 3, "symmetric": False, "group_size": 64}  # the paper's scalar grid


class RWKVQuantModifier(MoEQuantModifier):
    """Quantize with GPTQ on a scalar grid or with codebooks, whatever suits each weight.

    The values of a weight are sorted; the gaps between them give a coarse and a fine proxy of its
    uniformity (RWKVQuant, arXiv:2505.03803, :mod:`moeq_plugin.core.uniformity`). The most uniform
    weights, nine of ten, get a scalar grid, the others a codebook, both with GPTQ's compensation.
    RWKV's element-wise weights (token shift, ``k_k``, ``k_a``, ``r_k``) get codebooks fitted by
    the second moments of what they multiply. Embedding, head, norms and biases stay in 16 bit.

    Where we differ from the paper and its released code: weights are ranked by their proxies
    instead of compared with fitted thresholds; gaps are those between quantiles; codebooks are
    shared by more weights instead of being truncated by SVD, and are refined by conjugate
    gradients; zero points and scales count as bits.

    Sample yaml:

    ```yaml
    quant_stage:
      quant_modifiers:
        RWKVQuantModifier:
          scalar_frac: 0.9
    ```

    Lifecycle: that of :class:`MoEQuantModifier`, and

    - on_initialize: score all weights and decide
    - on_sequential_epoch_end: also encode the layer's other weights
    - on_finalize: replace encoded modules by packed ones, which is what will be saved

    Args:
        scalar_frac: share of the linears, by number, that stay scalar.
        thresholds: ``(tau_c, tau_f)``: stay scalar if both proxies are below, as in the paper,
            instead of by rank. The published (1.54, 30) belong to ``gaps="unique"`` and float16.
        gaps: see :func:`moeq_plugin.core.uniformity.score_uniformity`.
        codebook: format of the other weights.
        fallback_scheme: a scalar scheme for the other weights instead of codebooks, a preset's
            name or fields of its weights such as ``{"num_bits": 4, "symmetric": False,
            "group_size": 64}``. The checkpoint is plain compressed-tensors then.
        elementwise: format of element-wise weights, each of which counts as one row; ``None``
            leaves them in 16 bit.
        elementwise_weighted: fit their codebooks by second moments; otherwise all channels count
            alike.
        elementwise_percentile: larger activations of a sequence's channel are clipped to this.
        refine_steps: see :func:`moeq_plugin.core.codebook_solver.solve_codebook`.
    """

    scalar_frac: float = Field(default=0.9, ge=0, le=1)
    thresholds: tuple[float, float] | None = None
    gaps: Gaps = "quantile"
    codebook: CodebookFormat = CodebookFormat(6, 2, group_rows=64, group_columns=32)
    fallback_scheme: str | dict[str, Any] | None = None
    elementwise: CodebookFormat | None = CodebookFormat(3, 1, group_rows=1, group_columns=64)
    elementwise_weighted: bool = True
    elementwise_percentile: float = Field(default=99.0, gt=0, le=100)
    refine_steps: int = Field(default=20, ge=0)

    _coded: dict[nn.Module, str] = PrivateAttr(default_factory=dict)
    _powers: dict[ElementwiseScale, ChannelPower] = PrivateAttr(default_factory=dict)
    _encoded: dict[str, CodebookWeight] = PrivateAttr(default_factory=dict)
    _code_calibration: Calibration | None = PrivateAttr(default=None)
    _padding: PaddingWatch | None = PrivateAttr(default=None)
    _as_asked: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_formats(self) -> RWKVQuantModifier:
        if self.work_dir is not None:
            raise ValueError(
                "RWKVQuantModifier keeps no state to continue from: leave out work_dir"
            )
        if self.elementwise is not None and self.elementwise.group_rows != 1:
            raise ValueError(
                "elementwise.group_rows must be 1, an element-wise weight is one row, got "
                f"{self.elementwise.group_rows}"
            )
        if self.fallback_scheme is None:
            return self
        weights_of_scheme(self.fallback_scheme)
        if self.elementwise is not None and "elementwise" in self.model_fields_set:
            raise ValueError(
                "fallback_scheme makes a plain compressed-tensors checkpoint, which cannot hold "
                "element-wise weights in a codebook: leave out `elementwise` or fallback_scheme"
            )
        self.elementwise = None
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Score all weights, decide, and prepare both kinds as the base class does.

        Raises:
            ValueError: if the request cannot succeed; nothing has been changed then.
        """
        model = state.model
        asked = ("config_groups", "scheme", "ignore")
        self._as_asked = {field: copy(getattr(self, field)) for field in asked}
        takes_default = self.config_groups is None and self.scheme is None
        if takes_default:
            self._use_groups({"scalar": _scheme(self.targets, W3_GROUP_64)})
        preflight.check_targets(model, self.resolved_targets)
        kept = preflight.kept_by_default(model, find_moe_layers(model), self.resolved_targets)
        linears = self._targeted_linears(model, kept)
        scores = self.score_weights(linears)
        scalar = self._choose(linears, scores, model)
        coded = {name: linear for name, linear in linears.items() if name not in scalar}
        self._check_codebooks(coded)
        if takes_default:
            plain = {name: linear for name, linear in linears.items() if name in scalar}
            groups = scheme_groups(plain, weights_of_scheme(W3_GROUP_64), "scalar")
            self._use_groups(groups or self.config_groups)  # all ignored, if no weight is scalar
        if self.fallback_scheme is not None:
            finer = scheme_groups(coded, weights_of_scheme(self.fallback_scheme), "finer")
            self._use_groups({**self.resolved_config.config_groups, **finer})
            coded = {}
        elif coded:
            self._ignore_also(list(coded))
        super().on_initialize(state, **kwargs)
        self._coded = {linear: name for name, linear in coded.items()}
        self._module_names.update(self._coded)
        assert self._record is not None  # the base class has just made it
        self._record.kept = kept
        self._record.uniformity = {
            name: {**asdict(score), "scalar": name in scalar} for name, score in scores.items()
        }
        return True

    def score_weights(self, linears: dict[str, nn.Linear]) -> dict[str, UniformityScore]:
        """Return what the weights are ranked by; override it to rank them by something else."""
        return score_weights(linears, self.gaps)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Register the hooks of the base class and those for codebooks."""
        super().on_calibration_start(state, event, **kwargs)
        if self._calibration is None:
            return  # everything was done on the text that the model wrote itself
        self._padding = PaddingWatch(state)
        listen_to_batches(self._padding, self._undo)
        self._code_calibration = Calibration(
            affinity_power=self.affinity_power,
            weight_gate_proj=self.weight_gate_proj,
            seed=self.seed,
            padding=self._padding,
        )
        self._code_calibration.attach(
            state.model, self._layers, list(self._coded), self.register_hook
        )
        if self.elementwise is not None:
            for name, weight, module in elementwise_parameters(state.model):
                self._coded[module] = name.removesuffix(".weight")
                self._powers[module] = ChannelPower.zeros(weight.numel(), weight.device)
                self.register_hook(module, self._observe_elementwise, "forward")

    def compress_modules(self) -> None:
        """Quantize everything observed since the last layer; called once per layer."""
        super().compress_modules()
        calibration = self._code_calibration
        assert calibration is not None  # made together with that of the base class
        if is_distributed():
            sum_over_ranks(calibration, self._module_names)
            for power in self._powers.values():
                _sum_power_over_ranks(power)
        calibration.check_finite(self._module_names)
        with torch.no_grad(), disable_offloading():
            for observation in calibration.observations.values():
                hessian, weight_sum, basis = guard(
                    observation,
                    calibration,
                    min_effective_tokens=self.min_effective_tokens,
                    shrinkage=self.shrinkage,
                )
                tokens = observation.moments.effective_tokens
                for linear in observation.linears:
                    self._encode_linear(linear, hessian, weight_sum, basis, tokens)
            for module in [m for m, power in self._powers.items() if power.num_tokens]:
                self._encode_elementwise(module)
        calibration.clear_layer()

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Encode what no batch has called, then end as the base class does."""
        if self._calibration is not None:
            with torch.no_grad(), disable_offloading():
                for module in list(self._coded):
                    if isinstance(module, ElementwiseScale):
                        self._encode_elementwise(module)
                    else:
                        nothing = torch.eye(module.in_features, device=module.weight.device)
                        self._encode_linear(module, nothing, 1.0, Basis.NONE, 0.0)
            self._code_calibration = None
        super().on_calibration_end(state, event, **kwargs)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Keep encoded weights packed, and say what was done and how many bits it takes."""
        if self._encoded:
            keep_packed(state.model, self._encoded)
        self._report_bits(state.model)
        done = super().on_finalize(state, **kwargs)
        # the recipe is written from these fields: a run with it should decide for itself again
        for field, value in self._as_asked.items():
            setattr(self, field, value)
        self._encoded.clear()
        return done

    def _use_groups(self, groups: dict[str, QuantizationScheme]) -> None:
        self.config_groups, self.scheme = groups, None
        self._resolved_config = None  # resolved once from the groups, which have just changed

    def _targeted_linears(self, model: nn.Module, kept: dict[str, str]) -> dict[str, nn.Linear]:
        matched = match_named_modules(model, self.resolved_targets, [*self.ignore, *kept])
        return {name: module for name, module in matched if isinstance(module, nn.Linear)}

    def _choose(
        self, linears: dict[str, nn.Linear], scores: dict[str, UniformityScore], model: nn.Module
    ) -> frozenset[str]:
        groups = deciding_together(linears, find_moe_layers(model))
        if self.thresholds is not None:
            return choose_scalar_below(scores, *self.thresholds, groups=groups)
        return choose_scalar(scores, scalar_frac=self.scalar_frac, groups=groups)

    def _check_codebooks(self, coded: dict[str, nn.Linear]) -> None:
        dim = self.codebook.vector_dim
        wrong = [name for name, linear in coded.items() if linear.in_features % dim]
        if wrong and self.fallback_scheme is None:
            raise ValueError(
                f"codebook.vector_dim {dim} must divide the input columns of every weight, which "
                f"it does not for {', '.join(wrong)}; use 1, or put them into `ignore`"
            )

    def _observe_elementwise(
        self, module: ElementwiseScale, args: tuple[torch.Tensor, ...], _output: torch.Tensor
    ) -> None:
        """Add a batch ``[sequences, tokens, *weight]`` to the module's power."""
        assert self._padding is not None  # set before hooks are registered
        inputs = args[0].reshape(*args[0].shape[:2], -1)
        keep = self._padding.keep(inputs.shape[0] * inputs.shape[1])
        for index, sequence in enumerate(inputs):
            if keep is not None:
                sequence = sequence[keep.view(len(inputs), -1)[index].to(sequence.device)]
            self._powers[module].add(sequence, self.elementwise_percentile)

    def _encode_linear(
        self,
        linear: nn.Linear,
        hessian: torch.Tensor,
        weight_sum: float,
        basis: Basis,
        effective_tokens: float,
    ) -> None:
        solution = solve_codebook(
            linear.weight,
            hessian,
            self.codebook,
            dampening_frac=self.dampening_frac or 0.0,
            refine_steps=self.refine_steps,
        )
        is_nearest = basis is Basis.NONE or solution.is_nearest
        loss = None if is_nearest else solution.loss.sum().item() / weight_sum
        basis = Basis.NONE if is_nearest else basis
        self._take(linear, solution.weight, basis, effective_tokens, loss)

    def _encode_elementwise(self, module: ElementwiseScale) -> None:
        assert self.elementwise is not None  # else no module was registered
        power = self._powers.pop(module)
        row = module.weight.view(1, -1)
        importance = power.mean() if self.elementwise_weighted else None
        encoded = encode(row, self.elementwise, importance)
        change = (encoded.decode().double() - row.double()).square() * power.mean()
        basis = Basis.OWN if power.num_tokens else Basis.NONE
        loss = change.sum().item() if power.num_tokens else None
        self._take(module, encoded, basis, float(power.num_tokens), loss)

    def _take(
        self,
        module: nn.Module,
        encoded: CodebookWeight,
        basis: Basis,
        effective_tokens: float,
        loss: float | None,
    ) -> None:
        """Note the result and let the model run on it from now on."""
        update_offload_parameter(module, "weight", encoded.decode().view_as(module.weight))
        name, form = self._coded.pop(module), encoded.form
        self._encoded[name] = encoded
        scheme = (
            f"codebook {form.index_bits} bit per {form.vector_dim}, "
            f"{form.group_rows} x {form.group_columns}"
        )
        assert self._record is not None  # set in on_initialize
        self._record.linears.append(LinearRecord(name, scheme, basis, effective_tokens, loss))

    def _report_bits(self, model: nn.Module) -> None:
        quantized = packed_modules(model)
        bits = sum(32 * module.packed.numel() for module in quantized.values())
        weights = sum(module.weight_shape.numel() for module in quantized.values())
        for module in model.modules():
            args = weight_args(module)
            if args is not None and isinstance(module, nn.Linear):
                bits += scalar_bits(module, args)
                weights += module.weight.numel()
        assert self._record is not None  # set in on_initialize
        self._record.bits_per_weight = bits / max(1, weights)
        logger.info(
            f"{len(quantized)} weights in codebooks, {self._record.bits_per_weight:.3f} bits per "
            "quantized weight with all codebooks, scales and zero points"
        )


def _sum_power_over_ranks(power: ChannelPower) -> None:
    tokens = power.square_sum.new_tensor(power.num_tokens)
    for tensor in (power.square_sum, tokens):
        distributed.all_reduce(tensor)
    power.num_tokens = int(tokens)


def _scheme(targets: str | list[str], weights: dict[str, Any]) -> QuantizationScheme:
    arguments: QuantizationArgs = weights_of_scheme(weights)
    targets = [targets] if isinstance(targets, str) else targets
    return QuantizationScheme(targets=targets, weights=arguments)
