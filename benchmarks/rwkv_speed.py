"""Time of a token and bytes of weights: dense, codebooks and grids, on random RWKV-7 layers.

    python benchmarks/rwkv_speed.py [--widths 1024,2048,4096] [--layers 4] [--threads 1,2]

Writes ``benchmarks/results/rwkv_speed.json``; ``--table`` prints its table. The forms of a width
are timed in turn within one process, round after round, so that whatever else the machine does
hits all alike; medians of CPU time are compared, on several threads those of wall time. All of
that is done ``--repeats`` times, and each repeat compares its own medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
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
MATRIX_ROWS = (1, 2, 4, 8, 32, 128)  # of activations


@dataclass(frozen=True)
class Times:
    """How often everything is called."""

    rounds: int
    repeats: int


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


def stacks(width: int, layers: int) -> dict[str, RWKV7ForCausalLM]:
    """Return the same random layers in every form, behind a tiny vocabulary."""
    config = RWKV7Config(hidden_size=width, num_hidden_layers=layers, vocab_size=64)
    torch.manual_seed(0)
    plain = RWKV7ForCausalLM(config).eval().requires_grad_(False)
    half = deepcopy(plain).bfloat16()
    found = {"float32": plain, "bfloat16": half}
    for name in (*CODEBOOKS, *GRIDS):
        # what is replaced need not be copied first
        replaced = {
            path: module for path, module in half.named_modules() if is_packed(path, module)
        }
        packed = deepcopy(half, {id(module): module for module in replaced.values()})
        for path, module in replaced.items():
            packed.set_submodule(path, packed_as(name, module))
        found[name] = packed
    return found


def is_packed(path: str, module: nn.Module) -> bool:
    last = path.rpartition(".")[2]
    return isinstance(module, nn.Linear) and last not in (*LOW_RANK, "lm_head")


def nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def medians(
    run: dict[str, Callable[[], Any]], times: Times, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return each function's median seconds in every repeat; each is called once per round."""
    found: dict[str, list[float]] = {name: [] for name in run}
    for call in run.values():
        call()
    for _ in range(times.repeats):
        seconds: dict[str, list[float]] = {name: [] for name in run}
        for _ in range(times.rounds):
            for name, call in run.items():
                began = clock()
                call()
                seconds[name].append(clock() - began)
        for name, of in seconds.items():
            found[name].append(statistics.median(of))
    return found


def time_matrix(times: Times, rows: int) -> list[dict[str, Any]]:
    """Time one product with a few rows of activations."""
    plain = nn.Linear(MATRIX, MATRIX, bias=False).requires_grad_(False)
    weight, x = plain.weight.detach().clone(), torch.randn(rows, MATRIX)
    half, y = plain.bfloat16().weight, x.bfloat16()
    modules = {name: packed_as(name, plain) for name in (*CODEBOOKS, *GRIDS)}
    run: dict[str, Callable[[], Any]] = {
        "float32": lambda: linear(x, weight),
        "bfloat16": lambda: linear(y, half),
    }
    for name, module in modules.items():
        run[name] = lambda module=module: module(y)
    sizes = {"float32": weight.nbytes, "bfloat16": half.nbytes}
    sizes |= {name: nbytes(module) for name, module in modules.items()}
    what = {"what": "matrix", "rows": rows, "threads": 1}
    return [
        {**what, "form": name, "seconds": of, "bytes": sizes[name]}
        for name, of in medians(run, times, time.process_time).items()
    ]


def time_stack(
    models: dict[str, RWKV7ForCausalLM], width: int, layers: int, threads: int, times: Times
) -> list[dict[str, Any]]:
    """Time a token."""
    token = torch.ones(1, 1, dtype=torch.long)
    state = {name: model(input_ids=token).state for name, model in models.items()}
    run: dict[str, Callable[[], Any]] = {
        name: lambda name=name: models[name](input_ids=token, state=state[name]) for name in models
    }
    clock = time.process_time if threads == 1 else time.perf_counter
    found = medians(run, times, clock)
    what = {"what": "stack", "width": width, "layers": layers, "threads": threads}
    return [
        {**what, "form": name, "seconds": found[name], "bytes": nbytes(model)}
        for name, model in models.items()
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="1024,2048,4096")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.out.read_text())))
        return
    torch.set_num_threads(1)
    times = Times(arguments.rounds, arguments.repeats)
    content: dict[str, Any] = {"torch": torch.__version__, "cpu": cpu(), "runs": []}
    for rows in MATRIX_ROWS:
        content["runs"] += time_matrix(times, rows)
    for width in map(int, arguments.widths.split(",")):
        models = stacks(width, arguments.layers)
        for threads in map(int, arguments.threads.split(",")):
            torch.set_num_threads(threads)
            content["runs"] += time_stack(models, width, arguments.layers, threads, times)
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content))


def cpu() -> str:
    return torch.backends.cpu.get_cpu_capability()


def table(content: dict[str, Any]) -> str:
    """Return how fast everything is against dense bfloat16, and the bytes of weights.

    Speeds are the middle one of all repeats, and in brackets the smallest and the largest.
    """
    base = {place(run): run["seconds"] for run in content["runs"] if run["form"] == "bfloat16"}
    cells = {(*place(run), run["form"]): cell(run, base[place(run)]) for run in content["runs"]}
    products = [run for run in content["runs"] if run["what"] == "matrix"]
    counts = sorted({run["rows"] for run in products})
    lines = [f"| {MATRIX} x {MATRIX} | MB | " + " | ".join(map(str, counts)) + " |"]
    lines.append("|---" * (2 + len(counts)) + "|")
    for run in products:
        if run["rows"] == counts[0]:
            found = [cells[*place(run | {"rows": rows}), run["form"]] for rows in counts]
            lines.append(
                f"| {run['form']} | {run['bytes'] / 1e6:.1f} | " + " | ".join(found) + " |"
            )
    lines += ["", "| layers | width | threads | form | against bfloat16 | MB |", "|---" * 6 + "|"]
    for run in content["runs"]:
        if run["what"] == "stack":
            lines.append(
                f"| {run['layers']} | {run['width']} | {run['threads']} | {run['form']} "
                f"| {cells[*place(run), run['form']]} | {run['bytes'] / 1e6:.1f} |"
            )
    return "\n".join(lines)


def cell(run: dict[str, Any], base: list[float]) -> str:
    """Return milliseconds, and how many times as fast that is as dense bfloat16."""
    speeds = sorted(dense / own for dense, own in zip(base, run["seconds"], strict=True))
    spread = f"{statistics.median(speeds):.2f} ({speeds[0]:.2f} to {speeds[-1]:.2f})"
    return f"{1e3 * statistics.median(run['seconds']):.2f} ms, {spread}"


def place(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run.get(key) for key in ("what", "width", "rows", "threads"))


if __name__ == "__main__":
    main()
