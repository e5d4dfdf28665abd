"""Train the small Mixture-of-Experts model that the examples quantize.

The text is what every CPython carries: the sources of its standard library, the language
reference behind ``help()`` and the docstrings of the modules compiled into the interpreter. The
model is a Qwen3-MoE of 3.6 million parameters: 4 layers of 16 experts, 2 of them per token. A
low load-balancing loss leaves its experts unevenly used, as those of large models are.

    python examples/train_tiny_moe.py [--output FOLDER] [--steps N]

writes ``tiny_moe/`` (a Hugging Face folder, 7.4 MB), ``heldout.txt`` and ``calibration.txt``,
whose documents are separated by the byte 0x1e. It takes about half an hour on one CPU core. The
shipped files were made by CPython 3.11.7, whose standard library is the data; another version
gives another model of the same kind.
"""

import argparse
import copy
import hashlib
import importlib
import inspect
import math
import sys
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, one_hot
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SEED, THREADS = 0, 1  # one thread adds floats in one order
VOCABULARY, END = 2048, "<|endoftext|>"
STEPS, WARMUP, BATCH_TOKENS, LEARNING_RATE = 3600, 100, 2048, 3e-3
SEQUENCE, LONG_SEQUENCE, LONG_FROM = 256, 512, 0.8  # the last fifth sees longer context
BALANCE = 0.008  # low: enough to keep every expert alive, too little to make them equal
SAVE_EVERY = 600  # an interrupted run leaves a usable model
HELD_OUT_PERCENT, EXCERPT, HELD_OUT_SIZE, CALIBRATION_SIZE = 4, 6_000, 148_000, 295_000
SKIPPED = ("site-packages", "encodings", "pydoc_data", "_sysconfigdata", "config-")


def digest(name):
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def compiled_docstrings(name):
    module = importlib.import_module(name)
    owners = [module, *(value for value in vars(module).values() if inspect.isclass(value))]
    members = [member for owner in owners for member in vars(owner).items()]
    texts = [f"{key}\n{value.__doc__}" for key, value in members if callable(value)]
    return "\n\n".join(dict.fromkeys(texts))


def documents():
    """All documents by name, in an order that does not depend on the file system."""
    found = {f"topics/{name}": text for name, text in topics.items()}
    found |= {f"compiled/{name}": compiled_docstrings(name) for name in sys.builtin_module_names}
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        # Only half of the test suite, or it would be most of the text.
        unwanted = name.startswith("test/") and digest(name) // 100 % 2
        if not unwanted and not any(part.startswith(SKIPPED) for part in name.split("/")):
            found[name] = path.read_text(encoding="utf-8", errors="replace")
    # A vocabulary of this size has no room for other scripts than English.
    english = {k: v for k, v in found.items() if sum(map(str.isascii, v)) >= 0.995 * len(v)}
    return dict(sorted(english.items(), key=lambda item: digest(item[0])))


def split(found):
    """Training and held-out documents; the hash of a document's name decides."""
    training = [text for k, text in found.items() if digest(k) % 100 >= HELD_OUT_PERCENT]
    held_out = [text for k, text in found.items() if digest(k) % 100 < HELD_OUT_PERCENT]
    known = {line.strip() for text in training for line in text.splitlines()}

    def leaks(text):  # some topics quote others, some tests share their body
        lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 30]
        return sum(line in known for line in lines) > 0.2 * len(lines)

    return training, [text for text in held_out if not leaks(text)]


def excerpts(texts, size):
    """The first lines of as many documents as fit into ``size`` bytes."""
    chosen = []
    for text in texts:
        piece = text if len(text) <= EXCERPT else text[: text.rindex("\n", 0, EXCERPT) + 1]
        if len(piece) > 500 and len("\x1e".join([*chosen, piece]).encode()) < size:
            chosen.append(piece)
    return chosen


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=1024
    )


def token_stream(tokenizer, texts):
    rows = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])


def new_model(end):
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, intermediate_size=256,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        moe_intermediate_size=128, num_experts=16, num_experts_per_tok=2, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], router_aux_loss_coef=BALANCE,
        tie_word_embeddings=True, eos_token_id=end, initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.generation_config.pad_token_id = end
    return model


def expert_loads(router_logits, chosen=2):
    """The share of one layer's chosen slots that each expert got."""
    picks = router_logits.topk(chosen, dim=-1).indices
    return one_hot(picks, router_logits.shape[-1]).float().mean(dim=(0, 1))


def balance_loss(layers):
    """Switch Transformer's loss, 1 where loads are equal; per layer, so that each one counts."""
    losses = [
        logits.shape[-1] * (expert_loads(logits) * logits.softmax(-1).mean(0)).sum()
        for logits in layers
    ]
    return sum(losses) / len(losses)


def schedule(step, steps):
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP))) / 2


def train(model, stream, steps, save):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: schedule(i, steps))
    started, mean = time.time(), None
    for step in range(1, steps + 1):
        length = LONG_SEQUENCE if step > LONG_FROM * steps else SEQUENCE
        starts = torch.randint(len(stream) - length, (BATCH_TOKENS // length, 1))
        tokens = stream[starts + torch.arange(length + 1)]
        output = model(input_ids=tokens[:, :-1], output_router_logits=True, use_cache=False)
        loss = cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss + BALANCE * balance_loss(output.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0 or step == steps:
            speed = step * BATCH_TOKENS / (time.time() - started)
            left = (steps - step) * BATCH_TOKENS / speed / 60
            print(f"step {step}/{steps} loss {mean:.3f} {speed:.0f} tokens/s {left:.1f} min left")
        if step % SAVE_EVERY == 0 or step == steps:
            save(model)


@torch.no_grad()
def evaluate(model, stream, training_stream):
    """Print the held-out perplexity, a unigram model's, and each expert's share of the slots."""
    windows = stream[: len(stream) // LONG_SEQUENCE * LONG_SEQUENCE].view(-1, LONG_SEQUENCE)
    loss, routers = 0.0, []
    for rows in windows.split(8):
        output = model(input_ids=rows, output_router_logits=True, use_cache=False)
        logits = output.logits[:, :-1].float().flatten(0, 1)
        loss += cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()
        routers.append(torch.stack(output.router_logits))
    counts = torch.bincount(training_stream, minlength=VOCABULARY) + 1.0
    unigram = cross_entropy(counts.log().expand(stream.numel(), -1), stream).exp()
    perplexity = math.exp(loss / (windows.numel() - len(windows)))
    print(f"held-out perplexity {perplexity:.2f}, of a unigram model {unigram:.1f}")
    print("experts' share of the held-out slots, in percent")
    for layer, logits in enumerate(torch.cat(routers, dim=1)):
        loads = 100 * expert_loads(logits)
        table = " ".join(f"{load:5.2f}" for load in loads.tolist())
        print(f"layer {layer}: {table}  max/min {loads.max() / loads.min():.1f}")


def save_model(model, tokenizer, folder):
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # transformers 4 and 5 both know the older name
    text = settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)

    training, held_out = split(documents())
    held_out = excerpts(held_out, HELD_OUT_SIZE)
    calibration = excerpts(training, CALIBRATION_SIZE)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, texts in (("heldout.txt", held_out), ("calibration.txt", calibration)):
        (options.output / name).write_text("\x1e".join(texts), encoding="utf-8", newline="\n")
    tokenizer = train_tokenizer(training)
    stream, held_out_stream = (token_stream(tokenizer, texts) for texts in (training, held_out))
    print(f"{len(training)} documents, {len(stream)} tokens; {len(held_out)} held out")

    folder = options.output / "tiny_moe"
    model = new_model(tokenizer.eos_token_id)
    train(model, stream, options.steps, lambda trained: save_model(trained, tokenizer, folder))
    saved = Qwen3MoeForCausalLM.from_pretrained(folder).eval()
    evaluate(saved, held_out_stream, stream)
    prompt = tokenizer("def main(", return_tensors="pt")
    print(tokenizer.decode(saved.generate(**prompt, max_new_tokens=60, do_sample=False)[0]))


if __name__ == "__main__":
    main()
