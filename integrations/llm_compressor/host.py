"""Every touch of llm-compressor (0.14) that is not its public API.

Each one says why it is needed and what upstream would have to offer instead. Nothing here outlives
what it was made for: listeners are installed once and hold their listeners weakly, everything else
is undone when the pass, the forward or the ``oneshot`` it belongs to ends, by a failure too.
``tests`` tell in words when a new llm-compressor moves one of these places.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import torch
import tqdm
from compressed_tensors.compressors.naive_quantized import base as naive_quantized
from compressed_tensors.compressors.pack_quantized import base as pack_quantized
from compressed_tensors.offload.cache import DistributedCPUCache
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.utils import patch_attr
from datasets import Dataset
from llmcompressor.args.dataset_arguments import DatasetArguments
from llmcompressor.core import State, active_session
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modeling.moe import context as moe_context
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.awq import base as awq_base
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential import SequentialPipeline
from llmcompressor.pipelines.sequential.helpers import SequentialTracer
from torch import nn
from torch.fx._symbolic_trace import _wrapped_fns_to_patch
from torch.fx.node import Argument, Node
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE = "moeq_plugin."
_ALL_EXPERTS = "_CALIBRATE_ALL_EXPERTS"  # a global of the host's, read by experts as they run


# --- the running oneshot -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Running:
    """A ``oneshot`` that is running, and what is undone when it ends, however it ends."""

    oneshot: Oneshot
    scope: ExitStack


_running: ContextVar[_Running | None] = ContextVar("running_oneshot", default=None)


def register(check: Callable[[Oneshot], None]) -> None:
    """Note from now on which ``Oneshot`` runs and which batches it caches; once per process.

    The host hands a modifier neither the output directory nor the processor, a data set not the
    model, and nobody its batches. Upstream would have to pass them in ``state``, and to ask
    modifiers before it reads data: ``check`` is called with every one that is about to run.
    """
    if not _is_ours(Oneshot.__call__):
        setattr(Oneshot, "__call__", _noting(Oneshot.__call__, check))  # noqa: B010 - not a plain method
    from_dataloader = vars(IntermediatesCache)["from_dataloader"].__func__
    if not _is_ours(from_dataloader):
        setattr(IntermediatesCache, "from_dataloader", classmethod(_listening(from_dataloader)))  # noqa: B010 - likewise
    if not _is_ours(SequentialTracer.create_arg):
        setattr(SequentialTracer, "create_arg", _with_attention(SequentialTracer.create_arg))  # noqa: B010 - likewise


def _is_ours(method: Callable[..., object]) -> bool:
    """Tell whether a method of the host's has been wrapped here."""
    return method.__code__.co_filename == __file__


def running_oneshot() -> Oneshot | None:
    """Return the ``Oneshot`` that is running, ``None`` in a session that somebody else drives."""
    running = _running.get()
    return running.oneshot if running is not None else None


def running_tokenizer() -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the running ``Oneshot``, ``None`` if there is none."""
    running = _running.get()
    processor = getattr(running.oneshot, "processor", None) if running is not None else None
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def enter_for_oneshot(context: AbstractContextManager[Path]) -> Path:
    """Enter a context that the running ``oneshot`` leaves, with its error if it fails."""
    running = _running.get()
    assert running is not None  # whoever has something for it to leave has found it
    return running.scope.enter_context(context)


def undo_with_oneshot(undo: ExitStack) -> None:
    """Close ``undo`` when the running ``oneshot`` ends at the latest, after a failure too.

    A modifier hears nothing of a failure. Upstream would have to tell it.

    Args:
        undo: may be closed before.
    """
    running = _running.get()
    if running is not None:
        running.scope.callback(undo.close)


def forget_failure(modifier: Modifier) -> None:
    """Let a modifier that has not come to its end be used in another ``oneshot``.

    The host goes on taking it for initialized, and refuses it for that. Upstream would have to keep
    the progress of a run out of the recipe.
    """
    if not modifier.finalized_:
        modifier.initialized_ = modifier.started_ = modifier.ended_ = False


def _noting(
    call: Callable[[Oneshot], None], check: Callable[[Oneshot], None]
) -> Callable[[Oneshot], None]:
    @wraps(call)
    def noting(self: Oneshot) -> None:
        with ExitStack() as scope:
            token = _running.set(_Running(self, scope))
            scope.callback(_running.reset, token)  # after all that was pushed on top of it
            # torch.fx.wrap keeps the globals of what the host traces, and with them the model, for
            # ever. Upstream would have to take its mark away: back to what was marked before
            scope.callback(_wrapped_fns_to_patch.update, dict(_wrapped_fns_to_patch))
            scope.callback(_wrapped_fns_to_patch.clear)
            check(self)
            call(self)

    return noting


# --- its batches and its causal masks -------------------------------------------------------------


class BatchListener(Protocol):
    """Hears of the batches that the sequential pipeline caches."""

    def hear_batches(self, cache: IntermediatesCache) -> None:
        """Take what is needed of the cache, which goes on changing afterwards."""


_batch_listeners: WeakSet[BatchListener] = WeakSet()


def listen_to_batches(listener: BatchListener, undo: ExitStack) -> None:
    """Tell ``listener`` of every cache of batches that is made until ``undo`` is closed.

    A modifier sees only what its hooks see. Upstream would have to put the batches into ``state``.
    """
    _batch_listeners.add(listener)
    undo.callback(_batch_listeners.discard, listener)


def _listening(from_dataloader: Callable[..., IntermediatesCache]) -> Callable[..., object]:
    @wraps(from_dataloader)
    def listening(
        cls: type[IntermediatesCache], *args: object, **kwargs: object
    ) -> IntermediatesCache:
        cache = from_dataloader(cls, *args, **kwargs)
        for listener in list(_batch_listeners):
            listener.hear_batches(cache)
        return cache

    return listening


def _with_attention(
    create_arg: Callable[[SequentialTracer, object], Argument],
) -> Callable[[SequentialTracer, object], Argument]:
    """Let a traced model make the causal mask that it makes otherwise, in passes that serve us.

    The host calibrates with eager attention, which is causal by its mask alone, but makes the mask
    by a copy of the configuration that has forgotten so: families that choose their mask function
    by a variable (Mixtral, Qwen3-MoE) get no mask, and every token sees those after it. Upstream
    would have to copy the attention's name along.
    """

    @wraps(create_arg)
    def with_attention(self: SequentialTracer, value: object) -> Argument:
        argument = create_arg(self, value)
        if isinstance(value, PreTrainedConfig) and isinstance(argument, Node) and _serves_us():
            name = value._attn_implementation
            argument.kwargs = {**argument.kwargs, "attn_implementation": name}
        return argument

    return with_attention


def _serves_us() -> bool:
    """Tell whether a modifier of ours is among those that the running pass serves."""
    recipe = active_session().lifecycle.recipe
    modifiers = recipe.modifiers if recipe is not None else []
    return any(type(modifier).__module__.startswith(_PACKAGE) for modifier in modifiers)


# --- experts on routed tokens --------------------------------------------------------------------


def run_routed_tokens_only(model: nn.Module, undo: ExitStack) -> None:
    """Let experts run on the tokens routed to them, whatever the host was told, until undone.

    A token that is not routed has weight zero in everything we measure, so computing it changes
    nothing but the time. The host has one process-wide flag for that; it is lowered while a
    layer's experts run and is the host's again afterwards, even if they raise. Upstream would have
    to let a modifier choose.

    Args:
        model: the linearized model.
        undo: gets what ends it.
    """
    raised: list[bool] = []  # what the host's flag was; experts do not nest

    def lower(_experts: nn.Module, _args: object) -> None:
        raised.append(getattr(moe_context, _ALL_EXPERTS))
        setattr(moe_context, _ALL_EXPERTS, False)

    def restore(_experts: nn.Module, _args: object, _output: object) -> None:
        setattr(moe_context, _ALL_EXPERTS, raised.pop())

    for module in model.modules():
        if isinstance(module, LinearExperts2D):
            undo.callback(module.register_forward_pre_hook(lower, prepend=True).remove)
            undo.callback(module.register_forward_hook(restore, always_call=True).remove)


# --- passes and data ------------------------------------------------------------------------------


def calibration_batches(state: State) -> DataLoader[Dataset]:
    """Return the calibration data of the run.

    Raises:
        ValueError: if there are none.
    """
    if state.data is None or state.data.calib is None:
        raise ValueError("there are no calibration data: pass dataset=... to oneshot")
    batches: DataLoader[Dataset] = state.data.calib
    return batches


def declare_data(modifier: Modifier, has_data: bool, undo: ExitStack) -> None:
    """Let the host run a modifier with the data that there are, or without any, until undone.

    The host asks a field of the recipe whether a modifier needs data, and stops where it says yes
    and there are none. Upstream would have to ask with the state in hand.
    """
    undo.enter_context(patch_attr(modifier, "requires_calibration_data", has_data))


def run_pass(
    modifier: Modifier, state: State, data: DataLoader[Dataset], *, propagate_error: bool = True
) -> None:
    """Run one modifier through data layer by layer, inside a ``oneshot`` that does something else.

    The events of the pass go to ``modifier`` alone. Upstream would have to give its pipelines the
    modifiers that they serve.

    Args:
        modifier: initialized.
        state: the host's, with the model.
        data: calibration batches.
        propagate_error: whether a layer receives what the quantized layers before it put out.
    """
    running = _running.get()
    arguments = running.oneshot.dataset_args if running is not None else DatasetArguments()
    recipe = active_session().lifecycle.recipe
    with (
        patch_attr(recipe, "modifiers", [modifier]),
        patch_attr(arguments, "propagate_error", propagate_error and arguments.propagate_error),
    ):
        SequentialPipeline()(state.model, data, arguments)


# --- its solver and its saving --------------------------------------------------------------------


def solve_with_host(
    modifier: GPTQModifier, linear: nn.Linear, name: str, hessian: torch.Tensor
) -> None:
    """Let the host's GPTQ round a linear to a grid that ours does not know, in place.

    Upstream would have to take a Hessian as an argument.

    Args:
        modifier: the host's, which forgets the Hessian again.
        linear: scheme and weight observer attached.
        name: of the linear.
        hessian: ``[in, in]``, without zeros on its diagonal; changed by the host.
    """
    modifier._module_names[linear] = name
    modifier._hessians[linear] = hessian
    modifier._num_samples[linear] = torch.ones((), device=hessian.device)
    modifier.compress_module_list([linear])  # type: ignore[no-untyped-call] # the host's


def replace_saving(
    model: PreTrainedModel, save: Callable[..., None], push: Callable[..., str]
) -> None:
    """Let these be the model's ``save_pretrained``, as the host replaced it, and ``push_to_hub``.

    Upstream would have to tell modifiers when a checkpoint has been written, and where.
    """
    vars(model).update(save_pretrained=save, push_to_hub=push)  # of this model, not of its class


@contextlib.contextmanager
def exact_codes() -> Iterator[None]:
    """Let saving find the integer codes that were solved for, whatever the dtype of the weights.

    The host keeps dequantized weights and divides them by their scales again when it saves. A
    bfloat16 quotient knows halves only below 128 and integers above, so that one 8-bit code in
    thirty came out one step off; in float32 all are found. Upstream would have to divide so.
    """

    def exact(
        x: torch.Tensor, scale: torch.Tensor, args: QuantizationArgs, **others: Any
    ) -> torch.Tensor:
        if args.type == QuantizationType.INT and args.num_bits == 8:
            x, scale = x.float(), scale.float()
        codes: torch.Tensor = quantize(x=x, scale=scale, args=args, **others)
        return codes

    with (
        patch_attr(pack_quantized, "quantize", exact),
        patch_attr(naive_quantized, "quantize", exact),
    ):
        yield


@contextlib.contextmanager
def parameters_stay_parameters() -> Iterator[None]:
    """Make parameters contiguous before ranks share them.

    compressed-tensors 0.19 does so itself and gets a tensor that is no parameter, which saving then
    fails on, at the very end. Packed weights whose columns 32 does not divide are such.
    """
    share = DistributedCPUCache.offload

    def offload(cache: DistributedCPUCache, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if isinstance(tensor, nn.Parameter) and not tensor.is_contiguous():
            tensor = nn.Parameter(tensor.contiguous(), requires_grad=tensor.requires_grad)
        shared: torch.Tensor | None = share(cache, tensor)
        return shared

    with patch_attr(DistributedCPUCache, "offload", offload):
        yield


# --- its AWQ and its progress bars ----------------------------------------------------------------


@contextlib.contextmanager
def summed_already() -> Iterator[None]:
    """Keep the host's AWQ from adding up over ranks, which it does on accelerators only."""
    with patch_attr(awq_base, "is_distributed", lambda: False):
        yield


@contextlib.contextmanager
def without_pinning() -> Iterator[None]:
    """Pin no memory where there is no accelerator; the host's AWQ fails there."""
    if torch.accelerator.is_available():
        yield
        return
    with patch_attr(IntermediatesCache, "pin_memory", lambda *_args: None):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Switch off progress bars and warnings of the libraries below, also bars asked for.

    The command line shows a line of its own. The host asks for bars without a way to decline;
    upstream would have to offer one.
    """
    original = tqdm.tqdm.__init__

    def without_bar(bar: object, *args: Any, **kwargs: Any) -> None:
        original(bar, *args, **{**kwargs, "disable": True})

    with patch_attr(tqdm.tqdm, "__init__", without_bar), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="transformers|torch")
        yield
