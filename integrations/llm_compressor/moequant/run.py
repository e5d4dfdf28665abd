"""One quantization of one model, from attached schemes to the record of what came out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import cast

import torch
from compressed_tensors.distributed import is_distributed, is_source_process
from compressed_tensors.offload import disable_offloading
from llmcompressor.core import Event, EventType, State
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization.calibration import observe
from loguru import logger
from pydantic import PrivateAttr
from torch import nn

from moeq_plugin.core.corrected_target import PairedMoments
from moeq_plugin.core.factorization import revive_dead_columns
from moeq_plugin.integrations.llm_compressor import host, preflight, recipe
from moeq_plugin.integrations.llm_compressor.calibration import rank_moments, ranks
from moeq_plugin.integrations.llm_compressor.calibration.observations import Calibration
from moeq_plugin.integrations.llm_compressor.calibration.output_moments import OutputMoments
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.moequant.request import Request
from moeq_plugin.integrations.llm_compressor.moequant.run_state import RunState
from moeq_plugin.integrations.llm_compressor.schemes import (
    describe,
    detach_scheme,
    grid_of,
    observes_activations,
    weight_args,
    weight_of,
)
from moeq_plugin.integrations.llm_compressor.solving import Job, solve_stack, stacks, write
from moeq_plugin.integrations.llm_compressor.two_streams.begin import begin_streams
from moeq_plugin.integrations.llm_compressor.two_streams.streams import TwoStreams
from moeq_plugin.integrations.llm_compressor.unfinished import mark_changed
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.records.borrowing import Borrowing
from moeq_plugin.records.run import Basis, LinearRecord, RunRecord


class _Host(GPTQModifier):
    """llm-compressor's modifier, which attaches schemes and observers, with our solver in it."""

    _solve: Callable[[], None] = PrivateAttr()

    def compress_modules(self) -> None:
        """Quantize what was observed since the last layer; called once per layer."""
        self._solve()


class Run:
    """Quantizes the linears of a request to grids, layer by layer.

    Phases: constructing it attaches the schemes; then :meth:`begin`, :meth:`finish_layer` once per
    layer, :meth:`end` and :meth:`close`.

    Args:
        request: what to do.
        state: the host's.
        record: filled in linear by linear.
        kept_state: where finished layers are kept and found again, ``None`` for nowhere.
    """

    def __init__(
        self, request: Request, state: State, record: RunRecord, kept_state: RunState | None = None
    ) -> None:
        self.record = record
        self._request, self._kept_state = request, kept_state
        self._undo = ExitStack()
        host.undo_with_oneshot(self._undo)
        # a modifier of the host's that no recipe holds: it gets no events but those handed on here
        # its own check of group sizes names a way out that is none: ours comes when all is attached
        fields = dict(request.host_fields) | {"bypass_divisibility_checks": True}
        self._host = _Host(**deepcopy(fields))
        self._host._solve = self._solve_layer
        self._names = request.targeted(state.model)
        # what is still to be quantized; shrinks as records are written
        self._pending = dict(self._names)
        self._undo.callback(self._detach_pending)
        self._host.on_initialize(state)
        attached = {module: weight_args(module) for module in self._names}
        self._args = {module: args for module, args in attached.items() if args is not None}
        self._pending = {module: self._names[module] for module in self._args}
        self._restored: set[nn.Module] = set()
        self._outputs: OutputMoments | None = None
        # finished before, but still with their 16-bit weights, and the number each was kept under
        self._kept_for: dict[nn.Module, int] = {}
        self._streams: TwoStreams | None = None  # with a corrected target only
        self._padding = PaddingWatch(state)
        self._calibration = request.calibration(self._padding)
        # only with schemes attached are the group sizes of all presets and patterns known
        preflight.check_group_sizes(self._pending)

    def begin(self, state: State) -> None:
        """Register the hooks that accumulate second moments."""
        model = state.model
        layers = find_moe_layers(model)  # a modifier before ours may have removed experts
        recipe.rename(model, self._names, self._pending)
        # observers, and hooks on activations that are quantized too; not the hooks that the host's
        # own event would add, which sum up Hessians of all tokens
        self._host.start_calibration(model)
        self._undo.callback(self._host.remove_hooks)
        host.listen_to_batches(self._padding, self._undo)
        if not any(observes_activations(module) for module in self._pending):
            # a token that is not routed has weight zero: do not compute what will not count
            host.run_routed_tokens_only(model, self._undo)
        if self._request.row_feedback:
            # before finished layers are taken over: gradients are those of the model as it was, in
            # a run that goes on as in one that begins
            linears = {n: m for m, n in self._pending.items() if isinstance(m, nn.Linear)}
            self._outputs = OutputMoments(model, linears)
            self._outputs.record(host.calibration_batches(state), self._request.seed)
        if self._request.corrected_target:
            new_calibration = partial(self._request.calibration, self._padding)
            self._streams = begin_streams(
                model, layers, self._names, new_calibration, self._host, self.record
            )
        in_stages = self._streams.covered() if self._streams is not None else set()
        self._restore(in_stages)  # before hooks are registered: what is finished gets none
        observed = [m for m in self._pending if isinstance(m, nn.Linear) and m not in in_stages]
        self._calibration.attach(model, layers, observed, self._host.register_hook)

    def finish_layer(self, state: State, modules: list[nn.Module]) -> None:
        """Quantize the layer that has just been calibrated.

        Args:
            state: the host's.
            modules: of the layer.
        """
        num_before = len(self.record.linears)
        # what is finished is on its grid already and is not observed once more
        modules = [module for module in modules if module not in self._restored]
        event = Event(type_=EventType.SEQUENTIAL_EPOCH_END)
        self._host.on_sequential_epoch_end(state, event, modules)  # comes to _solve_layer
        if self._streams is not None:
            self._solve_stages(self._streams, state, modules)
        finished = self.record.linears[num_before:]
        if self._kept_state is not None and is_source_process():
            self._kept_state.note(finished, {name: m for m, name in self._names.items()})

    def end(self, state: State) -> None:
        """Round to nearest what no batch has called, then remove hooks and observers.

        Raises:
            ValueError: if no batch has called anything at all.
        """
        if not self.record.linears:
            _check_reached(list(self._pending.values()))
        with disable_offloading():
            for module in list(self._pending):
                observe(module, base_name="weight")
                weight, args = weight_of(module), self._args[module]
                columns = weight.shape[1]
                nothing = torch.zeros(columns, columns, device=weight.device)
                linear = cast(nn.Linear, module)  # or an embedding, whose weight is laid out alike
                self._solve_stack([Job([linear], args, nothing, 1.0, Basis.NONE, 0.0)])
        self._undo.close()
        # last: it takes off the observers that rounding to nearest has just asked, and switches the
        # schemes on, so that the model computes from here on what its checkpoint will
        self._host.end_calibration(state.model)

    def pending(self) -> list[str]:
        """Return the names of what is still to be quantized."""
        return list(self._pending.values())

    def close(self, state: State) -> None:
        """Say in one line whether every linear was quantized as asked."""
        unwell = any(self.record.count(basis) for basis in (Basis.NONE, Basis.FEW)) or self._pending
        num_targets = len(self.record.linears) + len(self._pending)
        logger.log("WARNING" if unwell else "INFO", self.record.summary(num_targets))
        borrowing = Borrowing.of(self.record.linears)
        if borrowing.is_notable:
            # no log: people turn the host's down, and would take this for a run that went well
            warnings.warn(borrowing.sentence(), stacklevel=2)
        if self._outputs is not None:
            self.record.run["row feedback"] = self._outputs.in_words()
        self._host.on_finalize(state)

    def _detach_pending(self) -> None:
        """After a failure: leave what was not quantized as it was before the run."""
        for module in self._pending:
            detach_scheme(module)

    def _restore(self, later: Container[nn.Module]) -> None:
        """Take over what an earlier process has finished; it runs along and is not observed.

        Args:
            later: modules whose 16-bit weights are still needed, until their layer is finished.
        """
        if self._kept_state is None:
            return
        modules = {name: module for module, name in self._names.items()}
        for number, records in self._kept_state.restore(modules, later).items():
            self.record.linears += records
            self._kept_for.update({modules[r.name]: number for r in records})
        self._restored = set(self._kept_for)
        for module in self._restored:
            del self._pending[module]
        self._kept_for = {m: number for m, number in self._kept_for.items() if m in later}
        if self._restored:
            logger.info(f"{len(self._restored)} linears taken over from {self._kept_state.path}")

    def _solve_layer(self) -> None:
        """Quantize what was observed since the last layer."""
        self._solve(self._calibration)

    def _solve_stages(self, streams: TwoStreams, state: State, modules: list[nn.Module]) -> None:
        """Quantize a decoder layer stage by stage, or put in what an earlier process made of it."""
        with disable_offloading():
            for calibration in streams.stages(state, self._pending, modules):
                self._solve(calibration)
            of_layer = {child for module in modules for child in module.children()}
            numbers = {self._kept_for.pop(m) for m in of_layer & self._kept_for.keys()}
            if self._kept_state is not None and numbers:
                ranks.wait_for_all()  # some may still be running the layer as it was
                for number in sorted(numbers):
                    self._kept_state.put(number, {name: m for m, name in self._names.items()})
            streams.leave(modules)

    def _solve(self, calibration: Calibration) -> None:
        """Quantize every linear of an observation, with what all ranks have seen."""
        owners: dict[str, int] = {}
        if self._outputs is not None:
            # of the whole layer, before the first of its stages
            observed = calibration.observations.values()
            self._outputs.measure(x for observation in observed for x in observation.linears)
        # in this order: a rank that raises while others wait for it would leave them waiting, so
        # all have the same sums, and raise together, before any of them drops its share
        if is_distributed():
            rank_moments.sum_over_ranks(calibration, self._names)
        calibration.check_finite(self._names)
        if is_distributed():
            owners = rank_moments.keep_own_share(calibration, self._names)
        num_before = len(self.record.linears)
        with torch.no_grad(), disable_offloading():
            for stack in stacks(self._jobs(calibration), self._max_stack(), self._request.solver):
                self._solve_stack(stack)
            if is_distributed():
                self._exchange(owners, num_before)
        calibration.clear_layer()

    def _jobs(self, calibration: Calibration) -> Iterator[Job]:
        """Guard and give away each observation; one job per weight scheme among its linears."""
        observations = calibration.observations
        while observations:
            # given away, so that second moments are freed as their stack is solved
            _, observation = observations.popitem()
            hessian, weight_sum, basis = self._request.guard(observation, calibration)
            if isinstance(observation.moments, PairedMoments):
                self._request.correct(observation, hessian, basis)
            effective_tokens = observation.moments.effective_tokens
            by_scheme: dict[str, list[nn.Linear]] = {}
            for linear in observation.linears:
                by_scheme.setdefault(self._args[linear].model_dump_json(), []).append(linear)
            for linears in by_scheme.values():
                args = self._args[linears[0]]
                outputs = self._outputs.of(linears) if self._outputs is not None else None
                yield Job(linears, args, hessian, weight_sum, basis, effective_tokens, outputs)

    def _solve_stack(self, stack: list[Job]) -> None:
        if grid_of(stack[0].args) is None:
            self._solve_with_host(stack)
            return
        rounded = solve_stack(stack, self._request.solver)
        for job, of_job in zip(stack, rounded, strict=True):
            for linear, loss in write(job, of_job).items():
                self._note(linear, job, Basis.NONE if loss is None else job.basis, loss)

    def _solve_with_host(self, stack: list[Job]) -> None:
        """Let the host's solver round to grids that ours does not know (float types, blocks)."""
        for job in stack:
            revive_dead_columns(job.hessian)  # the host would set their weights to zero
            for linear in job.linears:
                mark_changed(linear)
                # a copy for each: the host changes it, and siblings share it
                host.solve_with_host(self._host, linear, self._names[linear], job.hessian.clone())
                self._note(linear, job, job.basis, None)

    def _note(self, linear: nn.Linear, job: Job, basis: Basis, loss: float | None) -> None:
        name, scheme = self._pending.pop(linear), describe(job.args)
        record = LinearRecord(name, scheme, basis, job.effective_tokens, loss)
        self.record.linears.append(record)

    def _exchange(self, owners: dict[str, int], num_before: int) -> None:
        """Take over what other ranks have solved; all have the same records afterwards."""
        modules = {name: module for module, name in self._names.items()}
        own = self.record.linears[num_before:]
        self.record.linears[num_before:] = rank_moments.exchange(owners, modules, own)
        for name in owners:
            self._pending.pop(modules[name], None)

    def _max_stack(self) -> int | None:
        """Translate the host's ``batched_quantization``; "auto" means what memory allows."""
        batched = self._host.batched_quantization
        return None if batched == "auto" else batched or 1


def _check_reached(pending: list[str]) -> None:
    """Refuse a pass in which the host has called the model, and none of it was to be quantized.

    Raises:
        ValueError: saying what can be done.
    """
    if pending:
        raise ValueError(
            f"the calibration data have reached none of {len(pending)} linears, such as "
            f"{pending[0]}: llm-compressor cuts this model so that its layers get no data, and all "
            "would be rounded to nearest, which was not asked for. Nothing is saved; "
            'oneshot(..., pipeline="basic"), which holds the whole model in memory, cuts none'
        )
