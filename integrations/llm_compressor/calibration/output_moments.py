"""What each output of a linear counts, and together with which: second moments of gradients.

One backward pass through the whole model, before anything is rounded, notes what gradients come
back to each layer. When a layer is about to be rounded it runs once more, backward too, for the
gradients of its linears: the moments of one layer are held at a time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.utils import patch_attr
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils.helpers import eval_context
from torch import distributed, nn

from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.calibration.gradient_moments import GradientMoments
from moeq_plugin.integrations.llm_compressor.schemes import unquantized
from moeq_plugin.models.gradients import num_tokens
from moeq_plugin.models.layer_replay import LayerReplay

_MAX_TOKENS = 16384  # that the backward pass sees
_Moments = dict[tuple[str, ...], torch.Tensor]


class OutputMoments:
    """Second moments of gradients at the outputs of linears, layer by layer.

    Phases: :meth:`record` while the model is as it was, then for each layer :meth:`measure` before
    any of its weights changes, and :meth:`of`.

    Args:
        model: as it is before anything is rounded.
        linears: what will be rounded, by name.
    """

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
        self._model, self._linears = model, dict(linears)
        self._names = {linear: name for name, linear in linears.items()}
        self._layers = {n: _layer_of(model, n) for n in self._linears}
        self._pending = {layer for layer in self._layers.values() if layer is not None}
        self._attention: str = getattr(model.config, "_attn_implementation")  # noqa: B009 - untyped
        self._replay = LayerReplay({n: model.get_submodule(n) for n in sorted(self._pending)})
        self._num_tokens = 0  # of all ranks
        self._moments: _Moments = {}
        self._without: dict[str, None] = {}  # in order and once

    def record(self, batches: Iterable[Mapping[str, torch.Tensor]], seed: int) -> None:
        """Run the backward pass; with several ranks each runs its own batches.

        Args:
            batches: this rank's calibration data.
            seed: of the tokens that the model draws.

        Raises:
            ValueError: if gradients do not come back, or memory does not suffice.
        """
        # the limit on tokens is that of all ranks: one has to know what those before it have used
        before, _ = ranks.over_ranks(Counter({0: sum(num_tokens(batch) for batch in batches)}))
        limits = {"max_tokens": _MAX_TOKENS, "tokens_before": before[0]}
        try:
            with self._as_it_is(self._model):
                self._replay.record(self._model, batches, **limits, seed=seed)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                "row_feedback runs one backward pass through the whole model, which does not fit "
                "into memory: take a smaller batch_size, or leave row_feedback off"
            ) from error
        self._num_tokens = sum(ranks.gather(self._replay.num_tokens))

    def measure(self, linears: Iterable[nn.Linear]) -> None:
        """Measure the layers of linears that are about to be rounded, where that is still to do.

        What was measured before is dropped when another layer begins. Every rank comes here before
        any of them changes a weight, which ranks may share: adding up makes them wait for each
        other.
        """
        ours = {self._layers[self._names[linear]] for linear in linears} - {None}
        # of all ranks: they may have called different experts
        of_all = {layer for of_rank in ranks.gather(ours) for layer in of_rank}
        begun = sorted(self._pending & of_all)
        if begun:
            self._moments.clear()
        for layer in begun:
            self._pending.remove(layer)
            self._moments |= self._of_layer(layer)

    def of(self, linears: Sequence[nn.Linear]) -> torch.Tensor | None:
        """Return ``[out, out]`` of all outputs of linears that share an input, in this order.

        ``None`` where no gradient came back, and of what is in no layer.
        """
        names = [self._names[linear] for linear in linears]
        group = next((group for group in self._moments if set(names) <= set(group)), None)
        if group is None:
            self._without.update(dict.fromkeys(names))
            return None
        sizes = [len(self._linears[name].weight) for name in group]
        moments = self._moments[group]
        rows = torch.arange(len(moments), device=moments.device).split(sizes)
        chosen = torch.cat([rows[group.index(name)] for name in names])
        return moments.index_select(0, chosen).index_select(1, chosen)

    def in_words(self) -> str:
        """Return what the rounding rests on, and what was rounded without."""
        found = f"gradients of {self._num_tokens} tokens"
        if not self._without:
            return found
        return (
            f"{found}, but not for {len(self._without)} linears such as {next(iter(self._without))}"
        )

    def _of_layer(self, layer: str) -> _Moments:
        inside = {n: m for n, m in self._linears.items() if self._layers[n] == layer}
        gradients = GradientMoments(inside)
        module = self._model.get_submodule(layer)
        with self._as_it_is(module), ExitStack() as undo:
            gradients.listen(undo)
            self._replay.replay(module, gradients.add_up)
        found = {
            tuple(self._names[linear] for linear in group): moments
            for group, moments in gradients.moments.items()
        }
        return self._sum_over_ranks(found) if is_distributed() else found

    @contextlib.contextmanager
    def _as_it_is(self, module: nn.Module) -> Iterator[None]:
        """Run the model or a part of it as if nobody calibrated.

        The host does so with eager attention, which is causal by its mask alone; the masks that are
        kept with a layer's arguments are those of the attention that the model has otherwise.
        """
        config, attention = self._model.config, "_attn_implementation"
        with (
            HooksMixin.disable_hooks(),
            unquantized(module),
            eval_context(module),
            patch_attr(config, attention, self._attention),
        ):
            yield

    def _sum_over_ranks(self, ours: _Moments) -> _Moments:
        sums = {}
        for group in sorted({group for of_rank in ranks.gather(set(ours)) for group in of_rank}):
            weights = [self._linears[name].weight for name in group]
            size = sum(len(weight) for weight in weights)
            nothing = torch.zeros(size, size, device=weights[0].device)
            sums[group] = ours.get(group, nothing)
            distributed.all_reduce(sums[group])
        return sums


def _layer_of(model: nn.Module, name: str) -> str | None:
    """Return the outermost member of a list of modules that holds a module; ``None`` without."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return None
