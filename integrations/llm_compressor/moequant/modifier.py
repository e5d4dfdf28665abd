"""MoEQuantModifier: GPTQ for Mixture-of-Experts models that damages no expert."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed, is_source_process
from compressed_tensors.offload import disable_offloading
from compressed_tensors.quantization import is_preset_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import Event, State
from llmcompressor.modifiers.quantization.calibration import observe
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator
from torch import nn

from moeq_plugin.core.gptq import revive_dead_columns
from moeq_plugin.core.sampling import EBSSConfig
from moeq_plugin.integrations.llm_compressor import preflight, recipe
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import (
    SensitivityConfig,
    SensitivityModifier,
)
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.calibration.observations import Calibration
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.checkpoint.saving import prepare_saving
from moeq_plugin.integrations.llm_compressor.host import (
    listen_to_batches,
    run_pass,
    run_routed_tokens_only,
    undo_with_oneshot,
)
from moeq_plugin.integrations.llm_compressor.moequant.allocating import AllocatingModifier
from moeq_plugin.integrations.llm_compressor.moequant.run_state import WorkDir, model_digest
from moeq_plugin.integrations.llm_compressor.schemes import (
    describe,
    grid_of,
    observes_activations,
    weight_args,
)
from moeq_plugin.integrations.llm_compressor.self_sampling.calibrate import write_own_text
from moeq_plugin.integrations.llm_compressor.solving import Job, guard, solve_stack, stacks, write
from moeq_plugin.models.moe import MoELayer, find_moe_layers
from moeq_plugin.records.environment import run_facts, versions
from moeq_plugin.records.progress import quantize_progress, tell
from moeq_plugin.records.run import Basis, LinearRecord, RunRecord

# of the host's fields, what tells its progress or a training schedule and not what was asked for
_HOST_STATE = {
    "index", "group", "start", "end", "update", "initialized_", "finalized_", "started_", "ended_",
    "requires_calibration_data",
}  # fmt: skip


class MoEQuantModifier(AllocatingModifier):
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

    Given a budget instead of a scheme (``bits_per_weight`` or ``size_gb``; all its arguments are
    described at :class:`AllocatingModifier`), it measures what every linear loses at each option
    and chooses the schemes that lose least.

    Sample yaml:

    ```yaml
    quant_stage:
      quant_modifiers:
        MoEQuantModifier:
          scheme: W4A16
    ```

    Lifecycle:

    - on_initialize: check everything that can be checked, attach schemes, prepare saving
    - on_calibration_start: hooks that accumulate second moments of routed tokens
    - on_sequential_epoch_end: guard, solve and write one layer
    - on_calibration_end: round what was never called, remove hooks
    - on_finalize: one line that says whether every linear was quantized as asked

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
        work_dir: where to keep what is finished, layer by layer. A run that was killed continues
            there when it is started again, and ends with the same checkpoint, bit for bit. Takes
            as much room as the targeted weights in 16 bit.
    """

    affinity_power: float = Field(default=1.0, ge=0)
    min_effective_tokens: float | None = Field(default=None, ge=0)
    shrinkage: float = Field(default=1.0, ge=0)
    weight_gate_proj: bool = True
    seed: int = 0
    ebss: EBSSConfig = Field(default_factory=EBSSConfig)
    work_dir: str | None = None

    @field_validator("scheme", mode="before")
    @classmethod
    def _known_scheme(cls, scheme: Any) -> Any:
        names = [scheme] if isinstance(scheme, str) else list(scheme or ())
        for name in names:
            if not is_preset_scheme(name):
                near = difflib.get_close_matches(name.upper(), PRESET_SCHEMES, n=3)
                raise ValueError(
                    f"{name!r} is not a scheme; did you mean {near or sorted(PRESET_SCHEMES)}? "
                    "For other grids give config_groups."
                )
        return scheme

    _layers: list[MoELayer] = PrivateAttr(default_factory=list)
    _calibration: Calibration | None = PrivateAttr(default=None)
    _record: RunRecord | None = PrivateAttr(default=None)
    _own_text: bool = PrivateAttr(default=False)  # as calibration data
    _writes_own_text: bool = PrivateAttr(default=False)  # which it has still to write
    _began: float = PrivateAttr(default=0.0)
    _pending: dict[nn.Module, str] = PrivateAttr(default_factory=dict)
    _kept: dict[str, str] = PrivateAttr(default_factory=dict)
    _work: WorkDir | None = PrivateAttr(default=None)
    _restored: set[nn.Module] = PrivateAttr(default_factory=set)
    _undo: contextlib.ExitStack = PrivateAttr(default_factory=contextlib.ExitStack)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the request against model and data, attach schemes and prepare saving.

        Raises:
            ValueError: if the request cannot succeed; nothing has been changed then.
        """
        model = state.model
        self._layers = find_moe_layers(model)
        recipe.check_stack(self, model, self._layers)
        calib = state.data.calib
        preflight.check_data(calib, type(self).__name__, has_experts=bool(self._layers))
        self._writes_own_text = self._own_text = calib is None
        self._began = time.monotonic()
        # without data the host would refuse to go on, unless told that none is needed
        self.requires_calibration_data = calib is not None
        if self.work_dir is not None:
            self._work = WorkDir(self.work_dir, self._identity(model) | recipe.identity(self))
        preflight.check_running_output_dir()
        preflight.check_targets(model, self.resolved_targets)
        if not self._layers:
            logger.info("no MoE layers found: every linear gets plain GPTQ")
        self._kept = preflight.kept_by_default(model, self._layers, self.resolved_targets)
        self._ignore_also([name for name in self._kept if name not in self.ignore])
        targeted = match_named_modules(model, self.resolved_targets, self.ignore)
        preflight.check_not_quantized({module: name for name, module in targeted})
        self.prepare_allocation(model, self._layers)
        if not self.awaits_allocation:
            self._attach_schemes(state)
        return True

    def _attach_schemes(self, state: State) -> None:
        """Attach what was asked for or chosen, and prepare saving."""
        self.adopt_allocation()
        super().on_initialize(state)
        self.check_attached()
        self._pending = {
            module: name for module, name in self._module_names.items() if weight_args(module)
        }
        preflight.check_group_sizes(self._pending)
        self._record = RunRecord(
            modifier=type(self).__name__,
            settings={k: v for k, v in self.model_dump().items() if k not in _HOST_STATE},
            versions=versions(),
            kept=self._kept,
            model=getattr(state.model, "name_or_path", ""),
            calibration="text that the model wrote itself"
            if self._own_text
            else f"{len(state.data.calib)} batches of the data given to oneshot",
        )
        prepare_saving(state.model, self._layers, self._record, self.save_allocation)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Register the hooks that accumulate second moments.

        Without data, let the model write some and run the host's pipeline on it, which comes back
        here and then through all other events.
        """
        work = self._work
        if self._writes_own_text:
            self._writes_own_text = False
            if work is not None:
                work.begin(None)
            text = write_own_text(state.model, self.ebss, work and work.text)
            state.data.calib = text.batches
            run_pass(self, state, text.batches)
            assert self._record is not None  # set while that ran at the latest
            self._record.sampling = text.report
            return
        ranks.check_data_differ(state.data.calib)
        if work is not None:
            work.begin(state.data.calib)
        if self.awaits_allocation:
            self.measure_and_allocate(state, work and work.table)
            self._attach_schemes(state)
        self._layers = find_moe_layers(state.model)  # a modifier before may have removed experts
        recipe.rename(state.model, self._module_names, self._pending)
        self.start_calibration(state.model)
        padding = PaddingWatch(state)
        listen_to_batches(padding, self._undo)
        self._calibration = Calibration(
            affinity_power=self.affinity_power,
            weight_gate_proj=self.weight_gate_proj,
            seed=self.seed,
            padding=padding,
        )
        if not any(observes_activations(module) for module in self._pending):
            # a token that is not routed has weight zero: do not compute what will not count
            run_routed_tokens_only(state.model, self._undo)
        undo_with_oneshot(self._undo)
        if work is not None:
            self._restore(work)
        assert self._record is not None  # set when schemes were attached
        tell(quantize_progress(self._record.linears, 0, self._pending.values()))
        linears = [m for m in self._pending if isinstance(m, nn.Linear)]
        self._calibration.attach(state.model, self._layers, linears, self.register_hook)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Quantize the layer that has just been calibrated."""
        if self._calibration is None:
            return  # everything is done: the run on our own text was
        record, names = self._record, self._module_names
        assert record is not None  # set in on_initialize
        num_finished = len(record.linears)
        modules = [module for module in modules if module not in self._restored]
        super().on_sequential_epoch_end(state, event, modules, **kwargs)
        finished = record.linears[num_finished:]
        if self._work is not None and finished and is_source_process():
            self._work.keep(finished, {name: module for module, name in names.items()})
        if finished:
            tell(quantize_progress(record.linears, len(finished), self._pending.values()))

    def compress_modules(self) -> None:
        """Quantize every linear observed since the last layer; called once per layer."""
        calibration, record = self._calibration, self._record
        assert calibration is not None and record is not None  # set before the host calls this
        owners: dict[str, int] | None = None
        if is_distributed():
            ranks.sum_over_ranks(calibration, self._module_names)
        calibration.check_finite(self._module_names)
        if is_distributed():
            owners = ranks.keep_own_share(calibration, self._module_names)
        num_finished = len(record.linears)
        with torch.no_grad(), disable_offloading():
            for stack in stacks(self._jobs(calibration), self._max_stack()):
                self._compress_stack(stack)
            if owners is not None:
                self._exchange(owners, num_finished)
        calibration.clear_layer()

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Round to nearest what no batch has called, then remove hooks and observers."""
        if self._calibration is None:
            return
        with disable_offloading():
            for module in list(self._pending):
                observe(module, base_name="weight")
                columns = module.weight.shape[1]
                nothing = torch.zeros(columns, columns, device=module.weight.device)
                job = Job([module], weight_args(module), nothing, 1.0, Basis.NONE, 0.0)
                self._compress_stack([job])
        self._undo.close()
        self._calibration = None
        super().on_calibration_end(state, event, **kwargs)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Say in one line whether every linear was quantized as asked."""
        record = self._record
        assert record is not None  # set in on_initialize
        record.run = run_facts(self._began)
        level = "WARNING" if record.count(Basis.NONE) or self._pending else "INFO"
        logger.log(level, record.summary(len(record.linears) + len(self._pending)))
        self._layers = []
        return super().on_finalize(state, **kwargs)

    def sensitivity_modifier(self, config: SensitivityConfig) -> SensitivityModifier:
        """Return what measures for this modifier, rounding as it does."""
        shared = set(SensitivityModifier.model_fields) & set(type(self).model_fields) - _HOST_STATE
        return SensitivityModifier(config=config, **{name: getattr(self, name) for name in shared})

    def _identity(self, model: nn.Module) -> dict[str, Any]:
        """Return what the result depends on beside the data."""
        asked = {k: v for k, v in self.model_dump().items() if k not in {*_HOST_STATE, "work_dir"}}
        return {
            "model": model_digest(model),
            "own text": self._own_text,
            **{f"setting {name}": value for name, value in asked.items()},
            **{f"version of {package}": number for package, number in versions().items()},
        }

    def _restore(self, work: WorkDir) -> None:
        """Take over what an earlier process has finished; it runs along and is not observed."""
        assert self._record is not None  # set in on_initialize
        modules = {name: module for module, name in self._module_names.items()}
        self._record.linears += work.restore(modules)
        self._restored = {modules[record.name] for record in self._record.linears}
        for module in self._restored:
            del self._pending[module]
        if self._restored:
            logger.info(f"{len(self._restored)} linears taken over from {work.path}")

    def _exchange(self, owners: dict[str, int], num_finished: int) -> None:
        """Take over what other ranks have solved; all have the same records afterwards."""
        assert self._record is not None  # set in on_initialize
        modules = {name: module for module, name in self._module_names.items()}
        own = self._record.linears[num_finished:]
        self._record.linears[num_finished:] = ranks.exchange(owners, modules, own)
        for name in owners:
            self._pending.pop(modules[name], None)

    def _ignore_also(self, names: list[str]) -> None:
        self.ignore = [*self.ignore, *names]
        self._resolved_config = None  # resolved once from `ignore`, which has just changed

    def _jobs(self, calibration: Calibration) -> Iterator[Job]:
        """Guard and give away each observation; one job per weight scheme among its linears."""
        while calibration.observations:
            _, observation = calibration.observations.popitem()
            hessian, weight_sum, basis = guard(
                observation,
                calibration,
                min_effective_tokens=self.min_effective_tokens,
                shrinkage=self.shrinkage,
            )
            by_scheme: dict[str, list[nn.Linear]] = {}
            for linear in observation.linears:
                by_scheme.setdefault(weight_args(linear).model_dump_json(), []).append(linear)
            for linears in by_scheme.values():
                yield Job(
                    linears=linears,
                    args=weight_args(linears[0]),
                    hessian=hessian,
                    weight_sum=weight_sum,
                    basis=basis,
                    effective_tokens=observation.moments.effective_tokens,
                )

    def _compress_stack(self, stack: list[Job]) -> None:
        if grid_of(stack[0].args) is None:
            self._compress_with_host(stack)
            return
        rounded = solve_stack(
            stack, block_size=self.block_size, dampening_frac=self.dampening_frac or 0.0
        )
        for job, of_job in zip(stack, rounded, strict=True):
            for linear, loss in write(job, of_job).items():
                self._note(linear, job, Basis.NONE if loss is None else job.basis, loss)

    def _compress_with_host(self, stack: list[Job]) -> None:
        """Let the host's solver round to grids that ours does not know (float types, blocks)."""
        for job in stack:
            revive_dead_columns(job.hessian)  # the host would set their weights to zero
            for linear in job.linears:
                self._hessians[linear] = job.hessian.clone()
                self._num_samples[linear] = torch.ones((), device=job.hessian.device)
                self.compress_module_list([linear])
                self._note(linear, job, job.basis, None)

    def _note(self, linear: nn.Module, job: Job, basis: Basis, loss: float | None) -> None:
        assert self._record is not None
        self._record.linears.append(
            LinearRecord(
                name=self._pending.pop(linear),
                scheme=describe(job.args),
                basis=basis,
                effective_tokens=job.effective_tokens,
                loss=loss,
            )
        )

    def _max_stack(self) -> int | None:
        """Translate the host's ``batched_quantization``; "auto" means what memory allows."""
        if self.batched_quantization == "auto":
            return None
        return self.batched_quantization or 1
