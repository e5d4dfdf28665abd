"""MoEQuantModifier: GPTQ for Mixture-of-Experts models that damages no expert."""

from __future__ import annotations

from typing import Any

from llmcompressor.core import State
from loguru import logger

from moeq_plugin.core.dense_words import NO_EXPERTS, is_dense
from moeq_plugin.integrations.llm_compressor import places
from moeq_plugin.integrations.llm_compressor.checkpoint.saving import prepare_saving
from moeq_plugin.integrations.llm_compressor.moequant.budgeted import BudgetedModifier
from moeq_plugin.integrations.llm_compressor.moequant.request import Request
from moeq_plugin.integrations.llm_compressor.moequant.run import Run


class MoEQuantModifier(BudgetedModifier):
    """Quantize a model with GPTQ whose second moments are weighted by the router.

    For routed expert ``e`` the Hessian is ``H_e = 2 sum_t c_te^p x_t x_t^T`` over the tokens
    routed to it, with ``c_te`` the combine weight that the model multiplies the expert's output
    with and ``p`` the ``affinity_power`` (AGQ, arXiv:2505.03804, Eq. 18-19). A shared expert
    behind a sigmoid gate is weighted by its gate; attention, dense layers and ungated shared
    experts get plain GPTQ. All scheme arguments are those of the host's ``GPTQModifier``.

    Where we differ from the paper and its released code: weights are gathered with the indices
    that dispatch the tokens; padding has weight zero; an expert that saw too little borrows the
    second moments of its layer instead of losing its weights; routers and shared-expert gates
    stay in 16 bit unless they are targeted by name.

    Given a budget instead of a scheme (``bits_per_weight``, ``size_gb`` or ``allocation``), it
    measures what every linear loses at each option and chooses the schemes that lose least.

    Sample yaml:

    ```yaml
    quant_stage:
      quant_modifiers:
        MoEQuantModifier:
          scheme: W4A16
    ```

    Lifecycle:

    - on_initialize: check everything that can be checked, attach schemes, prepare saving
    - on_calibration_start: with a budget measure, choose and attach schemes; hooks that
      accumulate second moments of routed tokens
    - on_sequential_epoch_end: guard, solve and write one layer
    - on_calibration_end: round what was never called, remove hooks
    - on_finalize: one line that says whether every linear was quantized as asked

    Arguments are those of
    :class:`~moeq_plugin.integrations.llm_compressor.moequant.budgeted.BudgetedModifier`, of
    :class:`~moeq_plugin.integrations.llm_compressor.moequant.routed_recipe.RoutedRecipe` and of the
    host.
    """

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the request against model and data, attach schemes and prepare saving.

        Raises:
            ValueError: if the request cannot succeed; nothing has been changed then.
        """
        self._check_start(state)
        if is_dense(state.model.config.model_type, len(self._start.layers)):
            logger.warning(NO_EXPERTS)
        # the digest of the model is taken here, while no scheme and no hook has touched it
        self._kept_state = self._find_kept_state(state.model)
        self._request = Request.of(self, state.model, self._start.layers)
        self._allocator = self._make_allocator(state.model)
        if self._allocator is not None:
            self._allocator.check_no_codebooks()
        # from here on the host and the model are changed
        self._declare_run(state)
        return True

    def _attach(self, state: State) -> None:
        """Attach what was asked for or chosen, and prepare saving."""
        request, allocator = self._request, self._allocator
        if allocator is not None:
            groups, unquantized = allocator.config_groups()
            request = request.with_groups(groups).ignoring(unquantized)
        self._record = self._new_record(request, state)
        self._phases = (Run(request, state, self._record, self._kept_state),)
        work_dir = self._kept_state.path if self._kept_state is not None else None
        places.check_running_room(state.model, work_dir)
        if allocator is not None:
            # patterns chose the linears: were they those that the allocation meant?
            allocator.check_attached()
        prepare_saving(state.model, self._start.layers, self._record, self._save_allocation)
