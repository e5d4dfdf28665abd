"""Does the model of memory and time in ``docs/scaling.md`` hold on layers of real shapes?

    python benchmarks/scaling.py [--quick]

One layer of random weights in bfloat16, quantized by ``oneshot`` with one thread, in a process of
its own that first measures how fast this machine multiplies, factorizes and rounds. Writes
``benchmarks/results/scaling.json`` after every run and continues there. ``--quick`` measures two
small layers and writes nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from scaling_model import (
    Architecture,
    Input,
    Rates,
    gqa,
    layer_inputs,
    memory,
    mla,
    seconds,
    stack_size,
)

RESULT = Path(__file__).parent / "results" / "scaling.json"
SEQUENCES, LENGTH = 128, 2048  # of the whole models
ARCHITECTURES = {
    "Mixtral-8x7B": Architecture(4096, 14336, 8, 2, gqa(4096, 4096, 1024), layers=32),
    "Qwen3-30B-A3B": Architecture(2048, 768, 128, 8, gqa(2048, 4096, 512), layers=48),
    "DeepSeek-V3": Architecture(
        7168, 2048, 256, 8, mla(7168, 128), shared=1, layers=58, dense_layers=(3, 18432)
    ),
    "Kimi-K2, 1T": Architecture(
        7168, 2048, 384, 8, mla(7168, 64), shared=1, layers=60, dense_layers=(1, 18432)
    ),
}
# What a large accelerator is assumed to do. Not measured.
GPU = Rates(forward=400e12, moments=40e12, factor=8e12, update=20e12, rounding=20e9, column=60e-6)
GPU_BYTES = 141_000_000_000


@dataclass(frozen=True)
class Case:
    """A layer to be measured: a real one with fewer experts."""

    architecture: Architecture
    kind: str  # of transformers' configurations
    sequences: int
    length: int
    rounds: int
    attention: bool = True  # quantized as well


def _cut(name: str, experts: int, top_k: int) -> Architecture:
    return replace(ARCHITECTURES[name], experts=experts, top_k=top_k)


CASES = {
    "Qwen3-30B-A3B, 32 of 128 experts": Case(
        _cut("Qwen3-30B-A3B", 32, 8), "qwen3_moe", 2, 512, rounds=3
    ),
    "DeepSeek-V3, 2 of 256 experts and the shared one": Case(
        _cut("DeepSeek-V3", 2, 1), "deepseek_v3", 2, 128, rounds=3, attention=False
    ),
    "Mixtral-8x7B, 1 of 8 experts": Case(_cut("Mixtral-8x7B", 1, 1), "mixtral", 2, 128, rounds=3),
}
QUICK = {
    "small": Case(Architecture(512, 256, 16, 4, gqa(512, 512, 128)), "qwen3_moe", 8, 256, 1),
    "wide": Case(Architecture(512, 2048, 2, 1, gqa(512, 512, 128)), "mixtral", 8, 256, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small layers, nothing written")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what a process of its own measures
    arguments = parser.parse_args()
    if arguments.only:
        torch.set_num_threads(1)
        case = (CASES | QUICK).get(arguments.only)
        print(json.dumps(measure(case) if case else whole_models()))
        return
    found: dict[str, Any] = {"runs": [], "models": []}
    if RESULT.exists() and not arguments.quick:
        found = json.loads(RESULT.read_text())
    cases = QUICK if arguments.quick else CASES
    wanted = [(name, number) for name, of in cases.items() for number in range(of.rounds)]
    machine = _machine()
    there = {(run["machine"], run["layer"], run["round"]) for run in found["runs"]}
    for name, number in sorted(wanted, key=lambda run: run[1]):  # all layers once, then again
        if (machine, name, number) in there:
            continue
        run = {"machine": machine, "layer": name, "round": number, **_in_a_process(name)}
        found["runs"].append(run)
        print(json.dumps(found["runs"][-1], indent=1), flush=True)
        _keep(found, arguments.quick)
    if not arguments.quick:
        found["models"] = found["models"] or _in_a_process("models")
        _keep(found, arguments.quick)


def _keep(found: dict[str, Any], is_quick: bool) -> None:
    if not is_quick:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


def _machine() -> str:
    """Return what decides about the rates: the vector instructions."""
    has_bfloat16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    return torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if has_bfloat16 else "")


def _in_a_process(name: str) -> Any:
    command = [sys.executable, __file__, "--only", name]
    # what is freed is given back at once: tensors are counted, not what malloc keeps of them
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case) -> dict[str, Any]:
    """Quantize one layer, and predict it from rates measured before and after."""
    of, data = case.architecture, (case.sequences, case.length)
    inputs = layer_inputs(of, *data, attention=case.attention)
    model = make_model(case)
    before = _measure_rates(inputs)
    taken = quantize(model, case)
    # others use the machine too, and it may be twice as fast a few minutes later
    rates = {"before": before, "after": _measure_rates(inputs)}
    times = [seconds(inputs, at.__getitem__, stack_size) for at in rates.values()]
    parts = {part: statistics.mean(at[part] for at in times) for part in times[0]}
    passes = parts["forward"] + parts["moments"]
    predicted = {
        "passes_s": passes,
        "solve_s": sum(parts.values()) - passes,
        "cpu_s": sum(parts.values()),
        "bytes": memory(of, inputs, *data)["above_weights"],
    }
    return {
        "sequences": case.sequences, "length": case.length, "attention": case.attention,
        "predicted": predicted, "measured": taken, "predicted_parts_s": parts,
        "rates": {
            when: {f"{i.rows} x {i.columns}": asdict(of_input) for i, of_input in at.items()}
            for when, at in rates.items()
        },
    }  # fmt: skip


def _measure_rates(inputs: list[Input]) -> dict[Input, Rates]:
    for kind in (_forward, _moments, _factor, _update, _rounding):
        kind.cache_clear()
    return {of: rates_of(of) for of in inputs}


def make_model(case: Case) -> torch.nn.Module:
    """Return one layer of random weights behind a tiny vocabulary, its experts separate."""
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    of = case.architecture
    own: dict[str, dict[str, Any]] = {
        "mixtral": {
            "num_local_experts": of.experts,
            "intermediate_size": of.intermediate,
            "num_attention_heads": of.attention.inputs[-1][0] // 128,
        },
        "qwen3_moe": {
            "num_experts": of.experts,
            "moe_intermediate_size": of.intermediate,
            "num_attention_heads": of.attention.inputs[-1][0] // 128,
            "head_dim": 128,
        },
        "deepseek_v3": {
            "n_routed_experts": of.experts,
            "moe_intermediate_size": of.intermediate,
            "n_shared_experts": of.shared,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
        },
    }
    if case.kind != "deepseek_v3":
        keys = (of.attention.inputs[0][1] - of.attention.inputs[-1][0]) // 2
        own[case.kind]["num_key_value_heads"] = keys // 128
    config = AutoConfig.for_model(
        case.kind,
        hidden_size=of.hidden,
        num_experts_per_tok=of.top_k,
        num_hidden_layers=1,
        vocab_size=512,
        **own[case.kind],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linearize_moe(model)
    return model.eval()


def quantize(model: torch.nn.Module, case: Case) -> dict[str, float]:
    """Return CPU seconds and peak memory from the first batch to the last weight."""
    from datasets import Dataset
    from llmcompressor import oneshot

    from moeq_plugin import MoEQuantModifier

    at: dict[str, float] = {"solve": 0.0}

    class Watched(MoEQuantModifier):  # type: ignore[misc]
        def on_calibration_start(self, *args: Any, **kwargs: Any) -> None:
            super().on_calibration_start(*args, **kwargs)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            at["resident"] = _status("VmRSS")
            at["began"] = time.process_time()

        def on_sequential_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            began = time.process_time()
            super().on_sequential_epoch_end(*args, **kwargs)
            at["solve"] += time.process_time() - began

        def on_calibration_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_calibration_end(*args, **kwargs)
            at["all"] = time.process_time() - at["began"]
            at["peak"] = _status("VmHWM")

    ids = torch.randint(0, 512, (case.sequences, case.length))
    ignore = ["lm_head"] if case.attention else ["lm_head", "re:.*self_attn.*"]
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        model.config.name_or_path = directory  # where the host looks for a configuration
        oneshot(
            model=model,
            # few tokens suffice: the time of borrowing second moments is not what is measured
            recipe=Watched(scheme="W4A16", ignore=ignore, min_effective_tokens=0),
            dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
            processor=object(),
            max_seq_length=case.length,
        )
    return {
        "passes_s": at["all"] - at["solve"],
        "solve_s": at["solve"],
        "cpu_s": at["all"],
        "bytes": at["peak"] - at["resident"],
    }


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None  # Linux says so
    return 1024 * int(found[1])


def rates_of(of: Input) -> Rates:
    """Measure what this process does with matrices like this input's, at most 4096 wide."""
    columns, rows = min(of.columns, 4096), min(of.rows, 2048)
    tokens = max(1, min(512, int(of.batch_tokens)))
    return Rates(
        forward=_forward(tokens, min(columns, 2048), rows),
        moments=_moments(tokens, columns),
        factor=_factor(columns),
        update=_update(min(columns, 2048), rows),
        rounding=_rounding(min(of.rows, 32768)),
    )


@lru_cache
def _forward(tokens: int, columns: int, rows: int) -> float:
    inputs = torch.randn(tokens, columns).bfloat16()
    weight = torch.randn(rows, columns).bfloat16()
    work = 2 * tokens * columns * rows
    return work / _clock(lambda: torch.nn.functional.linear(inputs, weight))


@lru_cache
def _moments(tokens: int, columns: int) -> float:
    from moeq_plugin.core.hessian import accumulate_hessian

    hessian = torch.zeros(columns, columns)
    inputs, token_weights = torch.randn(tokens, columns).bfloat16(), torch.rand(tokens)
    work = 2 * tokens * columns**2
    return work / _clock(lambda: accumulate_hessian(hessian, inputs, token_weights))


@lru_cache
def _factor(columns: int) -> float:
    from moeq_plugin.core.factorization import inverse_factor

    inputs = torch.randn(64, columns)
    hessian, order = inputs.T @ inputs, torch.randperm(columns)[None]
    return 4 / 3 * columns**3 / _clock(lambda: inverse_factor([hessian], order, 0.01))


@lru_cache
def _update(columns: int, rows: int) -> float:
    weight, factor = torch.randn(1, columns, rows), torch.randn(1, 128, columns)
    errors = torch.randn(1, 128, rows)
    work = 2 * columns * 128 * rows
    return work / _clock(lambda: weight.baddbmm_(factor.transpose(1, 2), errors, alpha=-1e-3))


@lru_cache
def _rounding(rows: int) -> float:
    from moeq_plugin.core.gptq import solve
    from moeq_plugin.core.grid import Grid

    weight, hessian = torch.randn(1, rows, 128).bfloat16(), torch.eye(128)
    scale = torch.full((1, rows, 1), 0.3).bfloat16()
    zero_point = torch.zeros(1, rows, 1, dtype=torch.int8)
    grid = Grid(4, 128, True)
    return 128 * rows / _clock(lambda: solve(weight, [hessian], scale, zero_point, grid))


def _clock(work: Callable[[], object]) -> float:
    """Return CPU seconds, the median of up to nine; the first call may find caches cold."""
    times: list[float] = []
    while len(times) < 9 and sum(times) < 1:
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times)


def whole_models() -> list[dict[str, Any]]:
    """Return what every architecture takes, at this machine's rates and at the assumed ones."""
    found = []
    for name, of in ARCHITECTURES.items():
        layers = [(of.layers, False), (of.dense_layers[0], True)]
        cpu = gpu = 0.0
        for count, is_dense in layers if of.dense_layers[0] else layers[:1]:
            inputs = layer_inputs(of, SEQUENCES, LENGTH, is_dense=is_dense)
            cpu += count * sum(seconds(inputs, rates_of, stack_size).values())
            gpu += count * sum(on_gpu(of, inputs).values())
        inputs = layer_inputs(of, SEQUENCES, LENGTH)
        found.append({
            "model": name, "layers": of.layers, "dense_layers": of.dense_layers[0],
            "cpu_memory": memory(of, inputs, SEQUENCES, LENGTH),
            "gpu_memory": memory(of, inputs, SEQUENCES, LENGTH, GPU_BYTES),
            "cpu_layer_s": seconds(inputs, rates_of, stack_size),
            "gpu_layer_s": on_gpu(of, inputs),
            "cpu_model_s": cpu, "gpu_model_s": gpu,
        })  # fmt: skip
    return found


def on_gpu(of: Architecture, inputs: list[Input]) -> dict[str, float]:
    """Return seconds at the assumed rates, with stacks that fit beside what is held."""
    held = memory(of, inputs, SEQUENCES, LENGTH, GPU_BYTES)
    free = max(0.0, GPU_BYTES - held["weights"] - held["moments"] - held["sample"])
    return seconds(inputs, lambda _: GPU, lambda i: stack_size(i, free))


if __name__ == "__main__":
    main()
