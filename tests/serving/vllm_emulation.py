"""Plain torch in the place of vLLM's int4 products and its experts' int8: for ``vllm_probe.py``.

vLLM's own kernels need AMX (experts) or AVX512 (dense). Name mapping, scheme look-up, loading,
routing, attention and everything else stay vLLM's.
"""

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import gelu, linear, silu

# From zero to a token's largest input: compressed-tensors divides the range into 255 steps, so that
# its ends lie between codes, vLLM's kernels into 254.
CHECKPOINT_STEPS, KERNEL_STEPS = 127.5, 127
# of a gate, by vLLM's names
ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh")}


class Products:
    """The matrix products of quantized layers.

    Attributes:
        int8_activations: round all inputs per token to 8 bits, as vLLM's own kernels do. Otherwise
            only those of W8A8 layers are, as compressed-tensors does.
    """

    def __init__(self) -> None:
        self.int8_activations = False

    def int4(self, x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if self.int8_activations:
            x = rounded(x, KERNEL_STEPS)
        return linear(x, weight.to(x.dtype), bias)

    def int8(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply in float32: a code times its scale has more digits than bfloat16 holds."""
        steps = KERNEL_STEPS if self.int8_activations else CHECKPOINT_STEPS
        return linear(rounded(x.float(), steps), weight).to(x.dtype)


def rounded(x: torch.Tensor, steps: float) -> torch.Tensor:
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / steps
    return (x / step).round().clamp(-128, 127) * step


def emulate_integer_kernels() -> Products:
    """Put torch in the place of vLLM's kernels; return what now multiplies."""
    products = Products()
    emulate_linears(products)
    emulate_experts(products)
    return products


def emulate_linears(products: Products) -> None:
    """Register a kernel and disable the stock one, both by the means vLLM offers for it."""
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.platforms import PlatformEnum

    class EmulatedLinear(CPUWNA16LinearKernel):
        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            packed, scale = (getattr(layer, n).data for n in (self.w_q_name, self.w_s_name))
            if self.w_q_name == "qweight":  # GPTQ keeps weights transposed
                packed, scale = packed.T, scale.T
            codes = ((packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15).flatten(1) - 8
            steps = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
            # In bfloat16 like vLLM's emulated experts and compressed-tensors itself.
            layer.dequantized = codes.bfloat16() * steps.bfloat16()

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            return products.int4(x, layer.dequantized, bias)

    os.environ["VLLM_DISABLED_KERNELS"] = CPUWNA16LinearKernel.__name__
    register_linear_kernel(EmulatedLinear, PlatformEnum.CPU, "mp")


def emulate_experts(products: Products) -> None:
    """Exchange the classes that multiply.

    For int4 vLLM has an emulation that dequantizes when the weights are loaded, but multiplies with
    Triton, which has no CPU. For int8 its class for CPUs is replaced.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe, int4_emulation_moe
    from vllm.model_executor.layers.fused_moe.oracle import int8
    from vllm.model_executor.layers.quantization.utils import quant_utils, replace_parameter

    class EmulatedExperts(cpu_moe.CPUUnquantizedExperts):
        scheme: Any
        multiply: Callable[..., torch.Tensor]

        @classmethod
        def _supports_quant_scheme(cls, weight_key: Any, activation_key: Any) -> bool:
            return (weight_key, activation_key) == cls.scheme

        def apply(
            self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, *_, **extra
        ) -> None:
            function = ACTIVATIONS[activation.value]
            if extra["apply_router_weight_on_input"]:  # vLLM has done it before this is called
                topk_weights = torch.ones_like(topk_weights)
            output.zero_()
            for expert in topk_ids.unique().tolist():
                tokens, choice = (topk_ids == expert).nonzero(as_tuple=True)
                gate, up = self.multiply(hidden_states[tokens], w1[expert]).chunk(2, dim=-1)
                result = self.multiply(function(gate) * up, w2[expert])
                weights = topk_weights[tokens, choice].unsqueeze(-1)
                output.index_add_(0, tokens, (result * weights).to(output.dtype))

    class EmulatedInt4Experts(EmulatedExperts):
        scheme = (quant_utils.kInt4Static, None)
        multiply = staticmethod(products.int4)

    class EmulatedInt8Experts(EmulatedExperts):
        scheme = (quant_utils.kInt8StaticChannelSym, quant_utils.kInt8DynamicTokenSym)
        multiply = staticmethod(products.int8)

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            for name in ("w13_weight", "w2_weight"):
                codes, scale = getattr(layer, name), getattr(layer, f"{name}_scale")
                replace_parameter(layer, name, codes.float() * scale)

    leave_out_symmetric_zero_points()
    int4_emulation_moe.Int4EmulationTritonExperts = EmulatedInt4Experts
    cpu_moe.CPUExpertsInt8 = EmulatedInt8Experts
    # The backend "emulation" is known for int4 alone; layers in int8 and in 16 bit are beside it.
    int8.map_int8_backend = lambda _: int8.Int8MoeBackend.CPU
    let_unquantized_experts_choose_freely()


def let_unquantized_experts_choose_freely() -> None:
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized

    select = unquantized.select_unquantized_moe_backend

    def select_freely(moe_config: Any) -> Any:
        moe_config = copy.copy(moe_config)
        moe_config.moe_backend = "auto"
        return select(moe_config)

    unquantized.select_unquantized_moe_backend = select_freely


def leave_out_symmetric_zero_points() -> None:
    """Make the emulation ignore zero points in GPTQ format, as the real kernels do.

    It would take them as they are stored, less one.
    """
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16

    emulate = int_wna16._process_weights_emulation_gptq

    def emulate_symmetric(
        w13: Any, w2: Any, w13_scale: Any, w2_scale: Any, *_zero_points: Any
    ) -> Any:
        return emulate(w13, w2, w13_scale, w2_scale, None, None)

    int_wna16._process_weights_emulation_gptq = emulate_symmetric
