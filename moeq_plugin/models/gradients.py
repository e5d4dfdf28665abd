"""How much a model's prediction depends on each output of each linear: the Fisher information.

One backward pass per batch, of the log-likelihood of tokens that the model itself draws at every
position. Then the mean of squared gradients is the diagonal of the Fisher matrix, and half of
``gradient^2 * error^2`` is the KL divergence that a small error costs, in nats. Taking the text's
own tokens instead would measure how wrong the model is, not how sure.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moeq_plugin.core.names import pool_of
from moeq_plugin.models.moe import MoELayer, RoutingTrace
from moeq_plugin.models.surprise import surprise

_PRIOR_TOKENS = 16  # an expert with fewer tokens takes much of its weights from its layer


class OutputGradients:
    """Squared gradients at the outputs of linears, with what their tokens weigh.

    Args:
        names: the linears and their names.
        layers: the model's MoE layers.
        limit: see :func:`limited`; ``None`` takes gradients as they are.
    """

    def __init__(
        self,
        names: Mapping[nn.Linear, str],
        layers: Iterable[MoELayer],
        limit: float | None = None,
    ) -> None:
        self.num_tokens = 0
        self._limit = limit
        self._names = dict(names)
        self._layers = list(layers)
        self._squares = {
            m: torch.zeros(len(m.weight), dtype=torch.float64, device=m.weight.device)
            for m in names
        }
        self._weights: dict[nn.Module, float] = dict.fromkeys(names, 0.0)
        self._keep: torch.Tensor | None = None

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, torch.Tensor]],
        *,
        max_tokens: int,
        tokens_before: int = 0,
        router_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Run forward and backward over batches until ``max_tokens`` tokens have been seen.

        Args:
            model: a causal language model whose experts run on routed tokens only.
            batches: ``input_ids`` and maybe ``attention_mask``, ``[batch, sequence]``.
            max_tokens: the batch that reaches this many is the last.
            tokens_before: how many of them other processes see in batches before these.
            router_weight: what a nat of KL divergence of a router's choice counts, in nats of
                the prediction. The gradient then runs through all later routers too and keeps
                errors out of directions that make tokens change experts.
            seed: of the tokens that are drawn; a sequence draws the same in any batch.
        """
        device = next(model.parameters()).device
        with ExitStack() as undo, torch.enable_grad():
            freeze(model, undo)
            router_inputs = self._listen(model, undo)
            start = tokens_before + self.num_tokens
            for ids, mask, chances in drawn_for(batches, device, start, max_tokens, seed):
                self._keep = mask.flatten()
                loss = drawn_surprise(model, ids, mask, next(chances))
                if router_weight:
                    of_routers = self._router_surprise(router_inputs, chances)
                    loss = loss + router_weight**0.5 * of_routers
                loss.backward()
                router_inputs.clear()
                self.num_tokens += int(mask.sum())

    def sum_over_processes(self, add_up: Callable[[torch.Tensor], object]) -> None:
        """Become what all processes have measured together.

        Args:
            add_up: sums a tensor over processes, in place.
        """
        squares = list(self._squares.values())
        counts = squares[0].new_tensor([self.num_tokens, *self._weights.values()])
        for tensor in (counts, *squares):
            add_up(tensor)
        num_tokens, *weights = counts.tolist()
        self.num_tokens = int(num_tokens)
        self._weights = dict(zip(self._weights, weights, strict=True))

    def row_weights(self) -> dict[nn.Linear, torch.Tensor]:
        """Return for each linear ``[out]`` float64: mean squared gradient per unit of weight.

        A token's weight is its squared combine weight, 1 outside of experts. Where few tokens
        were seen, the mean over the linears of the same role in the layer stands in.
        """
        pools: dict[str, list[nn.Linear]] = {}
        for linear, name in self._names.items():
            pools.setdefault(pool_of(name), []).append(linear)
        found = {}
        for pool in pools.values():
            total = sum(self._weights[linear] for linear in pool)
            mean = sum(float(self._squares[linear].mean()) for linear in pool) / max(total, 1e-30)
            tokens = self.num_tokens or 1
            prior = _PRIOR_TOKENS * total / tokens / len(pool) if len(pool) > 1 else 0.0
            for linear in pool:
                weight = self._weights[linear]
                found[linear] = (self._squares[linear] + prior * mean) / max(weight + prior, 1e-30)
        return found

    def _listen(self, model: nn.Module, undo: ExitStack) -> list[tuple[nn.Module, torch.Tensor]]:
        """Register all hooks; return the list that routers' inputs will be put into."""
        hooks = [start_gradients(model)]
        hooks += [linear.register_forward_hook(self._catch) for linear in self._names]
        router_inputs: list[tuple[nn.Module, torch.Tensor]] = []
        for layer in self._layers:
            hooks.append(layer.experts.register_forward_pre_hook(self._weigh_experts(layer)))
            if layer.shared_expert is not None:
                hook = self._weigh_shared(layer)
                hooks.append(layer.shared_expert.register_forward_pre_hook(hook))
            if layer.router is not None:
                hooks.append(
                    layer.router.register_forward_pre_hook(
                        lambda router, args: router_inputs.append((router, args[0]))
                    )
                )
        weighed = [m for layer in self._layers for m in (layer.experts, layer.shared_expert) if m]
        in_experts = {module for parent in weighed for module in parent.modules()}
        hooks += [
            linear.register_forward_pre_hook(self._weigh_dense)
            for linear in self._names
            if linear not in in_experts
        ]
        for hook in hooks:
            undo.callback(hook.remove)
        return router_inputs

    def _catch(self, linear: nn.Linear, _args: Any, output: torch.Tensor) -> None:
        def add(gradient: torch.Tensor) -> torch.Tensor:
            # handed on as it is counted: what explodes in one layer does so in all before it
            gradient = gradient if self._limit is None else limited(gradient, self._limit)
            self._squares[linear] += gradient.flatten(0, -2).double().square().sum(0)
            return gradient

        if output.requires_grad:
            output.register_hook(add)

    def _weigh_dense(self, linear: nn.Module, _args: Any) -> None:
        assert self._keep is not None  # set before the forward
        self._weights[linear] += float(self._keep.sum())

    def _weigh_experts(self, layer: MoELayer) -> Any:
        def weigh(_experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            trace = RoutingTrace(args[1], args[2].detach().float(), layer.num_experts)
            combine = trace.combine_weights()
            assert self._keep is not None
            sums = combine[self._keep].square().sum(0).tolist()
            for index, weight in enumerate(sums):
                self._add_weight(layer.expert(index), weight)

        return weigh

    def _weigh_shared(self, layer: MoELayer) -> Any:
        def weigh(shared: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert self._keep is not None
            weights = layer.shared_weights(args[0].detach().flatten(0, -2))
            kept = self._keep.float() if weights is None else weights.float()[self._keep]
            self._add_weight(shared, float(kept.square().sum()))

        return weigh

    def _add_weight(self, mlp: nn.Module, weight: float) -> None:
        for module in mlp.modules():
            if module in self._weights:
                self._weights[module] += weight

    def _router_surprise(
        self, router_inputs: list[tuple[nn.Module, torch.Tensor]], chances: Iterator[torch.Tensor]
    ) -> torch.Tensor:
        losses = []
        for router, inputs in router_inputs:
            weight, bias = router.weight, getattr(router, "bias", None)
            assert isinstance(weight, torch.Tensor)  # every router scores with one matrix
            scores = nn.functional.linear(inputs.flatten(0, -2), weight.to(inputs.dtype), bias)
            losses.append(surprise(scores[self._keep], next(chances)))
        return torch.stack(losses).sum()


def limited(gradient: torch.Tensor, limit: float) -> torch.Tensor:
    """Shorten the gradients of single tokens to a multiple of what is usual in their sequence.

    A state that is divided by a small number can make one token's gradient a thousand times that of
    the others. It holds for errors a thousand times smaller than those of quantization, and its
    square would be all that is left of a mean over tokens.

    Args:
        gradient: ``[..., tokens, out]``; not modified.
        limit: no token's gradient stays longer than this many times the median of those that are
            not 0, as the gradients of padding are.
    """
    if not gradient.numel():
        return gradient  # of an expert that no token was sent to
    norm = gradient.float().norm(dim=-1)
    usual = norm.where(norm > 0, torch.nan).nanmedian(-1, keepdim=True).values.nan_to_num()
    factor: torch.Tensor = (limit * usual / norm).clamp(max=1).nan_to_num(1.0)
    return gradient * factor[..., None].to(gradient.dtype)


def num_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Return how many tokens of a batch are not padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def freeze(model: nn.Module, undo: ExitStack) -> None:
    """Let only activations have gradients, until ``undo`` is closed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad = False
    undo.callback(lambda: [p.requires_grad_() for p in parameters])


def start_gradients(model: nn.Module) -> RemovableHandle:
    """Let gradients flow from a model's token embedding on, until the handle is removed."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle: RemovableHandle = embedding.register_forward_hook(
        lambda _module, _args, output: output.requires_grad_()
    )
    return handle


def drawn_for(
    batches: Iterable[Mapping[str, torch.Tensor]],
    device: torch.device,
    tokens_before: int,
    max_tokens: int,
    seed: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Iterator[torch.Tensor]]]:
    """Yield token ids, mask and :func:`chances_of` each batch, on a device.

    Args:
        batches: ``input_ids`` and maybe ``attention_mask``, ``[batch, sequence]``.
        device: of the model.
        tokens_before: how many were seen before these.
        max_tokens: the batch that reaches this many is the last.
        seed: of the chances.
    """
    seen = tokens_before
    for batch in batches:
        if seen >= max_tokens:
            return
        ids = batch["input_ids"].to(device)
        mask = batch.get("attention_mask", torch.ones_like(ids)).to(device).bool()
        yield ids, mask, chances_of([row[k] for row, k in zip(ids, mask, strict=True)], seed)
        seen += int(mask.sum())


def drawn_surprise(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, chance: torch.Tensor
) -> torch.Tensor:
    """Return :func:`surprise` at tokens that a causal language model draws itself."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.flatten(0, -2)
    # where nothing is padding, a copy would be the largest tensor once more, and its gradient too
    return surprise(logits if mask.all() else logits[mask.flatten()], chance)


def chances_of(rows: Sequence[torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Yield uniform numbers for all tokens of a batch, again and again: ``[tokens]``.

    They depend on the sequence and not on its batch, so that processes that form other batches of
    the same data draw the same.
    """
    seeds = [random.Random(f"{seed}/{row.tolist()}").getrandbits(63) for row in rows]
    generators = [
        torch.Generator(row.device).manual_seed(of_row)
        for row, of_row in zip(rows, seeds, strict=True)
    ]
    while True:
        yield torch.cat(
            [
                torch.rand(len(row), generator=generator, device=row.device)
                for row, generator in zip(rows, generators, strict=True)
            ]
        )
