"""Write the tables of the README and the docs, and two figures, from the committed results.

    python benchmarks/tables.py [--check]

With ``--check`` nothing is written and a difference is an error.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import rwkv_tables
from ablation_tables import ablation, effects
from after_rounding_tables import block_reconstruction, gradient_damping, router_refit
from domain_tables import calibration_sets
from headline_figure import headline_figure
from ingredient_tables import ingredients
from llama_tables import llama_files
from peer_figure import figure
from peer_tables import costs, headline, losses
from prior_tables import few_tokens
from seeds import change, error

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BASELINE = "GPTQ, all experts"
HEADLINE = ("MoEQuant", "ModelOpt-style", "GEMQ Fisher", "MxMoE norm", "MC-MoE, paper", "frequency")


def main() -> None:
    pages = {
        "README.md": {"losses": headline, "families": families},
        "docs/llama_cpp.md": {"llama_files": llama_files},
        "docs/results.md": {
            "quality": quality,
            "speed": speed,
            "allocation": partial(allocation, "routed experts", HEADLINE),
            "ablation": ablation,
            "effects": effects,
        },
        "docs/ebss.md": {"sets": sets, "sampling": sampling},
        "docs/allocation.md": {
            "experts": partial(allocation, "routed experts", None, perplexity=True),
            "linears": partial(allocation, "all linears", None, perplexity=True),
            "prediction": prediction,
            "domains": domains,
            "solver": solver,
        },
        "docs/ablation.md": {
            "kl": partial(ablation, "kl", 1e3, 1),
            "perplexity": partial(ablation, "perplexity", 1, 2),
            "routing": partial(ablation, "routing_agreement", 100, 1),
        },
        "docs/calibration_text.md": {"sets": calibration_sets},
        "docs/awq.md": {"speed": awq_speed},
        "docs/peers.md": {"losses": losses, "costs": costs},
        "docs/solver.md": {
            "ingredients": ingredients,
            "few tokens": few_tokens,
            "gradients": gradient_damping,
            "routers": router_refit,
            "blocks": block_reconstruction,
        },
        "docs/rwkv.md": {
            "choice": rwkv_tables.choice,
            "formats": rwkv_tables.formats,
            "elementwise": rwkv_tables.elementwise,
            "rules": rwkv_tables.rules,
        },
        "docs/scaling.md": {
            "measured": scaled,
            "memory": layer_memory,
            "time": layer_time,
            "processes": processes,
        },
    }
    docs = ROOT / "docs"
    texts = {docs / "peers.svg": figure(), docs / "headline.svg": headline_figure()}
    for name, tables in pages.items():
        page = ROOT / name
        new = page.read_text()
        for block, table in tables.items():
            pattern = rf"(<!-- {block} -->\n).*?(<!-- end -->)"
            text = table()
            new = re.sub(pattern, lambda m, t=text: m[1] + t + m[2], new, flags=re.DOTALL)
        texts[page] = new
    if "--check" in sys.argv:
        stale = [path.name for path, text in texts.items() if path.read_text() != text]
        sys.exit(f"not what benchmarks/results say: {stale}" if stale else 0)
    for path, text in texts.items():
        path.write_text(text)


def families() -> str:
    """Return how many families of transformers are quantized and refused, as their page has it."""
    page = (ROOT / "docs" / "models.md").read_text()
    counts = re.search(
        r"has (\d+) families.*?: (\d+) come out .*?, (\d+) are refused", page, re.DOTALL
    )
    assert counts is not None, "docs/models.md has another sentence"
    whole, good, refused = counts.groups()
    return (
        f"All {whole} Mixture-of-Experts families of transformers were tried with tiny models: "
        f"{good} are quantized, verified and\nread back bit by bit, {refused} are refused in a "
        "sentence before calibration ([docs/models.md](docs/models.md)).\n"
    )


def quality() -> str:
    """Return KL to the 16-bit model, mean over seeds, and its paired change against stock."""
    runs = json.loads((RESULTS / "quality.json").read_text())["runs"]
    kl = {(r["model"], r["num_bits"], r["method"], r["seed"]): r["kl"] for r in runs}
    seeds = sorted({seed for *_, seed in kl})
    cases = list(dict.fromkeys((model, bits) for model, bits, *_ in kl))
    lines = [
        "| KL to 16 bit, held-out | " + " | ".join(f"{m}, W{b} g128" for m, b in cases) + " |",
        "|---" * (len(cases) + 1) + "|",
    ]
    for method in dict.fromkeys(r["method"] for r in runs):
        cells = []
        for model, bits in cases:
            ours = [kl[model, bits, method, seed] for seed in seeds]
            base = [kl[model, bits, BASELINE, seed] for seed in seeds]
            note = "" if method == BASELINE else f" ({change(ours, base)})"
            cells.append(f"{statistics.mean(ours):.5f}{note}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def speed() -> str:
    """Return CPU seconds, peak memory and the paired ratio to ours."""
    results = json.loads((RESULTS / "oneshot_speed.json").read_text())
    lines = [
        "| layer | run | CPU s | peak MiB above loading | MoEQuant's CPU time / this |",
        "|---|---|---|---|---|",
    ]
    for layer, result in results.items():
        for name, median in result["median"].items():
            ratio = result["cpu_ratio_of_MoEQuant"].get(name)
            lines.append(
                f"| {layer} | {name} | {median['cpu_s']:.1f} "
                f"| {median['peak_mib_above_loading']:.0f} | {f'{ratio:.2f}' if ratio else ''} |"
            )
    return "\n".join(lines) + "\n"


def sets() -> str:
    """Return what each kind of calibration set is like and how well it calibrates."""
    runs = json.loads((RESULTS / "ebss.json").read_text())["quality"]["runs"]
    of = {(r["model"], r["num_bits"], r["set"], r["seed"]): r for r in runs}
    models, names = (list(dict.fromkeys(r[key] for r in runs)) for key in ("model", "set"))
    lines = [
        "| model | set | KL, W4 | KL, W3 | against natural text, W3 | imbalance | perplexity "
        "| distinct 4-grams |",
        "|---" * 8 + "|",
    ]
    for model in models:
        for name in names:
            seeds = sorted({r["seed"] for r in runs if (r["model"], r["set"]) == (model, name)})
            kl = [[of[model, bits, name, seed]["kl"] for seed in seeds] for bits in (4, 3)]
            base = [of[model, 3, "natural text", seed]["kl"] for seed in seeds]
            against = change(kl[1], base) if name != "natural text" else ""
            about = [of[model, 3, name, seed] for seed in seeds]
            imbalance, perplexity, distinct = (
                statistics.mean(r[key] for r in about)
                for key in ("imbalance", "perplexity_of_set", "distinct_4gram")
            )
            lines.append(
                f"| {model} | {name} | {statistics.mean(kl[0]):.5f} | {statistics.mean(kl[1]):.5f} "
                f"| {against} | {imbalance:.3f} | {perplexity:.3g} | {distinct:.2f} |"
            )
    return "\n".join(lines) + "\n"


def sampling() -> str:
    """Return medians of sampling speed over rounds."""
    runs = json.loads((RESULTS / "ebss.json").read_text())["speed"]["runs"]
    lines = [
        "| model | sequences at a time | tokens per CPU second, guided "
        "| times `generate(num_beams=4)` | times the bare cached forwards |",
        "|---" * 5 + "|",
    ]
    for model, rows in dict.fromkeys((r["model"], r["sequences"]) for r in runs):
        medians = [
            statistics.median(r[key] for r in runs if (r["model"], r["sequences"]) == (model, rows))
            for key in ("tokens_per_s_guided", "times_generate", "times_forward_only")
        ]
        lines.append("| {} | {} | {:.0f} | {:.2f} | {:.2f} |".format(model, rows, *medians))
    return "\n".join(lines) + "\n"


def allocation(scope: str, only: Sequence[str] | None, *, perplexity: bool = False) -> str:
    """Return held-out KL of every method at every budget, and perplexity in brackets if wanted.

    A random row is the mean of several.
    """
    runs = json.loads((RESULTS / "allocation.json").read_text())["runs"]
    runs = [{**r, "method": re.sub(r"random \d", "random", r["method"])} for r in runs]
    runs = [r for r in runs if r["scope"] == scope and (only is None or r["method"] in only)]
    budgets = sorted({r["budget"] for r in runs})
    lines = [
        "| model | one scheme per | scores | " + " | ".join(f"{b:g}" for b in budgets) + " |",
        "|---" * (len(budgets) + 3) + "|",
    ]
    for model in dict.fromkeys(r["model"] for r in runs):
        for unit in dict.fromkeys(r["unit"] for r in runs):
            for method in dict.fromkeys(r["method"] for r in runs):
                key = (model, unit, method)
                found = [r for r in runs if (r["model"], r["unit"], r["method"]) == key]
                if not found:
                    continue
                seeds = len({r["seed"] for r in found})
                name = f"{model}, {seeds} seed" + "s" * (seeds > 1)
                cells = []
                for budget in budgets:
                    at = [r for r in found if r["budget"] == budget]
                    of_text = f" ({_mean(at, 'perplexity'):.2f})" if perplexity else ""
                    cells.append(f"{_mean(at, 'kl'):.4f}{of_text}")
                lines.append(f"| {name} | {unit} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def prediction() -> str:
    """Return how well losses predict KL, and how far losses of experts add up."""
    found = json.loads((RESULTS / "allocation.json").read_text())
    lines = [
        "| model | Spearman of predicted and measured KL, 50 random allocations, by seed | mean "
        "| measured / predicted, median | largest `lambda` of a layer | factor |",
        "|---" * 6 + "|",
    ]
    for model in dict.fromkeys(of["model"] for of in found["random_allocations"]):
        seeds = [of for of in found["random_allocations"] if of["model"] == model]
        rho = [of["spearman"] for of in sorted(seeds, key=lambda of: of["seed"])]
        ratio = statistics.median(
            measured / predicted
            for of in seeds
            for predicted, measured in zip(of["predicted"], of["measured"], strict=True)
        )
        layers = [layer for layer in found["interactions"] if layer["model"] == model]
        worst = max(layers, key=lambda layer: layer["eigenvalue"])
        lines.append(
            f"| {model} | {', '.join(f'{r:.3f}' for r in rho)} | {statistics.mean(rho):.3f} ± "
            f"{error(rho):.3f} | {ratio:.2f} | {worst['eigenvalue']:.3f} | {worst['factor']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def domains() -> str:
    """Return the mean KL and the worst domain's, relative to uniform bits, over seeds."""
    runs = json.loads((RESULTS / "allocation.json").read_text())["domains"]
    seeds = sorted({r["seed"] for r in runs})
    kl = {(r["seed"], r["budget"], r["method"]): r["kl"] for r in runs}
    lines = [
        f"| bits per weight | allocation | mean KL, {len(seeds)} seeds "
        "| worst domain, times uniform |",
        "|---" * 4 + "|",
    ]
    for budget, method in dict.fromkeys((r["budget"], r["method"]) for r in runs):
        found = [kl[seed, budget, method] for seed in seeds]
        uniform = [kl[seed, budget, "uniform"] for seed in seeds]
        mean = statistics.mean(statistics.mean(of.values()) for of in found)
        worst = statistics.mean(
            max(of[domain] / base[domain] for domain in base)
            for of, base in zip(found, uniform, strict=True)
        )
        lines.append(f"| {budget:g} | {method} | {mean:.4f} | {worst:.3f} |")
    return "\n".join(lines) + "\n"


def scaled() -> str:
    """Return what one layer was predicted to take and took: medians, and the ratio of each run."""
    runs = json.loads((RESULTS / "scaling.json").read_text())["runs"]
    lines = [
        "| machine | layer | tokens | | predicted | measured | predicted / measured, each run |",
        "|---" * 7 + "|",
    ]
    rows = {"passes, CPU s": "passes_s", "solve, CPU s": "solve_s", "both, CPU s": "cpu_s"}
    for machine, layer in dict.fromkeys((r["machine"], r["layer"]) for r in runs):
        found = [r for r in runs if (r["machine"], r["layer"]) == (machine, layer)]
        tokens = f"{found[0]['sequences']} x {found[0]['length']}"
        for name, key in {**rows, "peak above loading, MB": "bytes"}.items():
            unit = 1e6 if key == "bytes" else 1
            predicted, measured = (
                statistics.median(r[kind][key] / unit for r in found)
                for kind in ("predicted", "measured")
            )
            ratios = [f"{r['predicted'][key] / r['measured'][key]:.2f}" for r in found]
            lines.append(
                f"| {machine} | {layer} | {tokens} | {name} | {predicted:.0f} | {measured:.0f} "
                f"| {', '.join(ratios)} |"
            )
    return "\n".join(lines) + "\n"


def layer_memory() -> str:
    """Return the predicted memory of one layer of whole models, in gigabytes."""
    lines = [
        "| GB | weights | Hessians | token sample | activations | solver, CPU | peak, CPU "
        "| solver, GPU | peak, GPU |",
        "|---" * 9 + "|",
    ]
    for model in json.loads((RESULTS / "scaling.json").read_text())["models"]:
        cpu, gpu = model["cpu_memory"], model["gpu_memory"]
        parts = [cpu[key] for key in ("weights", "moments", "sample", "activations", "solver")]
        cells = [*parts, cpu["peak"], gpu["solver"], gpu["peak"]]
        lines.append(f"| {model['model']} | " + " | ".join(f"{c / 1e9:.1f}" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def layer_time() -> str:
    """Return the predicted time of one layer of whole models and of all layers."""
    lines = [
        "| model | on | forward, s | moments, s | factor, s | update, s | rounding, s "
        "| one layer | layers | all layers |",
        "|---" * 10 + "|",
    ]
    for model in json.loads((RESULTS / "scaling.json").read_text())["models"]:
        dense = f" + {model['dense_layers']} dense" if model["dense_layers"] else ""
        for device, unit, in_hours in (("one CPU core", " h", 3600), ("GPU, assumed", " s", 1)):
            key = "cpu" if "CPU" in device else "gpu"
            parts, whole = model[f"{key}_layer_s"], model[f"{key}_model_s"]
            form = ",.0f" if key == "cpu" else ".1f"
            total = f"{whole / 86400:.0f} days" if key == "cpu" else f"{whole / 60:.1f} min"
            cells = " | ".join(f"{part:{form}}" for part in parts.values())
            lines.append(
                f"| {model['model']} | {device} | {cells} | {sum(parts.values()) / in_hours:.1f}"
                f"{unit} | {model['layers']}{dense} | {total} |"
            )
    return "\n".join(lines) + "\n"


def awq_speed() -> str:
    """Return medians of CPU seconds, and llm-compressor's over ours, paired by seed."""
    runs = json.loads((RESULTS / "awq_speed.json").read_text())
    cpu = {(r["awq"], r["batch_size"], r["seed"]): r["cpu_s"] for r in runs}
    seeds = sorted({seed for *_, seed in cpu})
    lines = [
        "| sequences at a time | llm-compressor, CPU s | ours, CPU s | ratio |",
        "|---" * 4 + "|",
    ]
    for size in sorted({batch_size for _, batch_size, _ in cpu}):
        theirs, ours = (
            [cpu[name, size, seed] for seed in seeds] for name in ("llm-compressor", "ours")
        )
        ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
        medians = " | ".join(f"{statistics.median(of):.0f}" for of in (theirs, ours))
        lines.append(f"| {size} | {medians} | {ratio:.1f} |")
    return "\n".join(lines) + "\n"


def processes() -> str:
    """Return what several processes make of the README's example."""
    runs = json.loads((RESULTS / "several_processes.json").read_text())["runs"]
    lines = [
        "| processes | KL to 16 bit, held-out | packed words as of one process, layer by layer |",
        "|---" * 3 + "|",
    ]
    for run in runs:
        equal = ", ".join(f"{100 * share:.2f} %" for share in run["equal_words_by_layer"])
        kl = f"{run['kl']:.4f} ± {run['kl_stderr']:.4f}"
        lines.append(f"| {run['processes']} | {kl} | {equal} |")
    return "\n".join(lines) + "\n"


def solver() -> str:
    """Return how long the exact solution takes, reasons included."""
    found = json.loads((RESULTS / "allocation_speed.json").read_text())
    lines = [
        "| groups x options | median CPU s | worst CPU s | worst gap | HiGHS CPU s |",
        "|---" * 5 + "|",
    ]
    for size, of in found.items():
        ours = [entry for name, entry in of.items() if not name.startswith("HiGHS")]
        (highs,) = (entry for name, entry in of.items() if name.startswith("HiGHS"))
        median = max(entry["median_cpu_s"] for entry in ours)
        worst, gap = (max(entry[key] for entry in ours) for key in ("max_cpu_s", "worst_gap"))
        other = f"{highs['cpu_s']:.2f}" if highs.get("cpu_s") else "not in 60 s"
        lines.append(f"| {size} | {median:.3f} | {worst:.3f} | {gap:g} | {other} |")
    return "\n".join(lines) + "\n"


def _mean(runs: Sequence[dict], value: str) -> float:
    return statistics.mean(r[value] for r in runs)


if __name__ == "__main__":
    main()
