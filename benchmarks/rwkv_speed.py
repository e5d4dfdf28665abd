"""Time of a token and bytes of weights: dense, codebooks and grids, on random RWKV-7 layers.

    python benchmarks/rwkv_speed.py [--widths 1024,2048] [--layers 4] [--threads 1,2]

Writes ``benchmarks/results/rwkv_speed.json``; ``--table`` prints its table. The forms of a width
are timed in turn within one process, round after round, so that whatever else the machine does
hits all alike; medians of CPU time are compared, on several threads those of wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.models.packed import CodebookLinear
from moeq_plugin.models.packed_grid import GridLinear
from moeq_plugin.rwkv import RWKV7Config, RWKV7ForCausalLM

RESULT = Path(__file__).with_name("results") / "rwkv_speed.json"
CODEBOOKS = {
    "codebook 6/2 in 64 x 32": CodebookFormat(6, 2, 64, 32),
    "codebook 6/2 in 256 x 64": CodebookFormat(6, 2, 256, 64),
    "codebook 7/2 in 512 x 64": CodebookFormat(7, 2, 512, 64),
}
GRIDS = {"int3 group 64": (3, 64), "int4 group 64": (4, 64), "int8 group 64": (8, 64)}
LOW_RANK = ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2")  # stay in 16 bit
MATRIX = 4096  # rows and columns of the product that is timed by itself


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32)


def random_codebooks(plain: nn.Linear, form: CodebookFormat) -> CodebookLinear:
    scale_dtype = str(plain.weight.dtype).removeprefix("torch.")
    packed = CodebookLinear(plain, PackedFormat(**asdict(form), scale_dtype=scale_dtype))
    packed.requires_grad_(False).packed.copy_(random_words(len(packed.packed)))
    parts = packed.form.parts(packed.packed, packed.matrix_shape)
    parts.scales.fill_(plain.weight.std().item() / 64)
    return packed


def random_grid(plain: nn.Linear, num_bits: int, group_size: int) -> GridLinear:
    rows, columns = plain.weight.shape
    groups = columns // group_size
    scale = torch.full((rows, groups), plain.weight.std().item() / (1 << num_bits))
    return GridLinear(
        random_words(rows, columns * num_bits // 32),
        scale.to(plain.weight.dtype),
        random_words(rows * num_bits // 32, groups),
        (rows, columns),
        num_bits,
        None,
    )


def packed_as(name: str, plain: nn.Linear) -> nn.Module:
    if name in CODEBOOKS:
        return random_codebooks(plain, CODEBOOKS[name])
    return random_grid(plain, *GRIDS[name])


def stack(width: int, layers: int, name: str) -> RWKV7ForCausalLM:
    """Return random layers in one form, behind a tiny vocabulary."""
    config = RWKV7Config(hidden_size=width, num_hidden_layers=layers, vocab_size=64)
    torch.manual_seed(0)
    model = RWKV7ForCausalLM(config).eval().requires_grad_(False)
    model = model if name == "float32" else model.bfloat16()
    if name in CODEBOOKS or name in GRIDS:
        for path, module in list(model.named_modules()):
            last = path.rpartition(".")[2]
            if isinstance(module, nn.Linear) and last not in (*LOW_RANK, "lm_head"):
                model.set_submodule(path, packed_as(name, module))
    return model


def nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def medians(run: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> Any:
    """Return the median seconds of every function, each called once per round."""
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for call in run.values():
        call()
    for _ in range(rounds):
        for name, call in run.items():
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return {name: statistics.median(of) for name, of in seconds.items()}


def time_matrix(rounds: int) -> list[dict[str, Any]]:
    plain = nn.Linear(MATRIX, MATRIX, bias=False).requires_grad_(False)
    half, x = plain.weight.bfloat16(), torch.randn(1, MATRIX)
    modules = {name: packed_as(name, plain.bfloat16()) for name in (*CODEBOOKS, *GRIDS)}
    weight, y = plain.weight.float(), x.bfloat16()
    run: dict[str, Callable[[], Any]] = {
        "float32": lambda: linear(x, weight),
        "bfloat16": lambda: linear(y, half),
    }
    for name, module in modules.items():
        run[name] = lambda module=module: module(y)
    sizes = {"float32": 4 * MATRIX**2, "bfloat16": 2 * MATRIX**2}
    sizes |= {name: nbytes(module) for name, module in modules.items()}
    found = medians(run, rounds, time.process_time)
    return [
        {"what": "matrix", "form": name, "seconds": of, "bytes": sizes[name], "threads": 1}
        for name, of in found.items()
    ]


def time_stack(width: int, layers: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    names = ("float32", "bfloat16", *CODEBOOKS, *GRIDS)
    models = {name: stack(width, layers, name) for name in names}
    token = torch.ones(1, 1, dtype=torch.long)
    state = {name: model(input_ids=token).state for name, model in models.items()}
    run: dict[str, Callable[[], Any]] = {
        name: lambda name=name: models[name](input_ids=token, state=state[name]) for name in names
    }
    clock = time.process_time if threads == 1 else time.perf_counter
    found = medians(run, rounds, clock)
    what = {"what": "stack", "width": width, "layers": layers, "threads": threads}
    return [
        {**what, "form": name, "seconds": found[name], "bytes": nbytes(models[name])}
        for name in names
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="1024,2048")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.out.read_text())))
        return
    torch.set_num_threads(1)
    content: dict[str, Any] = {"torch": torch.__version__, "cpu": cpu(), "runs": []}
    content["runs"] += time_matrix(arguments.rounds)
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        for width in map(int, arguments.widths.split(",")):
            content["runs"] += time_stack(width, arguments.layers, threads, arguments.rounds)
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


def cpu() -> str:
    return torch.backends.cpu.get_cpu_capability()


def table(content: dict[str, Any]) -> str:
    """Return milliseconds, the speed against dense bfloat16, and the bytes of weights."""
    rows = ["| what | threads | form | ms | against bfloat16 | MB |", "|---" * 6 + "|"]
    runs = content["runs"]
    base = {place(run): run["seconds"] for run in runs if run["form"] == "bfloat16"}
    for run in runs:
        speed = base[place(run)] / run["seconds"]
        what = f"{MATRIX} x {MATRIX}"
        if run["what"] == "stack":
            what = f"{run['layers']} layers of width {run['width']}"
        rows.append(
            f"| {what} | {run['threads']} | {run['form']} | {1e3 * run['seconds']:.2f} "
            f"| {speed:.2f} x | {run['bytes'] / 1e6:.1f} |"
        )
    return "\n".join(rows)


def place(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["what"], run.get("width"), run["threads"]


if __name__ == "__main__":
    main()
