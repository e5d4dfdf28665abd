"""RWKVQuantModifier: a scalar grid for weights of evenly spread values, codebooks for the rest."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from compressed_tensors.quantization import QuantizationScheme
from llmcompressor.core import State
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from moeq_plugin.core.codebook import CodebookFormat, CodebookWeight
from moeq_plugin.core.hybrid import choose_scalar, choose_scalar_below
from moeq_plugin.core.uniformity import Gaps, UniformityScore
from moeq_plugin.integrations.llm_compressor.checkpoint.saving import prepare_saving
from moeq_plugin.integrations.llm_compressor.moequant.request import Request
from moeq_plugin.integrations.llm_compressor.moequant.routed_modifier import RoutedModifier
from moeq_plugin.integrations.llm_compressor.moequant.run import Run
from moeq_plugin.integrations.llm_compressor.rwkv.codebook_run import CodebookRun
from moeq_plugin.integrations.llm_compressor.rwkv.elementwise_run import ElementwiseRun
from moeq_plugin.integrations.llm_compressor.rwkv.saving import keep_packed, write_codebooks
from moeq_plugin.integrations.llm_compressor.rwkv.scheme_choice import (
    deciding_together,
    scheme_groups,
    score_weights,
    stored_bits_per_weight,
    weights_of_scheme,
)

W3_GROUP_64 = {"num_bits": 3, "symmetric": False, "group_size": 64}  # the paper's scalar grid
_BUDGET = (
    "bits_per_weight", "size_gb", "allocation", "options", "target", "robust", "sensitivity",
)  # fmt: skip
_NOT_OURS = {
    "work_dir": "keeps no state to continue from",
    **dict.fromkeys(_BUDGET, "has no budget of bits"),
}


class RWKVQuantModifier(RoutedModifier):
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

    Lifecycle:

    - on_initialize: check everything that can be checked, score all weights and decide, attach
      schemes, prepare saving
    - on_calibration_start: hooks that accumulate second moments
    - on_sequential_epoch_end: solve one layer's weights on grids, encode its others
    - on_calibration_end: round what was never called, remove hooks
    - on_finalize: replace encoded modules by packed ones, which is what will be saved

    Arguments beside those of
    :class:`moeq_plugin.integrations.llm_compressor.moequant.routed_recipe.RoutedRecipe` and of the
    host:

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
    refine_steps: int = Field(default=8, ge=0)

    _encoded: dict[str, CodebookWeight] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_not_ours(cls, asked: Any) -> Any:
        if not isinstance(asked, dict):
            return asked
        for name, reason in _NOT_OURS.items():
            if asked.get(name) is not None:
                raise ValueError(f"RWKVQuantModifier {reason}: leave out {name}")
        # a plain checkpoint holds no codebooks; those for element-wise weights are only a default
        plain = {"elementwise": None} if asked.get("fallback_scheme") is not None else {}
        return {**plain, **asked}

    @model_validator(mode="after")
    def _check_formats(self) -> RWKVQuantModifier:
        if self.elementwise is not None and self.elementwise.group_rows != 1:
            raise ValueError(
                "elementwise.group_rows must be 1, an element-wise weight is one row, got "
                f"{self.elementwise.group_rows}"
            )
        if self.fallback_scheme is None:
            return self
        weights_of_scheme(self.fallback_scheme)
        if self.elementwise is not None:
            raise ValueError(
                "fallback_scheme makes a plain compressed-tensors checkpoint, which cannot hold "
                "element-wise weights in a codebook: leave out `elementwise` or fallback_scheme"
            )
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Score all weights, decide, attach the schemes of scalar ones and prepare saving.

        Raises:
            ValueError: if the request cannot succeed; nothing has been changed then.
        """
        self._check_start(state)
        layers = self._start.layers
        takes_default = self.config_groups is None and self.scheme is None
        # to be checked against the model; narrowed to fit each weight once it is known who gets it
        default = {"scalar": self._default_scheme()} if takes_default else None
        request = Request.of(self, state.model, layers, default)
        linears = {
            name: module
            for module, name in request.targeted(state.model).items()
            if isinstance(module, nn.Linear)
        }
        scores = self.score_weights(linears)
        scalar = self._choose(linears, scores)
        coded = {name: linear for name, linear in linears.items() if name not in scalar}
        if takes_default:
            plain = {name: linear for name, linear in linears.items() if name in scalar}
            groups = scheme_groups(plain, weights_of_scheme(W3_GROUP_64), "scalar")
            request = request.with_groups(groups) if groups else request
        if self.fallback_scheme is not None:
            finer = scheme_groups(coded, weights_of_scheme(self.fallback_scheme), "finer")
            # the host looks for names before classes, so that these take the finer scheme
            request, coded = request.with_groups({**request.groups(), **finer}), {}
        self._check_codebooks(coded)
        # after the last refusal: from here on the host and the model are changed
        self._declare_data()
        # to the scalar run a weight in a codebook is one to ignore, as embeddings are
        self._attach(request.ignoring(coded), state, coded)
        self._record.uniformity = {
            name: {**asdict(score), "scalar": name in scalar} for name, score in scores.items()
        }
        return True

    def score_weights(self, linears: dict[str, nn.Linear]) -> dict[str, UniformityScore]:
        """Return what the weights are ranked by; override it to rank them by something else."""
        return score_weights(linears, self.gaps)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Keep encoded weights packed, and say what was done and how many bits it takes."""
        if self._encoded:
            # not when the pass ends: modifiers behind this one may have passes of their own then
            # and look for the modules that are replaced here
            keep_packed(state.model, self._encoded)
        self._record.bits_per_weight = stored_bits_per_weight(state.model)
        logger.info(
            f"{len(self._encoded)} weights in codebooks, {self._record.bits_per_weight:.3f} bits "
            "per quantized weight with all codebooks, scales and zero points"
        )
        return super().on_finalize(state, **kwargs)

    def _attach(self, request: Request, state: State, coded: dict[str, nn.Linear]) -> None:
        """Attach the schemes of scalar weights, and prepare codebooks and saving."""
        self._record = self._new_record(request, state)
        self._encoded = {}  # what a run before this one encoded is of another model
        shared = (request, state, self._record, self._encoded)
        # in the order in which they are called for every layer
        self._phases = (
            Run(request, state, self._record),
            CodebookRun(*shared, coded, self.codebook, self.refine_steps),
        )
        if self.elementwise is not None:
            percentile, weighted = self.elementwise_percentile, self.elementwise_weighted
            elementwise = ElementwiseRun(*shared, self.elementwise, percentile, weighted)
            self._phases = (*self._phases, elementwise)
        describe = partial(write_codebooks, state.model)
        prepare_saving(state.model, self._start.layers, self._record, describe)

    def _default_scheme(self) -> QuantizationScheme:
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        return QuantizationScheme(targets=targets, weights=weights_of_scheme(W3_GROUP_64))

    def _choose(
        self, linears: dict[str, nn.Linear], scores: dict[str, UniformityScore]
    ) -> frozenset[str]:
        groups = deciding_together(linears, self._start.layers)
        if self.thresholds is not None:
            return choose_scalar_below(scores, *self.thresholds, groups=groups)
        return choose_scalar(scores, scalar_frac=self.scalar_frac, groups=groups)

    def _check_codebooks(self, coded: dict[str, nn.Linear]) -> None:
        dim = self.codebook.vector_dim
        wrong = [name for name, linear in coded.items() if linear.in_features % dim]
        if wrong:
            raise ValueError(
                f"codebook.vector_dim {dim} must divide the input columns of every weight, which "
                f"it does not for {', '.join(wrong)}; use 1, or put them into `ignore`"
            )
