"""Load checkpoints in vLLM and report what arrived: run by the interpreter of ``.venv-vllm``.

Reads one JSON object from standard input and writes one to standard output (all logs go to
standard error)::

    {"emulate": true, "prompts": [[1, 2, 3]],
     "jobs": [{"name": "a", "path": "...", "dtype": "float32", "int8_activations": false,
               "strict": true}]}

    {"version": "...", "jobs": {"a": {"error": null, "kernel": "...", "logprobs": [[[...]]],
     "experts": {"layer.expert.projection.tensor": "hash"}}}}

``experts`` is taken after vLLM's weight loader has filled its buffers and before any kernel
rearranges them, ``logprobs`` are those of the prompt tokens over the whole vocabulary.

With ``emulate`` the int4 matrix products are done in plain torch on the weights that vLLM loaded:
its own int4 kernels need AMX (experts) or AVX512 (dense). Name mapping, scheme look-up, loading,
routing, attention and everything else stay vLLM's. ``int8_activations`` rounds the inputs of these
products per token to 8 bits, as the AMX kernels do.
"""

import copy
import gc
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

# Set before vLLM is imported. One thread: tiny matrices gain nothing from more.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "cache"),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def main() -> None:
    # Some of vLLM's parts print to standard output, also from C: keep it for the answer alone.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)

    import vllm

    loaded = record_loaded_experts()
    emulation = emulate_int4_kernels() if request["emulate"] else None
    results = {}
    for job in request["jobs"]:
        loaded.clear()
        if emulation:
            emulation["int8_activations"] = job.get("int8_activations", False)
        try:
            logprobs, error = prompt_logprobs(job, request["prompts"], emulation is not None), None
        except Exception as failure:  # whatever vLLM refuses with is the result
            logprobs, error = None, f"{type(failure).__name__}: {failure}"
        gc.collect()  # an engine that is still alive would tear down the next one's groups
        results[job["name"]] = {"error": error, "logprobs": logprobs, **loaded}
    json.dump({"version": vllm.__version__, "jobs": results}, answer)
    answer.close()


def prompt_logprobs(job: dict, prompts: list[list[int]], emulate: bool) -> list[list[list[float]]]:
    """Load one checkpoint strictly; return ``[prompt][token after the first][vocabulary]``."""
    from vllm import LLM, SamplingParams

    config = json.loads((Path(job["path"]) / "config.json").read_text())
    engine = LLM(
        job["path"],
        dtype=job["dtype"],
        moe_backend="emulation" if emulate and "quantization_config" in config else "auto",
        model_loader_extra_config={"enable_weights_track": job.get("strict", True)},
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=64,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=64 << 20,
        max_logprobs=-1,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling)
    return [
        [[row[token].logprob for token in range(len(row))] for row in output.prompt_logprobs[1:]]
        for output in outputs
    ]


def record_loaded_experts() -> dict[str, Any]:
    """Return a dictionary filled with the kernel's name and a hash of every expert's tensors."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as moe,
    )

    record: dict[str, Any] = {}
    method = moe.CompressedTensorsWNA16MoEMethod
    process = method.process_weights_after_loading

    def record_and_process(self: Any, layer: torch.nn.Module) -> None:
        record["kernel"] = self.experts_cls.__name__
        hashes = record.setdefault("experts", {})
        index = re.search(r"layers\.(\d+)\.", layer.layer_name)[1]
        for tensor in ("weight_packed", "weight_scale"):
            w13, w2 = getattr(layer, f"w13_{tensor}"), getattr(layer, f"w2_{tensor}")
            for expert in range(len(w13)):
                gate, up = w13[expert].chunk(2)
                for projection, value in (("gate", gate), ("up", up), ("down", w2[expert])):
                    hashes[f"{index}.{expert}.{projection}.{tensor}"] = fingerprint(value)
        process(self, layer)

    method.process_weights_after_loading = record_and_process
    return record


def fingerprint(tensor: torch.Tensor) -> str:
    """Hash the values; 16 bit scales count as equal to the float32 they are widened to."""
    if tensor.is_floating_point():
        tensor = tensor.float()
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def emulate_int4_kernels() -> dict[str, bool]:
    """Put torch in the place of vLLM's int4 kernels; return the settings the new ones obey.

    Experts: vLLM has an emulation that dequantizes when the weights are loaded, but multiplies
    with Triton, which has no CPU; only that multiplication is exchanged. Dense: a kernel is
    registered and the stock one disabled, both by the means vLLM offers for it.
    """
    from torch.nn.functional import linear, silu
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized
    from vllm.model_executor.layers.fused_moe.experts import int4_emulation_moe
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt4Static
    from vllm.platforms import PlatformEnum

    settings = {"int8_activations": False}

    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if settings["int8_activations"]:
            step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
            x = (x / step).round() * step
        return linear(x, weight.to(x.dtype), bias)

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
            return multiply(x, layer.dequantized, bias)

    class EmulatedExperts(CPUUnquantizedExperts):
        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            return (weight_key, activation_key) == (kInt4Static, None)

        def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *_, **__) -> None:
            output.zero_()
            for expert in topk_ids.unique().tolist():
                tokens, choice = (topk_ids == expert).nonzero(as_tuple=True)
                gate, up = multiply(hidden_states[tokens], w1[expert]).chunk(2, dim=-1)
                result = multiply(silu(gate) * up, w2[expert])
                weights = topk_weights[tokens, choice].unsqueeze(-1)
                output.index_add_(0, tokens, (result * weights).to(output.dtype))

    # "emulation" is the name of an int4 backend: layers in 16 bit beside them are to choose freely
    select = unquantized.select_unquantized_moe_backend

    def select_freely(moe_config: Any) -> Any:
        moe_config = copy.copy(moe_config)
        moe_config.moe_backend = "auto"
        return select(moe_config)

    leave_out_symmetric_zero_points()
    unquantized.select_unquantized_moe_backend = select_freely
    os.environ["VLLM_DISABLED_KERNELS"] = CPUWNA16LinearKernel.__name__
    register_linear_kernel(EmulatedLinear, PlatformEnum.CPU, "mp")
    int4_emulation_moe.Int4EmulationTritonExperts = EmulatedExperts
    return settings


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


if __name__ == "__main__":
    main()
