"""Train the third Mixture-of-Experts model that numbers are measured on.

    python benchmarks/train_reference_moe.py [--output FOLDER] [--steps N]

A DeepSeek-V3 of nine million parameters: a dense layer, then four of 16 experts of which a
sigmoid router with a correction bias picks four out of two of four groups, beside a shared
expert; latent attention. It differs from the two other models in everything but the tokenizer,
which is that of ``moe_small``. The text lies beside a development checkout. An interrupted run
goes on from its last save, to the same model: a step's windows depend on its number alone.
It takes about two hours on one core and writes 19 MB, too much for the repository.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from corpora import BUILT, MOE_SMALL, kinds_of_text
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

OUTPUT = BUILT / "reference_moe"
SHARES = {"wiki": 30, "code": 24, "math": 20, "stories": 12, "multi": 10, "docs": 4}
STEPS, WARMUP, ROWS, LENGTH, LEARNING_RATE = 3000, 100, 8, 256, 3e-3
SAVE_EVERY = 150
# Slow enough that experts stay unevenly used, fast enough that none dies.
BIAS_RATE = 2e-4


def new_model(vocabulary: int, end: int) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=512, num_hidden_layers=5,
        moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, n_group=4,
        topk_group=2, n_shared_experts=1, first_k_dense_replace=1, routed_scaling_factor=1.5,
        norm_topk_prob=True, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128,
        kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
        max_position_embeddings=1024, tie_word_embeddings=True, num_nextn_predict_layers=0,
        bos_token_id=end, eos_token_id=end, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(weight, std=0.02)
    return model


class Balance:
    """Counts what each router picks, and moves its bias toward the experts that get too little."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        self.routers = [layer.mlp.gate for layer in model.model.layers[1:]]
        self.counts = [torch.zeros(router.num_experts) for router in self.routers]
        for index, router in enumerate(self.routers):
            router.register_forward_hook(lambda _m, _i, output, at=index: self._count(at, output))

    def _count(self, index: int, output: tuple[torch.Tensor, ...]) -> None:
        self.counts[index] += torch.bincount(output[2].flatten(), minlength=16)

    def step(self) -> None:
        """Move each bias one step toward equal use, and count anew."""
        for router, count in zip(self.routers, self.counts, strict=True):
            router.e_score_correction_bias += BIAS_RATE * (count.mean() - count).sign()
            count.zero_()

    def table(self) -> str:
        """Return each expert's share in percent since the last step, a line per layer."""
        shares = [100 * count / count.sum() for count in self.counts]
        return "\n".join(" ".join(f"{x:5.1f}" for x in share.tolist()) for share in shares)


def streams(tokenizer: AutoTokenizer) -> dict[str, torch.Tensor]:
    """Return all training tokens of each kind of text."""
    found = {}
    for corpus in kinds_of_text(MOE_SMALL, list(SHARES)):
        rows = tokenizer(corpus.calibration, verbose=False)["input_ids"]
        ids = [token for row in rows for token in [*row, tokenizer.eos_token_id]]
        found[corpus.name] = torch.tensor(ids, dtype=torch.int16)
    return found


def batch(kinds: dict[str, torch.Tensor], step: int) -> torch.Tensor:
    rng = random.Random(step)
    rows = []
    for name in rng.choices(list(SHARES), list(SHARES.values()), k=ROWS):
        start = rng.randrange(len(kinds[name]) - LENGTH - 1)
        rows.append(kinds[name][start : start + LENGTH + 1])
    return torch.stack(rows).long()


def schedule(step: int, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))) / 2


def train(model: DeepseekV3ForCausalLM, kinds: dict[str, torch.Tensor], steps: int, state: Path):
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: schedule(i, steps))
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        scheduler.load_state_dict(kept["scheduler"])
        first = kept["step"]
    balance, started, mean = Balance(model), time.time(), None
    for step in range(first, steps):
        tokens = batch(kinds, step)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        done = step + 1
        if done % 50 == 0 or done == steps:
            speed = (done - first) / (time.time() - started)
            left = (steps - done) / speed / 60
            print(f"step {done}/{steps} loss {mean:.3f} {left:.0f} min left")
            if done % SAVE_EVERY == 0:
                print(balance.table())
        balance.step()
        if done % SAVE_EVERY == 0 or done == steps:
            kept = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "step": done,
            }  # fmt: skip
            torch.save(kept, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one thread adds floats in one order

    tokenizer = AutoTokenizer.from_pretrained(MOE_SMALL)
    model = new_model(len(tokenizer), tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
    options.output.mkdir(parents=True, exist_ok=True)
    state = options.output.with_suffix(".state")
    train(model, streams(tokenizer), options.steps, state)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(options.output)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MOE_SMALL / name, options.output)


if __name__ == "__main__":
    main()
