"""Write the README's tables from the committed results.

    python benchmarks/tables.py [--check]

With ``--check`` nothing is written and a difference is an error.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BASELINE = "GPTQ, all experts"


def main() -> None:
    readme = ROOT / "README.md"
    old = new = readme.read_text()
    for name, table in (("quality", quality()), ("speed", speed())):
        block = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        new = re.sub(block, lambda m, t=table: m[1] + t + m[2], new, flags=re.DOTALL)
    if "--check" in sys.argv:
        sys.exit("README's tables differ from benchmarks/results" if new != old else 0)
    readme.write_text(new)


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
            change = [100 * (a / b - 1) for a, b in zip(ours, base, strict=True)]
            error = statistics.stdev(change) / len(seeds) ** 0.5
            note = (
                "" if method == BASELINE else f" ({statistics.mean(change):+.1f} ± {error:.1f} %)"
            )
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


if __name__ == "__main__":
    main()
