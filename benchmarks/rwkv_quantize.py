"""What quantizing an RWKV-7 of 1.5 billion parameters takes: time of a weight, memory of a file.

    python benchmarks/rwkv_quantize.py codebooks fast searched balanced memory

Writes ``benchmarks/results/rwkv_quantize.json``. Weights are random and have the shapes of the
published model, so that times and bytes are those of the real one and the text is not.
``codebooks``, and int4 in groups of 64 by the presets ``fast`` and ``balanced``, solve one matrix
of each shape on one thread, three seeds, by CPU time; ``searched`` is ``balanced`` without the
rounds that come after GPTQ. ``memory`` loads official files of a few
layers and of all, reads all that was loaded, and runs ``moeq quantize`` on them, each in a process
of its own whose memory is looked at ten times a second.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moeq_plugin import MoEQuantModifier
from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.codebook_solver import solve_codebook
from moeq_plugin.core.grid import Grid, choose_grid
from moeq_plugin.core.refined_gptq import solve_refined
from moeq_plugin.core.solver_options import SolverOptions
from moeq_plugin.rwkv import RWKV7Config, RWKV7ForCausalLM, to_official

RESULT = Path(__file__).with_name("results") / "rwkv_quantize.json"
WIDTH, WIDE, LAYERS, VOCABULARY = 2048, 8192, 24, 65536
SHAPES = {(WIDTH, WIDTH): 4, (WIDE, WIDTH): 1, (WIDTH, WIDE): 1}  # how many of them a layer has
FORM = CodebookFormat(6, 2, 64, 32)
GRID = Grid(num_bits=4, group_size=64)
INT4: dict[str, dict[str, Any]] = {
    "fast": {"preset": "fast"},
    "searched": {"preset": "balanced", "refine_rounds": 0},
    "balanced": {"preset": "balanced"},
}
SEEDS = range(3)
# layers of the file, and how many of them are put into codebooks
FILES = ((LAYERS, 2), (4, 2))
IMPORTS = "import moeq_plugin.integrations.llm_compressor, sys, time"
LOADING = "from moeq_plugin.rwkv import load_pth; model = load_pth(sys.argv[1])"
READING = "for parameter in model.parameters(): parameter.aminmax()"
RUN = "import sys; from moeq_plugin.cli import main; sys.argv[0] = 'moeq'; main()"


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and second moments of inputs that are correlated and differ in size."""
    g = torch.Generator().manual_seed(seed)
    size = torch.randn(rows, 1, generator=g).exp()
    weight = (0.02 * size * torch.randn(rows, columns, generator=g)).bfloat16()
    few = columns // 4
    mix = torch.randn(few, columns, generator=g) / few**0.5
    inputs = torch.randn(columns, few, generator=g) @ mix
    inputs += 0.5 * torch.randn(columns, columns, generator=g)
    inputs *= (0.7 * torch.randn(columns, generator=g)).exp()
    return weight, 2 * inputs.T @ inputs


def into_codebooks(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    solve_codebook(weight, hessian, FORM)


def into_int4(weight: torch.Tensor, hessian: torch.Tensor, *, options: SolverOptions) -> None:
    scale, zero_point = choose_grid(weight[None], GRID)
    solve_refined(weight[None], [hessian], scale, zero_point, GRID, options)


def time_shapes(solve: Callable[[torch.Tensor, torch.Tensor], None]) -> dict[str, Any]:
    """Solve every shape, and say what all matrices of the model would take."""
    found, minutes = [], 0.0
    for (rows, columns), in_layer in SHAPES.items():
        seconds = []
        for seed in SEEDS:
            weight, hessian = problem(rows, columns, seed)
            began = time.process_time()
            solve(weight, hessian)
            seconds.append(time.process_time() - began)
        found.append({"rows": rows, "columns": columns, "seconds": seconds})
        minutes += LAYERS * in_layer * statistics.median(seconds) / 60
    return {"shapes": found, "minutes_of_model": minutes}


@dataclass
class Peak:
    """The most that a process has held, in bytes: of its own, and with what it maps of files."""

    own: int = 0
    with_files: int = 0

    def look(self, process: int) -> None:
        """Hear how much a process holds now."""
        status = Path(f"/proc/{process}/status").read_text()
        found = dict(re.findall(r"(RssAnon|VmHWM):\s+(\d+) kB", status))
        self.own = max(self.own, 1024 * int(found.get("RssAnon", 0)))
        self.with_files = max(self.with_files, 1024 * int(found.get("VmHWM", 0)))


def watched(command: list[str], well: tuple[int, ...] = (0,)) -> Peak:
    """Run a command to its end, which is one of the codes in ``well``."""
    peak = Peak()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            peak.look(child.pid)
            time.sleep(0.1)
    if child.returncode not in well:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    return peak


def write_official(layers: int, path: Path) -> int:
    """Write a random model as its authors publish theirs; return its parameters."""
    config = RWKV7Config(hidden_size=WIDTH, num_hidden_layers=layers, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = RWKV7ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    torch.save(to_official(model.state_dict()), path)
    return sum(parameter.numel() for parameter in model.parameters())


def peak_of(*lines: str, of: Path | None = None) -> dict[str, int]:
    """Return the peak of a process that runs these lines, whose argument is a file."""
    script = "\n".join([*lines, "time.sleep(1)"])  # to be looked at once more
    return asdict(watched([sys.executable, "-c", script, str(of)]))


def measure_file(layers: int, in_codebooks: int) -> dict[str, Any]:
    with TemporaryDirectory(prefix="rwkv-") as directory:
        source, data = Path(directory) / "model.pth", Path(directory) / "data.jsonl"
        # in a process of its own: what it held would be no part of what is measured
        script = (
            f"import rwkv_quantize as r; print(r.write_official({layers}, r.Path({str(source)!r})))"
        )
        said = subprocess.check_output([sys.executable, "-c", script], cwd=Path(__file__).parent)
        parameters = int(said.split()[-1])  # behind what libraries have to say
        texts = (f"Sentence number {n} of a text that is as good as any other. " for n in range(8))
        data.write_text("".join(json.dumps({"text": 8 * text}) + "\n" for text in texts))
        command = [sys.executable, "-c", RUN, "quantize", str(source), f"{directory}/out"]
        command += ["--dataset", str(data), "--num-calibration-samples", "8"]
        command += ["--max-seq-length", "64"]
        if in_codebooks < layers:
            others = "|".join(map(str, range(in_codebooks, layers)))
            command += ["--ignore", "lm_head", "--ignore", rf"re:.*\.({others})\..*"]
        loading = peak_of(IMPORTS, LOADING, of=source)
        reading = peak_of(IMPORTS, LOADING, READING, of=source)
        began = time.monotonic()
        # 1: a result, of too few tokens to be shipped; memory does not depend on how many they are
        peak = watched(command, (0, 1))
        return {
            "layers": layers,
            "in_codebooks": in_codebooks,
            "parameters": parameters,
            "file": source.stat().st_size,
            "result": sum(p.stat().st_size for p in Path(directory, "out").glob("*.safetensors")),
            "loading": loading,
            "reading": reading,
            "quantizing": asdict(peak),
            "seconds": time.monotonic() - began,
        }


def main() -> None:
    torch.set_num_threads(1)
    content: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    content |= {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    options = {name: MoEQuantModifier(**fields).solver_options() for name, fields in INT4.items()}
    solvers = {name: partial(into_int4, options=of) for name, of in options.items()}
    for name, solve in {"codebooks": into_codebooks, **solvers}.items():
        if name in sys.argv:
            content[name] = time_shapes(solve)
            RESULT.write_text(json.dumps(content, indent=1) + "\n")
    if "memory" in sys.argv:
        content["imports"] = peak_of(IMPORTS)
        content["memory"] = []
        for layers, in_codebooks in FILES:
            content["memory"].append(measure_file(layers, in_codebooks))
            RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
