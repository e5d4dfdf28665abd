"""The directory of a quantized model, as far as files tell: small, made up, and without torch."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

from moeq_plugin.checkpoint.checks.findings import Finding, Report
from moeq_plugin.records.quality import Continuation, QualityRecord, TaskScore
from moeq_plugin.records.run import Basis, LinearRecord, RunRecord, save_records
from moeq_plugin.records.sampling import SamplingReport
from moeq_plugin.report.directory import Findings

LAYERS, EXPERTS, ROWS, COLUMNS = 3, 8, 16, 32
EXPERT_KINDS = ("gate_proj", "up_proj", "down_proj")
OPTIONS = {"W2A16": 2.125, "W4A16": 4.125, "W8A16": 8.125}
PROMPT = "</script><b>not markup</b> $ink `"  # what a text may hold and a page must not obey


def names() -> list[str]:
    """Return the linears, attention first."""
    return [
        f"model.layers.{layer}.{rest}"
        for layer in range(LAYERS)
        for rest in (
            "self_attn.q_proj",
            *(f"mlp.experts.{e}.{kind}" for e in range(EXPERTS) for kind in EXPERT_KINDS),
        )
    ]


def effective_tokens(layer: int, expert: int) -> float:
    """Return what the record says of an expert."""
    return 10.0 * (1 + layer) * (1 + expert)


def record() -> RunRecord:
    """Return a run with one linear per kind of fallback."""
    linears = []
    for number, name in enumerate(names()):
        parts = name.split(".")
        layer, expert = int(parts[2]), int(parts[5]) if "experts" in parts else None
        tokens = 4096.0 if expert is None else effective_tokens(layer, expert)
        linears.append(
            LinearRecord(name, "W4 int symmetric group 32", Basis.OWN, tokens, 0.1 + number)
        )
    for index, basis in ((1, Basis.SHRUNK), (4, Basis.LAYER), (30, Basis.NONE)):
        old = linears[index]
        loss = None if basis is Basis.NONE else old.loss
        linears[index] = LinearRecord(old.name, old.scheme, basis, 0.5 * index, loss)
    return RunRecord(
        modifier="MoEQuantModifier",
        settings={"scheme": "W4A16", "bits_per_weight": None, "ignore": ["lm_head"]},
        versions={"moeq-plugin": "0.1.0", "torch": "2.13.0"},
        linears=linears,
        limits=["a limit that `somebody` has to know"],
        kept={"lm_head": "output embedding"},
        model="someone/some-moe",
        sampling=sampling(),
        run={"hardware": "one core"},
    )


def sampling() -> SamplingReport:
    """Return a report of a set whose expert 0 gets nothing."""
    load = [[0, *range(20, 20 + EXPERTS - 1)] for _ in range(LAYERS)]
    return SamplingReport(
        num_sequences=4,
        unique_sequences=4,
        num_tokens=256,
        perplexity=9.0,
        imbalance=0.1,
        layer_imbalance=[0.1] * LAYERS,
        sequence_imbalance=0.2,
        min_load=0,
        median_load=23,
        max_load=26,
        distinct_4gram=0.9,
        compression_ratio=2.0,
        starved={},
        samples=["once upon a time", PROMPT],
        load=load,
    )


def quality() -> QualityRecord:
    """Return two texts, of which ``code`` is worse, and two tasks, of which ``hard`` is."""
    return QualityRecord(
        reference="someone/some-moe",
        quantized="out",
        settings={"seq_len": 128},
        versions={"torch": "2.13.0"},
        texts={"prose": text(0.01), "code": text(0.02)},
        tasks=[
            TaskScore("easy", "acc", True, 0.8, 0.01, 0.79, 0.01),
            TaskScore("hard", "exact_match", True, 0.5, 0.02, 0.4, 0.02),
            TaskScore("words", "perplexity", False, 8.0, None, 10.0, None),
        ],
        continuations=[Continuation(PROMPT, " original", " quantized")],
    )


def text(kl: float) -> dict:
    """Return the fields of an Evaluation as ``moeq eval`` writes them."""
    numbers = {
        "perplexity": 8.2, "reference_perplexity": 8.0, "nll_change": 0.025, "kl": kl,
        "kl_median": kl / 2, "kl_p99": 10 * kl, "top1_agreement": 0.95,
    }  # fmt: skip
    layers = [
        {
            "name": f"model.layers.{layer}.mlp", "jaccard": 0.99 - 0.1 * layer - kl,
            "jaccard_stderr": 0.002, "router_kl": 0.001 * (1 + layer), "router_kl_stderr": 1e-4,
            "load": [10] * EXPERTS, "reference_load": [5 + layer + e for e in range(EXPERTS)],
        }
        for layer in range(LAYERS)
    ]  # fmt: skip
    routing = {"layers": layers, "jaccard": 0.88, "jaccard_stderr": 0.001, "router_kl": 0.002,
               "router_kl_stderr": 1e-4}  # fmt: skip
    errors = {f"{name}_stderr": value / 20 for name, value in numbers.items()}
    counts = {"kl_max": 1.0, "num_tokens": 1000, "num_sequences": 8}
    return {**numbers, **errors, **counts, "routing": routing}


def choice() -> dict[str, str]:
    """Return an option per linear: layers differ, and so do two experts of layer 1."""
    chosen = {}
    for name in names():
        wide = "layers.1.mlp.experts.3" in name or "self_attn" in name
        chosen[name] = "W8A16" if wide else "W2A16" if "layers.0" in name else "W4A16"
    return chosen


def write_sensitivity(directory: Path) -> None:
    """Write table and allocation in the forms of :mod:`moeq_plugin.core`."""
    weights = ROWS * COLUMNS
    num_bytes = [int(bits * weights / 8) for bits in OPTIONS.values()]
    loss = [[(1 + row) * x for x in (1e-2, 1e-3, 1e-5)] for row in range(len(names()))]
    units = [name.rpartition(".experts.")[0] or name for name in names()]
    table = {
        "schema_version": 1, "rows": names(), "options": list(OPTIONS), "domains": ["0"],
        "loss": [loss], "num_bytes": [num_bytes] * len(names()),
        "num_weights": [weights] * len(names()), "units": {"vllm": units, "linear": names()},
        "fixed_bytes": 1000, "undercovered": [], "interactions": {},
    }  # fmt: skip
    (directory / "moeq_sensitivity.json").write_text(json.dumps(table))
    stored = sum(int(OPTIONS[option] * weights / 8) for option in choice().values())
    total = weights * len(names())
    allocation = {
        "schema_version": 1, "target": "linear", "robust": False,
        "budget": {"bits_per_weight": 4.5, "size_gb": None}, "limit_bytes": int(4.5 * total / 8),
        "num_bytes": stored, "bits_per_weight": 8 * stored / total, "value": 0.5, "bound": 0.5,
        "price": 1e-6, "losses": {"0": 0.5}, "choice": choice(), "reasons": {},
    }  # fmt: skip
    (directory / "moeq_allocation.json").write_text(json.dumps(allocation))


def write_tensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Write a safetensors file: name to dtype, shape and content."""
    header, content = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(content), len(content) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        content += data
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content)


def write_checkpoint(directory: Path) -> Path:
    """Write everything that a report reads."""
    directory.mkdir(parents=True, exist_ok=True)
    save_records([record()], directory)
    quality().save(directory / "moeq_eval.json")
    write_sensitivity(directory)
    config = {
        "architectures": ["SomeMoEForCausalLM"], "num_experts": EXPERTS, "num_experts_per_tok": 2,
        "quantization_config": {"quant_method": "compressed-tensors"},
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    packed = ROWS * COLUMNS // 2
    write_tensors(
        directory / "model.safetensors",
        {
            "model.layers.0.mlp.experts.0.up_proj.weight_packed": ("I32", [ROWS, 4], bytes(packed)),
            "model.layers.0.mlp.experts.0.up_proj.weight_scale": ("BF16", [ROWS, 1], bytes(32)),
            "model.layers.0.mlp.experts.0.up_proj.weight_shape": (
                "I64", [2], struct.pack("<2q", ROWS, COLUMNS),
            ),
            "model.norm.weight": ("BF16", [100], bytes(200)),
        },
    )  # fmt: skip
    return directory


def traces(section, name):
    """Return the traces of one chart of a section by their names."""
    (chart,) = [chart for chart in section.charts if chart.name == name]
    return {trace.get("name"): trace for trace in chart.data}


def verified(*findings: Finding) -> Report:
    """Return what a verification found."""
    return Report("out", "qwen3_moe", "vllm", 1, 100, {"W4": 75}, findings)


def borrowing(found: Findings, number: int) -> None:
    """Let that many linears of a checkpoint rest on tokens of others."""
    linears = found.records[0].linears
    linears[:number] = [replace(linear, basis=Basis.LAYER) for linear in linears[:number]]
