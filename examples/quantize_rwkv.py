"""Quantize the shipped RWKV-7, load it packed and generate.

python examples/quantize_rwkv.py
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeq_plugin.integrations.hf  # noqa: F401 - reads codebooks
import moeq_plugin.rwkv  # noqa: F401 - makes transformers know RWKV-6 and RWKV-7
from moeq_plugin import RWKVQuantModifier

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "tiny_rwkv"
SEQUENCES, LENGTH = 16, 128


def main() -> None:
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (ASSETS / "calibration.txt").read_text().split("\x1e")[:SEQUENCES]
    ids = [tokenizer(document)["input_ids"][:LENGTH] for document in text]
    with TemporaryDirectory() as directory:
        out = Path(directory) / "checkpoint"
        oneshot(
            model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16),
            tokenizer=tokenizer,
            recipe=RWKVQuantModifier(scalar_frac=0.9),
            dataset=Dataset.from_dict({"input_ids": ids}),
            output_dir=str(out),
        )
        sizes = [
            path.stat().st_size for path in (out, MODEL) for path in path.glob("*.safetensors")
        ]
        print("{:.2f} MB, was {:.2f} MB".format(*(size / 1e6 for size in sizes)))
        model = AutoModelForCausalLM.from_pretrained(out)
        prompt = tokenizer("def test_", return_tensors="pt")["input_ids"]
        generated = model.generate(prompt, max_new_tokens=24, do_sample=False)
        print(tokenizer.decode(generated[0]))


if __name__ == "__main__":
    main()
