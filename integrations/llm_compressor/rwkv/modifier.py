"""RWKVQuantModifier: a scalar grid for weights of evenly spread values, codebooks for the rest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llmcompressor.core import State
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from torch import nn
from transformers import PreTrainedModel

from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.hybrid import choose_scalar, choose_scalar_below
from moeq_plugin.core.uniformity import Gaps, UniformityScore
from moeq_plugin.integrations.llm_compressor import places, recipe
from moeq_plugin.integrations.llm_compressor.allocation.allocator import BitAllocator
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.integrations.llm_compressor.checkpoint.saving import prepare_saving
from moeq_plugin.integrations.llm_compressor.moequant.budgeted import BudgetedModifier
from moeq_plugin.integrations.llm_compressor.moequant.request import Request
from moeq_plugin.integrations.llm_compressor.moequant.run import Run
from moeq_plugin.integrations.llm_compressor.rwkv.codebook_run import CodebookRun
from moeq_plugin.integrations.llm_compressor.rwkv.elementwise_run import ElementwiseRun
from moeq_plugin.integrations.llm_compressor.rwkv.encoded_weights import EncodedWeights
from moeq_plugin.integrations.llm_compressor.rwkv.saving import write_codebooks
from moeq_plugin.integrations.llm_compressor.rwkv.scheme_choice import (
    FormatChoice,
    check_vectors,
    deciding_together,
    default_scheme,
    score_weights,
    stored_bits_per_weight,
    weights_of_scheme,
    with_default_scheme,
    with_finer_scheme,
)
from moeq_plugin.models.packed import packed_modules

# from two bits to sixteen; the codebooks are the best of their size that were tried, and the sizes
# are those between which weights of one model differ: see docs/rwkv.md
DEFAULT_OPTIONS = (
    "CB4D2_G64x32", "CB5D2_G256x64", "CB6D2_G256x64", "CB7D2_G512x64", "W4A16_G64", "W8A16_G64",
    "UNQUANTIZED",
)  # fmt: skip
# one token in a thousand has a gradient that is a hundred or a thousand times that of others, and
# the mean of squares would be that of this token; 99 of 100 stay below eight times the median
_SENSITIVITY = SensitivityConfig(gradient_limit=10.0)
# what decides without measuring, and would contradict a budget
_DECIDE = ("scalar_frac", "thresholds", "gaps", "codebook", "fallback_scheme")


class RWKVQuantModifier(BudgetedModifier):
    """Quantize with GPTQ on a scalar grid or with codebooks, whatever suits each weight.

    Given a budget (``bits_per_weight`` or ``size_gb``), what each weight loses in every option,
    codebooks and grids, is measured and the least total loss within the budget chosen. Without one
    weights are told apart by a proxy that looks at no data:

    The values of a weight are sorted; the gaps between them give a coarse and a fine proxy of its
    uniformity (RWKVQuant, arXiv:2505.03803, :mod:`moeq_plugin.core.uniformity`). The most uniform
    weights, nine of ten, get a scalar grid, the others a codebook, both with GPTQ's compensation.
    RWKV's element-wise weights (token shift, ``k_k``, ``k_a``, ``r_k``) can have codebooks fitted
    by the second moments of what they multiply. Embedding, head, norms and biases stay in 16 bit,
    and the low-rank factors that feed the recurrent state unless ``targets`` name them.

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
    - on_calibration_start: with a budget measure and choose; hooks that accumulate second moments
    - on_sequential_epoch_end: solve one layer's weights on grids, encode its others
    - on_calibration_end: round what was never called, remove hooks
    - on_finalize: replace encoded modules by packed ones, which is what will be saved; without a
      modifier behind, those of a layer have been replaced when the next was done

    Arguments beside those of
    :class:`~moeq_plugin.integrations.llm_compressor.moequant.budgeted.BudgetedModifier`, of
    :class:`~moeq_plugin.integrations.llm_compressor.moequant.routed_recipe.RoutedRecipe` and of the
    host:

    Args:
        options: what a budget chooses from: grids as there, and codebooks such as ``CB6D2_G64x32``
            (:mod:`moeq_plugin.integrations.llm_compressor.allocation.options`).
        sensitivity: as there; gradients of single tokens are limited by default.
        scalar_frac: share of the linears, by number, that stay scalar.
        thresholds: ``(tau_c, tau_f)``: stay scalar if both proxies are below, as in the paper,
            instead of by rank. The published (1.54, 30) belong to ``gaps="unique"`` and float16.
        gaps: see :func:`moeq_plugin.core.uniformity.score_uniformity`.
        codebook: format of the other weights.
        fallback_scheme: a scalar scheme for the other weights instead of codebooks, a preset's
            name or fields of its weights such as ``{"num_bits": 4, "symmetric": False,
            "group_size": 64}``. The checkpoint is plain compressed-tensors then.
        elementwise: format of element-wise weights, each of which counts as one row; ``None``
            leaves them in 16 bit: they are few, and lose more than they save.
        elementwise_weighted: fit their codebooks by second moments; otherwise all channels count
            alike.
        elementwise_percentile: larger activations of a sequence's channel are clipped to this.
        refine_steps: see :func:`moeq_plugin.core.codebook_solver.solve_codebook`.
    """

    options: list[str] = Field(default_factory=lambda: list(DEFAULT_OPTIONS))
    sensitivity: SensitivityConfig | str = _SENSITIVITY
    scalar_frac: float = Field(default=0.9, ge=0, le=1)
    thresholds: tuple[float, float] | None = None
    gaps: Gaps = "quantile"
    codebook: CodebookFormat = CodebookFormat(6, 2, group_rows=64, group_columns=32)
    fallback_scheme: str | dict[str, Any] | None = None
    elementwise: CodebookFormat | None = None
    elementwise_weighted: bool = True
    elementwise_percentile: float = Field(default=99.0, gt=0, le=100)
    refine_steps: int = Field(default=8, ge=0)

    _choice: FormatChoice = PrivateAttr()  # there from the start only without a budget

    @model_validator(mode="after")
    def _check_formats(self) -> RWKVQuantModifier:
        if self.elementwise is not None and self.elementwise.group_rows != 1:
            raise ValueError(
                "elementwise.group_rows must be 1, an element-wise weight is one row, got "
                f"{self.elementwise.group_rows}"
            )
        _check_decided_once(self.given())
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
        """Decide by scores unless a budget is given, attach schemes and prepare saving.

        Raises:
            ValueError: if the request cannot succeed; nothing has been changed then.
        """
        self._check_start(state)
        # the digest of the model is taken here, while no scheme and no hook has touched it
        self._kept_state = self._find_kept_state(state.model)
        takes_default = self.config_groups is None and self.scheme is None
        # to be checked against the model; narrowed to fit each weight once it is known who gets it
        default = {"scalar": default_scheme(self.targets)} if takes_default else None
        self._request = Request.of(self, state.model, self._start.layers, default)
        self._allocator = self._make_allocator(state.model)
        if self._allocator is None:
            self._choice = self._choose_by_proxy(state.model)
        # after the last refusal: from here on the host and the model are changed
        self._declare_run(state)
        return True

    def score_weights(self, linears: dict[str, nn.Linear]) -> dict[str, UniformityScore]:
        """Return what the weights are ranked by; override it to rank them by something else."""
        return score_weights(linears, self.gaps)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Keep encoded weights packed, and say what was done and how many bits it takes."""
        # modifiers behind this one may have looked for modules that are replaced here
        result = super().on_finalize(state, **kwargs)
        self._record.bits_per_weight = stored_bits_per_weight(state.model)
        logger.info(
            f"{len(packed_modules(state.model))} weights in codebooks, "
            f"{self._record.bits_per_weight:.3f} bits per quantized weight with all codebooks, "
            "scales and zero points"
        )
        return result

    def _attach(self, state: State) -> None:
        """Attach the schemes of scalar weights, and prepare codebooks and saving."""
        choice = self._choose_by_loss(self._allocator) if self._allocator else self._choice
        # to the scalar run a weight in a codebook is one to ignore, as embeddings are
        request = choice.request.ignoring(choice.codebooks)
        self._record = self._new_record(request, state)
        self._record.uniformity = dict(choice.uniformity)
        kept_state, shared = self._kept_state, (request, state)
        places.check_running_room(state.model, kept_state.path if kept_state is not None else None)
        # in the order in which they are called for every layer
        run = Run(*shared, self._record, kept_state)
        encoded = EncodedWeights(self._record, kept_state)
        behind, forms, steps = recipe.neighbours(self)[1], choice.codebooks, self.refine_steps
        self._phases = (run, CodebookRun(*shared, encoded, forms, steps, is_last=not behind))
        if self.elementwise is not None:
            percentile, weighted = self.elementwise_percentile, self.elementwise_weighted
            elementwise = ElementwiseRun(state, encoded, self.elementwise, percentile, weighted)
            self._phases = (*self._phases, elementwise)
        if self._allocator is not None:
            self._allocator.check_attached()
        save_more = partial(self._save_more, state.model)
        prepare_saving(state.model, self._start.layers, self._record, save_more)

    def _save_more(self, model: PreTrainedModel, directory: Path) -> None:
        write_codebooks(model, directory)
        self._save_allocation(directory)

    def _choose_by_loss(self, allocator: BitAllocator) -> FormatChoice:
        """Return what the allocation says."""
        groups, unquantized = allocator.config_groups()
        request = self._request.ignoring(unquantized)
        # without a single grid the default stands, of which nothing is left
        request = request.with_groups(groups) if groups else request
        return FormatChoice(request, allocator.codebooks(), {})

    def _choose_by_proxy(self, model: PreTrainedModel) -> FormatChoice:
        """Score all weights and decide by the scores.

        Raises:
            ValueError: if a codebook does not fit a weight that is to have one.
        """
        linears = {
            name: module
            for module, name in self._request.targeted(model).items()
            if isinstance(module, nn.Linear)
        }
        scores = self.score_weights(linears)
        scalar = self._choose_scalar(linears, scores)
        uniformity = {
            name: {**asdict(score), "scalar": name in scalar} for name, score in scores.items()
        }
        request = self._request
        if self.config_groups is None and self.scheme is None:
            request = with_default_scheme(request, linears, scalar)
        coded = {name: linear for name, linear in linears.items() if name not in scalar}
        if self.fallback_scheme is not None:
            return FormatChoice(
                with_finer_scheme(request, coded, self.fallback_scheme), {}, uniformity
            )
        check_vectors(coded, self.codebook)
        return FormatChoice(request, dict.fromkeys(coded, self.codebook), uniformity)

    def _choose_scalar(
        self, linears: dict[str, nn.Linear], scores: dict[str, UniformityScore]
    ) -> frozenset[str]:
        groups = deciding_together(linears, self._start.layers)
        if self.thresholds is not None:
            return choose_scalar_below(scores, *self.thresholds, groups=groups)
        return choose_scalar(scores, scalar_frac=self.scalar_frac, groups=groups)


def _check_decided_once(given: Collection[str]) -> None:
    """Refuse fields that decide without measuring beside a budget, which would not heed them.

    Raises:
        ValueError: naming them.
    """
    contradicting = [name for name in _DECIDE if name in given]
    if contradicting and {"bits_per_weight", "size_gb", "allocation"}.intersection(given):
        raise ValueError(
            "a budget chooses among `options` by what they lose: leave out "
            f"{' and '.join(contradicting)}"
        )
