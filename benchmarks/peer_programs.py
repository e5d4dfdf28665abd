"""One contender quantizes one model, in a process and an environment of its own.

    python benchmarks/peer_programs.py DIRECTORY

Reads ``request.json`` of the directory and writes ``weights.safetensors`` (dequantized weights of
the linears that were asked for, and norms and routers as they are then) and ``run.json``: CPU
seconds of the quantization alone, all threads of this process together, and memory in MiB.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pools want two; they wait for each other

import torch
from safetensors.torch import save_file
from torch import nn

BATCH = 8


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be quantized.

    Attributes:
        quantize: returns the quantized model; this is what is timed.
        weight: returns a linear's dequantized weight, ``[out, in]``.
        package: whose version is noted.
        reload: returns the quantized model in the form that ``weight`` reads; not timed.
    """

    quantize: Callable[[], nn.Module]
    weight: Callable[[nn.Module], torch.Tensor]
    package: str
    reload: Callable[[nn.Module], nn.Module] = lambda model: model


def main() -> None:
    directory = Path(sys.argv[1])
    request = json.loads((directory / "request.json").read_text())
    torch.set_num_threads(1)
    program = PROGRAMS[request["program"]](request)
    loaded = _mib("VmRSS")
    began = time.process_time()
    model = program.quantize()
    cpu_s, peak = time.process_time() - began, _mib("VmHWM")
    state, modules = dict(model.named_parameters()), dict(program.reload(model).named_modules())
    weights = {
        name: program.weight(modules[name]) for name in request["linears"] if name in modules
    }
    beside = {name: state[name] for name in request["beside"] if name in state}
    tensors = {name: of.detach().contiguous() for name, of in {**weights, **beside}.items()}
    save_file(tensors, directory / "weights.safetensors")
    run = {
        "cpu_s": cpu_s,
        "peak_mib": peak,
        "peak_mib_above_loading": peak - loaded,
        "version": f"{program.package} {version(program.package)}",
    }
    (directory / "run.json").write_text(json.dumps(run))


def llm_compressor(request: dict[str, Any]) -> Loaded:
    """Its own modifiers and ours: what differs is the recipe."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import modifiers, oneshot
    from llmcompressor.modifiers import autoround, gptq, quantization
    from llmcompressor.modifiers.transform import awq
    from transformers import AutoModelForCausalLM

    import moeq_plugin
    from moeq_plugin.integrations.llm_compressor.host import without_pinning

    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    weights = {**request["grid"], "strategy": "group"}
    group = {"targets": ["Linear"], "weights": weights}
    scheme = {"config_groups": {"group_0": group}, "ignore": request["ignore"]}
    rooms = (moeq_plugin, gptq, autoround, awq, modifiers)
    modifier = request["modifier"]
    of_name = next(getattr(room, modifier) for room in rooms if hasattr(room, modifier))
    recipe = (
        [of_name(**request["fields"]), quantization.QuantizationModifier(**scheme)]
        if modifier == "AWQModifier"
        else [of_name(**scheme, **request["fields"])]
    )
    dataset = Dataset.from_dict({"input_ids": request["ids"]})

    def quantize() -> nn.Module:
        with without_pinning():  # llm-compressor's AWQ fails without an accelerator otherwise
            oneshot(
                model=model,
                recipe=recipe,
                dataset=dataset,
                num_calibration_samples=len(dataset),
                max_seq_length=len(request["ids"][0]),
                shuffle_calibration_samples=False,
                batch_size=BATCH,
            )
        return model

    def weight(linear: nn.Module) -> torch.Tensor:
        if not hasattr(linear, "quantization_scheme"):
            return linear.weight
        args, zero = linear.quantization_scheme.weights, getattr(linear, "weight_zero_point", None)
        return fake_quantize(linear.weight, linear.weight_scale, zero, args)

    package = "moeq-plugin" if of_name.__module__.startswith("moeq_plugin") else "llmcompressor"
    return Loaded(quantize, weight, package)


def auto_round(request: dict[str, Any]) -> Loaded:
    """In float32 where that is faster here, on narrow matrices; without a compiler's minutes."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request["model"])

    def quantize() -> nn.Module:
        compressor = AutoRound(
            model,
            tokenizer,
            bits=request["grid"]["num_bits"],
            group_size=request["grid"]["group_size"],
            sym=request["grid"]["symmetric"],
            dataset=DataLoader(_with_masks(request["ids"]), batch_size=BATCH),
            nsamples=len(request["ids"]),
            seqlen=len(request["ids"][0]),
            batch_size=BATCH,
            amp=model.config.hidden_size > 512,
            enable_torch_compile=False,
            **request["fields"],
        )
        return compressor.quantize()[0]

    return Loaded(quantize, lambda linear: linear.weight, "auto-round")


def gptqmodel(request: dict[str, Any]) -> Loaded:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=request["grid"]["num_bits"],
        group_size=request["grid"]["group_size"],
        sym=request["grid"]["symmetric"],
        device="cpu",
        offload_to_disk=False,  # as all others: the model stays in memory
        **request["fields"],
    )
    loaded = GPTQModel.load(request["model"], config, dtype=torch.float32)
    data = [{name: of[None] for name, of in row.items()} for row in _with_masks(request["ids"])]

    def quantize() -> nn.Module:
        loaded.quantize(data, batch_size=BATCH, backend=BACKEND.GPTQ_TORCH)
        return loaded.model

    def reload(_model: nn.Module) -> nn.Module:
        # in memory its zero points are those of the file format, one less than it computes with
        with tempfile.TemporaryDirectory() as name:
            loaded.save(name)
            again = GPTQModel.load(
                name, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16
            )
        return again.model

    def weight(linear: nn.Module) -> torch.Tensor:
        if not hasattr(linear, "qweight"):
            return linear.weight
        linear.scales = linear.scales.float()  # codes times scales in 16 bit would be rounded
        return linear.dequantize_weight().T

    return Loaded(quantize, weight, "gptqmodel", reload)


PROGRAMS: dict[str, Callable[[dict[str, Any]], Loaded]] = {
    "llm-compressor": llm_compressor,
    "auto-round": auto_round,
    "gptqmodel": gptqmodel,
}


def _with_masks(ids: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    rows = [torch.tensor(row) for row in ids]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def _mib(field: str) -> float:
    """Return a size of this process: the kernel's own count, not a parent's that it inherited."""
    (line,) = (of for of in Path("/proc/self/status").read_text().splitlines() if field in of)
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
