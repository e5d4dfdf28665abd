"""Does `moeq plan --probe` predict what `moeq quantize` then takes?

    python benchmarks/probe.py [--rounds N]

Writes ``benchmarks/results/probe.json`` after every round. CPU seconds and peak memory of both
commands, each a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from corpora import Corpus, corpora

RESULT = Path(__file__).parent / "results" / "probe.json"
SEQUENCES, LENGTH, SCHEME = 64, 256, "W4A16"
MOEQ = [sys.executable, "-c", "from moeq_plugin.cli import main; main()"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    for number in range(parser.parse_args().rounds):
        for corpus in corpora():
            found.append({"round": number, **measure(corpus, seed=number)})
            print(found[-1], flush=True)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")


def measure(corpus: Corpus, seed: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data.jsonl"
        rows = corpus.calibration_set(SEQUENCES, LENGTH, seed)["input_ids"]
        data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        request = [str(corpus.model), "--scheme", SCHEME, "--dataset", str(data)]
        request += ["--num-calibration-samples", str(SEQUENCES), "--max-seq-length", str(LENGTH)]
        said = subprocess.run(
            [*MOEQ, "plan", *request, "--probe"], capture_output=True, text=True, check=True
        ).stdout
        cpu, memory = re.search(r"takes (\d+) s of CPU time.* (\d+) MiB", said).groups()
        request.insert(1, f"{directory}/out")
        process = subprocess.Popen([*MOEQ, "quantize", *request], stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"quantizing {corpus.name} failed")
    actual_cpu, actual_memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    return {
        "model": corpus.name,
        "predicted_cpu_s": int(cpu),
        "cpu_s": actual_cpu,
        "predicted_mib": int(memory),
        "mib": actual_memory,
        "cpu_error": int(cpu) / actual_cpu - 1,
        "memory_error": int(memory) / actual_memory - 1,
    }


if __name__ == "__main__":
    main()
