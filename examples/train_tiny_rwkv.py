"""Train the small RWKV-7 that the examples quantize.

The text, its split and the tokenizer are those of the small Mixture-of-Experts model. The model
has 1.6 million parameters: 4 layers of 128 channels, 2 heads of 64, low-rank factors of rank 64,
so that weights quantize in groups of 64.

    python examples/train_tiny_rwkv.py [--output FOLDER] [--steps N]

writes ``tiny_rwkv/`` (a Hugging Face folder, 3.3 MB). It takes a quarter of an hour on one busy
CPU core, and is better for more steps; an interrupted run continues from its last checkpoint. The
shipped files were made by CPython 3.11.7, whose standard library is the data.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from train_tiny_moe import SEED, THREADS, documents, save_model, schedule, split, token_stream
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq_plugin.rwkv import RWKV7Config, RWKV7ForCausalLM

ASSETS = Path(__file__).parent / "assets"
STEPS, BATCH, SEQUENCE, LEARNING_RATE = 260, 4, 256, 4e-3
CHECKPOINT_EVERY = 50


def new_model(vocabulary, end):
    model = RWKV7ForCausalLM(
        RWKV7Config(
            vocab_size=vocabulary, hidden_size=128, num_hidden_layers=4, head_dim=64,
            decay_low_rank_dim=64, a_low_rank_dim=64, v_low_rank_dim=64, gate_low_rank_dim=64,
            bos_token_id=end, eos_token_id=end, pad_token_id=end, initializer_range=0.05,
        )
    )  # fmt: skip
    for block in model.model.blocks:  # at first a layer adds nothing
        nn.init.zeros_(block.att.output.weight)
        nn.init.zeros_(block.ffn.value.weight)
    return model


def new_optimizer(model):
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    others = {id(p): p for p in model.parameters()}
    for matrix in matrices:
        others.pop(id(matrix))
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def batch(stream, step):
    """The tokens of a step, which depend on nothing but its number."""
    generator = torch.Generator().manual_seed(SEED + step)
    starts = torch.randint(len(stream) - SEQUENCE, (BATCH, 1), generator=generator)
    return stream[starts + torch.arange(SEQUENCE + 1)]


def train(model, stream, steps, checkpoint):
    optimizer, first = new_optimizer(model), 1
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"] + 1
    started, mean = time.time(), None
    for step in range(first, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step - 1, steps)
        tokens = batch(stream, step)
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 20 == 0 or step == steps:
            seconds = (time.time() - started) / (step - first + 1)
            left = (steps - step) * seconds / 60
            print(f"step {step}/{steps} loss {mean:.3f} {seconds:.2f} s/step {left:.1f} min left")
        if step % CHECKPOINT_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)


@torch.no_grad()
def evaluate(model, stream, training_stream):
    """Print the held-out loss per token, and that of a model that only counts tokens."""
    windows = stream[: len(stream) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    losses = [model(input_ids=rows, labels=rows).loss * len(rows) for rows in windows.split(8)]
    loss = sum(losses).item() / len(windows)
    counts = torch.bincount(training_stream, minlength=model.config.vocab_size) + 1.0
    unigram = cross_entropy(counts.log().expand(stream.numel(), -1), stream).item()
    print(f"held-out loss {loss:.3f} (perplexity {math.exp(loss):.1f})")
    print(f"of a unigram model {unigram:.3f} (perplexity {math.exp(unigram):.1f})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_moe")
    stream = token_stream(tokenizer, split(documents())[0])
    held_out = (ASSETS / "heldout.txt").read_text(encoding="utf-8").split("\x1e")
    print(f"{len(stream)} tokens")

    model = new_model(len(tokenizer), tokenizer.eos_token_id)
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output / "tiny_rwkv.training"
    train(model, stream, options.steps, checkpoint)
    save_model(model, tokenizer, options.output / "tiny_rwkv")
    checkpoint.unlink(missing_ok=True)
    saved = AutoModelForCausalLM.from_pretrained(options.output / "tiny_rwkv").eval()
    evaluate(saved, token_stream(tokenizer, held_out), stream)
    prompt = tokenizer("def main(", return_tensors="pt")
    print(tokenizer.decode(saved.generate(**prompt, max_new_tokens=60, do_sample=False)[0]))


if __name__ == "__main__":
    main()
