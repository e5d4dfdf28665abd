"""Encode RWKV's element-wise weights, layer by layer, by the power of what they multiply."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_offloading
from llmcompressor.core import State
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import distributed, nn

from moeq_plugin.core.channel_power import ChannelPower
from moeq_plugin.core.codebook import CodebookFormat, encode
from moeq_plugin.integrations.llm_compressor import host
from moeq_plugin.integrations.llm_compressor.calibration.observations import RegisterHook
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.rwkv.encoded_weights import EncodedWeights
from moeq_plugin.models.elementwise import ElementwiseScale, elementwise_parameters
from moeq_plugin.records.run import Basis


class ElementwiseRun:
    """Puts element-wise weights into codebooks; phases as those of a scalar run.

    Args:
        state: the host's.
        encoded: filled in weight by weight.
        form: of the codebooks; every weight is one row.
        percentile: larger activations of a sequence's channel are clipped to this.
        weighted: fit codebooks by second moments; otherwise all channels count alike.
    """

    def __init__(
        self,
        state: State,
        encoded: EncodedWeights,
        form: CodebookFormat,
        percentile: float,
        weighted: bool,
    ) -> None:
        self._encoded, self._form = encoded, form
        self._percentile, self._weighted = percentile, weighted
        self._hooks = HooksMixin()
        self._undo = ExitStack()
        host.undo_with_oneshot(self._undo)
        self._padding = PaddingWatch(state)
        # what is still to be encoded, and the power of its inputs so far
        self._names: dict[ElementwiseScale, str] = {}
        self._powers: dict[ElementwiseScale, ChannelPower] = {}
        for name, weight, module in elementwise_parameters(state.model):
            self._names[module] = name.removesuffix(".weight")
            self._powers[module] = ChannelPower.zeros(weight.numel(), weight.device)

    def begin(self, state: State) -> None:
        """Take over what is finished, then register the hooks that accumulate powers."""
        modules = {self._names[module]: module for module in self._powers}
        for name in self._encoded.restore(modules, dict.fromkeys(modules, self._form)):
            del self._powers[modules[name]]
        host.listen_to_batches(self._padding, self._undo)
        self._undo.callback(self._hooks.remove_hooks)
        register_hook: RegisterHook = self._hooks.register_hook
        for module in self._powers:
            register_hook(module, self._observe, "forward")
        register_hook(state.model, self._padding.read, "forward_pre", with_kwargs=True)

    def finish_layer(self, state: State, modules: list[nn.Module]) -> None:
        """Encode every weight whose inputs were seen since the last layer."""
        if is_distributed():
            for power in self._powers.values():
                _sum_over_ranks(power)
        with torch.no_grad(), disable_offloading():
            for module in [m for m, power in self._powers.items() if power.num_tokens]:
                self._encode(module)

    def end(self, state: State) -> None:
        """Encode what no batch has called, then remove hooks."""
        with torch.no_grad(), disable_offloading():
            for module in list(self._powers):
                self._encode(module)
        self._undo.close()

    def pending(self) -> list[str]:
        """Return the names of what is still to be encoded."""
        return [self._names[module] for module in self._powers]

    def close(self, state: State) -> None:
        """Replace encoded modules by packed ones."""
        self._encoded.replace(state.model)

    def _observe(
        self, module: ElementwiseScale, args: tuple[torch.Tensor, ...], _output: torch.Tensor
    ) -> None:
        """Add a batch ``[sequences, tokens, *weight]`` to the module's power."""
        power = self._powers.get(module)
        if power is None:
            return  # encoded already: the module is running on its codebook
        inputs = args[0].reshape(*args[0].shape[:2], -1)
        keep = self._padding.keep(inputs.shape[0] * inputs.shape[1])
        for index, sequence in enumerate(inputs):
            if keep is not None:
                sequence = sequence[keep.view(len(inputs), -1)[index].to(sequence.device)]
            power.add(sequence, self._percentile)  # by itself: clipping is by sequence

    def _encode(self, module: ElementwiseScale) -> None:
        power = self._powers.pop(module)
        row = module.weight.view(1, -1)
        encoded = encode(row, self._form, power.mean() if self._weighted else None)
        change = (encoded.decode().double() - row.double()).square() * power.mean()
        basis = Basis.OWN if power.num_tokens else Basis.NONE
        loss = change.sum().item() if power.num_tokens else None
        tokens = float(power.num_tokens)
        self._encoded.put(self._names[module], module, encoded, basis, tokens, loss)


def _sum_over_ranks(power: ChannelPower) -> None:
    tokens = power.square_sum.new_tensor(power.num_tokens)
    for tensor in (power.square_sum, tokens):
        distributed.all_reduce(tensor)
    power.num_tokens = int(tokens)
