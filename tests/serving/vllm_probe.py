"""Load checkpoints in vLLM and report what arrived: run by the interpreter of ``.venv-vllm``.

Reads one JSON object from standard input and writes one to standard output (all logs go to
standard error)::

    {"emulate": true, "prompts": [[1, 2, 3]],
     "jobs": [{"name": "a", "path": "...", "dtype": "float32", "int8_activations": false,
               "strict": true}]}

    {"version": "...", "jobs": {"a": {"error": null, "logprobs": [[[...]]],
     "experts": {"layer.expert.projection.tensor": "hash"}}}}

``experts`` is taken after vLLM's weight loader has filled its buffers and before any kernel
rearranges them, ``logprobs`` are those of the prompt tokens over the whole vocabulary.

With ``emulate`` the matrix products of quantized layers are done in plain torch on the weights that
vLLM loaded, see ``vllm_emulation.py``. ``int8_activations`` rounds the inputs of these products per
token to 8 bits, as the AMX kernels do.
"""

import gc
import hashlib
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from vllm_emulation import emulate_integer_kernels

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
    products = emulate_integer_kernels() if request["emulate"] else None
    results = {}
    for job in request["jobs"]:
        loaded.clear()
        if products:
            products.int8_activations = job.get("int8_activations", False)
        try:
            logprobs, error = prompt_logprobs(job, request["prompts"], products is not None), None
        except Exception as failure:  # whatever vLLM refuses with is the result
            failed_at = traceback.extract_tb(failure.__traceback__)[-1].line
            logprobs, error = None, f"{type(failure).__name__}: {str(failure) or failed_at}"
            traceback.print_exc()
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
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [
        [[row[token].logprob for token in range(len(row))] for row in output.prompt_logprobs[1:]]
        for output in outputs
    ]


def record_loaded_experts() -> dict[str, Any]:
    """Return a dictionary that every load fills with the hashes of all experts' tensors."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as int8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )

    record: dict[str, Any] = {}
    packed, plain = ("weight_packed", "weight_scale"), ("weight", "weight_scale")
    record_before_processing(wna16.CompressedTensorsWNA16MoEMethod, packed, record)
    record_before_processing(int8.CompressedTensorsW8A8Int8MoEMethod, plain, record)
    record_before_processing(UnquantizedFusedMoEMethod, ("weight",), record)
    return record


def record_before_processing(
    method: type, tensors: tuple[str, ...], record: dict[str, Any]
) -> None:
    """Hash these tensors of a layer's experts before ``method`` rearranges them."""
    process = method.process_weights_after_loading

    def record_and_process(self: Any, layer: torch.nn.Module) -> None:
        hashes = record.setdefault("experts", {})
        index = re.search(r"layers\.(\d+)\.", layer.layer_name)[1]
        for tensor in tensors:
            w13, w2 = getattr(layer, f"w13_{tensor}"), getattr(layer, f"w2_{tensor}")
            for expert in range(len(w13)):
                gate, up = w13[expert].chunk(2)
                for projection, value in (("gate", gate), ("up", up), ("down", w2[expert])):
                    hashes[f"{index}.{expert}.{projection}.{tensor}"] = fingerprint(value)
        process(self, layer)

    method.process_weights_after_loading = record_and_process


def fingerprint(tensor: torch.Tensor) -> str:
    """Hash the values; 16 bit scales count as equal to the float32 they are widened to."""
    if tensor.is_floating_point():
        tensor = tensor.float()
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
