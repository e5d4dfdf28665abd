"""Load GPTQ-format checkpoints in a reader of others and report its logits.

Run by the interpreter of ``.venv-gptq`` (GPTQModel, Optimum) or ``.venv-autogptq`` (AutoGPTQ).
Reads one JSON object from standard input and writes one to standard output (all logs go to
standard error)::

    {"reader": "gptqmodel", "prompts": [[1, 2, 3]], "jobs": {"a": "directory"}}

    {"versions": {"gptqmodel": "7.7.0"}, "jobs": {"a": {"error": null, "quantized": 32,
     "logits": [[[...]]], "weights": {"name of a linear": "hash of its weight in float16"}}}}
"""

import hashlib
import json
import os
import sys
from importlib.metadata import version

import torch


def main() -> None:
    # The readers print their progress to standard output: keep it for the answer alone.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    load, packages = READERS[request["reader"]]
    results = {}
    for name, path in request["jobs"].items():
        try:
            results[name] = {"error": None, **read(load(path), request["prompts"])}
        except Exception as failure:  # whatever the reader refuses with is the result
            results[name] = {"error": f"{type(failure).__name__}: {failure}"}
    versions = {package: version(package) for package in packages}
    json.dump({"versions": versions, "jobs": results}, answer)
    answer.close()


def load_with_gptqmodel(path: str) -> torch.nn.Module:
    from gptqmodel import BACKEND, GPTQModel

    # the kernel in plain torch, which takes 16 bit only
    loaded = GPTQModel.load(path, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    return loaded.model


def load_with_transformers(path: str) -> torch.nn.Module:
    """Load through Optimum, which replaces linears by GPTQModel's; dense models only."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    kernel = GPTQConfig(bits=4, backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float16, device_map="cpu", quantization_config=kernel
    )


def load_with_auto_gptq(path: str) -> torch.nn.Module:
    from auto_gptq import AutoGPTQForCausalLM

    loaded = AutoGPTQForCausalLM.from_quantized(
        path, device="cpu", torch_dtype=torch.float16, disable_exllama=True, disable_exllamav2=True
    )
    return loaded.model


def read(model: torch.nn.Module, prompts: list[list[int]]) -> dict:
    """Return logits, and for every quantized linear a hash of the weight that it multiplies with.

    The weight is what comes out for unit vectors, so nothing of the reader's unpacking is known
    here.
    """
    linears = {n: m for n, m in model.named_modules() if hasattr(m, "qweight")}
    with torch.no_grad():
        logits = model(torch.tensor(prompts)).logits.float()
        weights = {}
        for name, module in linears.items():
            columns = len(module.g_idx)
            products = module(torch.eye(columns, dtype=torch.float16))
            weights[name] = fingerprint(products.T)
    return {"quantized": len(linears), "logits": logits.tolist(), "weights": weights}


def fingerprint(tensor: torch.Tensor) -> str:
    values = tensor.detach().to(torch.float16).contiguous() + 0.0  # one zero, not two
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


READERS = {
    "gptqmodel": (load_with_gptqmodel, ("gptqmodel", "transformers", "torch")),
    "transformers": (
        load_with_transformers,
        ("optimum", "gptqmodel", "transformers", "torch"),
    ),
    "auto_gptq": (load_with_auto_gptq, ("auto_gptq", "transformers", "torch")),
}

if __name__ == "__main__":
    main()
