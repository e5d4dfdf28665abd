"""Spend three bits per weight where they count: one run measures, budgets cost seconds.

python examples/bit_budget.py
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq_plugin import BitBudget, MoEQuantModifier, SensitivityTable, allocate_bits

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "tiny_moe"
OPTIONS = ["W2A16", "W3A16", "W4A16", "W8A16"]
SEQUENCES, LENGTH = 32, 256


def main() -> None:
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (ASSETS / "calibration.txt").read_text().split("\x1e")
    ids = [tokenizer(document)["input_ids"][:LENGTH] for document in text]
    data = Dataset.from_dict({"input_ids": [row for row in ids if len(row) == LENGTH][:SEQUENCES]})
    with TemporaryDirectory() as directory:
        out = Path(directory) / "checkpoint"
        oneshot(
            model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto"),
            tokenizer=tokenizer,
            recipe=MoEQuantModifier(bits_per_weight=3.0, options=OPTIONS),
            dataset=data,
            batch_size=8,
            output_dir=str(out),
        )
        allocation = json.loads((out / "moeq_allocation.json").read_text())
        for unit, reason in allocation["reasons"].items():
            print(f"{unit}\n    {reason}")
        table = SensitivityTable.load(out / "moeq_sensitivity.json")
        for target in ("vllm", "expert"):
            for bits in (2.5, 3.0, 3.5, 4.0):
                found = allocate_bits(table, BitBudget(bits_per_weight=bits), target=target)
                print(f"{target:6} {found.bits_per_weight:.3f} bits: {found.value:.4f} nats")


if __name__ == "__main__":
    main()
