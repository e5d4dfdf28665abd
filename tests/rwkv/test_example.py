"""The shipped RWKV-7 loads by itself and has learned more than how often a token occurs."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeq_plugin.rwkv  # noqa: F401  (registers the model type)

ASSETS = Path(__file__).parents[2] / "examples/assets"
FOLDER = ASSETS / "tiny_rwkv"


@torch.no_grad()
def test_the_shipped_model_predicts_text_that_it_was_not_trained_on():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    held_out = (ASSETS / "heldout.txt").read_text(encoding="utf-8")[:30_000]
    seen = (ASSETS / "calibration.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(held_out, verbose=False)["input_ids"])[: 8 * 256].view(8, 256)
    counts = torch.bincount(
        torch.tensor(tokenizer(seen, verbose=False)["input_ids"]), minlength=len(tokenizer)
    )

    loss = model(input_ids=ids, labels=ids).loss

    unigram = -((counts + 1.0) / (counts + 1.0).sum()).log()[ids[:, 1:]].mean()
    assert loss < unigram - 1, "at least a nat better than counting tokens"


def test_the_shipped_folder_is_small_and_fits_groups_of_64():
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]

    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000
    assert all(linear.in_features % 64 == 0 for linear in linears)
