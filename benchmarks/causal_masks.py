"""What the causal mask is worth that llm-compressor 0.14 loses while it calibrates.

    python benchmarks/causal_masks.py [--seeds 3]

Both models choose their mask function by a variable (Qwen3-MoE), and the host's tracing then
passes none on. Runs of ours mend it; here one run in two leaves it as it is, everything else
equal. Writes ``benchmarks/results/causal_masks.json``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from compressed_tensors.utils import patch_attr
from corpora import corpora
from quality import HELDOUT, SEQUENCES, run

from moeq_plugin.integrations.llm_compressor import host

RESULT = Path(__file__).parent / "results" / "causal_masks.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    runs = []
    for corpus in corpora():
        for num_bits in (4, 3):
            for seed in range(seeds):
                for masked in (False, True):
                    with patch_attr(host, "_serves_us", lambda masked=masked: masked):
                        found = run(corpus, num_bits, seed, "MoEQuant", SEQUENCES, HELDOUT)
                    runs.append({**found, "causal_mask": masked})
                    print(runs[-1], flush=True)
                    RESULT.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
