"""Quantize the shipped Mixture-of-Experts model, compare with stock GPTQ, check, reload, generate.

Two minutes on two CPU cores. Everything it needs is in this repository.
"""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from moeq_plugin import MoEQuantModifier, read_dataset
from moeq_plugin.integrations.llm_compressor.host import quiet
from moeq_plugin.models.evaluation import evaluate
from moeq_plugin.records.run import RunRecord

ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "tiny_moe"
OUT = Path("out") / "tiny_moe-W4A16"
SCHEME, LENGTH = "W4A16", 256
MOEQ = [sys.executable, "-c", "from moeq_plugin.cli import main; main()"]
RELOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))
prompt = tokenizer("def main(", return_tensors="pt")
text = tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0])
print(text)
"""


def data(name: str, num_sequences: int) -> torch.Tensor:
    """Return ``[num_sequences, LENGTH]`` token ids from the start of a shipped text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, model_max_length=10**9)
    read = read_dataset(
        ASSETS / f"{name}.txt", num_sequences, tokenizer=tokenizer, max_seq_length=LENGTH
    )
    return torch.tensor(read.dataset["input_ids"])


def load() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def megabytes(directory: Path) -> float:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors")) / 1e6


def main() -> None:
    torch.set_num_threads(1)  # the matrices are tiny: a second thread only waits
    disable_progress_bar()
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    for earlier in (OUT, OUT.with_name("tiny_moe-stock")):
        shutil.rmtree(earlier, ignore_errors=True)
    calibration = {"input_ids": data("calibration", 64).tolist()}
    heldout = data("heldout", 64).split(8)
    reference = load()
    base = evaluate(reference, reference, heldout)
    rows = [("16 bit", megabytes(MODEL), base.perplexity, 0.0)]
    recipes = {
        "stock GPTQ": GPTQModifier(scheme=SCHEME, ignore=["lm_head"], batched_quantization=16),
        "moeq_plugin": MoEQuantModifier(scheme=SCHEME),
    }
    for name, recipe in recipes.items():
        print(f"Quantizing to {SCHEME} with {name} ...", flush=True)
        model = load()
        with quiet():
            oneshot(
                model=model,
                recipe=recipe,
                dataset=Dataset.from_dict(calibration),
                max_seq_length=LENGTH,
            )
        model.to(torch.bfloat16)  # as it will be saved
        result = evaluate(model.float(), reference, heldout)
        directory = OUT if name == "moeq_plugin" else OUT.with_name("tiny_moe-stock")
        model.to(torch.bfloat16).save_pretrained(directory)
        rows.append((name, megabytes(directory), result.perplexity, result.kl))
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(OUT)

    print(f"\n{'':12}{'size MB':>9}{'perplexity':>12}{'KL to 16 bit':>14}")
    for name, size, perplexity, kl in rows:
        print(f"{name:12}{size:9.2f}{perplexity:12.3f}{kl:14.5f}")
    (record,) = RunRecord.load(OUT)
    print(f"\n{record.summary(len(record.linears))}")
    print("\nDoes every number stand where readers look for it?", flush=True)
    subprocess.run([*MOEQ, "verify", str(OUT), "--source", str(MODEL)], check=True)
    print(f"\nReloading {OUT} with plain transformers in a new process:", flush=True)
    reload = [sys.executable, "-c", RELOAD, str(OUT)]
    done = subprocess.run(reload, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    print(done.stdout.strip())
    print(f"\nNext: .venv/bin/moeq report {OUT}, then: vllm serve {OUT}")


if __name__ == "__main__":
    main()
