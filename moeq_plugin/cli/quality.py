"""What ``moeq eval`` does with texts: read them, load models, compare, and say it in lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moeq_plugin.cli.loading import load_weights, loading
from moeq_plugin.models.evaluation import evaluate
from moeq_plugin.records.quality import Continuation, QualityRecord
from moeq_plugin.untrusted.reading import read_json

_DTYPES = ("float32", "bfloat16", "float16", "auto")
_NUM_CONTINUATIONS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 24, 40


def check_request(
    has_measure: bool, seq_len: int, num_sequences: int, batch_size: int, dtype: str
) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        ValueError: saying what was expected.
    """
    if not has_measure:
        raise ValueError("nothing to compare on: give --text FILE, --tasks NAMES or both")
    if seq_len < 2 or num_sequences < 1 or batch_size < 1:
        raise ValueError("--seq-len must be at least 2, the other numbers at least 1")
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")


def load_plain(model: str, dtype: str, *, trust_remote_code: bool) -> Any:
    """Load a model as transformers does.

    Args:
        model: directory or id.
        dtype: name of a dtype, or ``auto``.
        trust_remote_code: run Python code that the model brings along, if it needs any.
    """
    return load_weights(model, dtype=dtype, trust_remote_code=trust_remote_code).eval()


def load_quantized(quant: str, dtype: str, *, trust_remote_code: bool) -> Any:
    """Load a checkpoint, every expert exactly as stored.

    transformers reads one scheme for all experts and not every family, so compressed-tensors
    checkpoints on disk are read by our own loader.

    Args:
        quant: directory or id.
        dtype: name of a dtype, or ``auto``.
        trust_remote_code: run Python code that the model brings along, if it needs any.
    """
    config = Path(quant) / "config.json"
    section = (read_json(config) if config.exists() else {}).get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    if method != "compressed-tensors":
        return load_plain(quant, dtype, trust_remote_code=trust_remote_code)
    from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized

    with loading(quant):
        model = load_dequantized(quant, trust_remote_code=trust_remote_code)
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def read_windows(tokenizer: Any, path: Path, seq_len: int, num_sequences: int) -> torch.Tensor:
    """Return ``[sequences, seq_len]`` token ids, evenly spread over a text.

    Args:
        tokenizer: if it puts a token before a text, every sequence starts with it.
        path: of the text, UTF-8.
        seq_len: tokens per sequence.
        num_sequences: at most; fewer if the text is short.

    Raises:
        ValueError: if the file is no text or too short for one sequence.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a text")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text: {error}") from None
    ids = tokenizer(text, verbose=False)["input_ids"]
    first = [] if not ids or ids[0] != tokenizer.bos_token_id else ids[:1]
    body = seq_len - len(first)
    available = (len(ids) - len(first)) // body
    if not available:
        raise ValueError(
            f"{path} has {len(ids)} tokens, fewer than one sequence of {seq_len}; give a longer "
            "text or a smaller --seq-len"
        )
    count = min(available, num_sequences)
    starts = [len(first) + number * available // count * body for number in range(count)]
    return torch.tensor([first + ids[start : start + body] for start in starts])


def measure_texts(
    record: QualityRecord,
    model: Any,
    reference: Any,
    tokenizer: Any,
    windows: Mapping[str, torch.Tensor],
    batch_size: int,
) -> None:
    """Compare two models on every text and let both go on from a few beginnings, into ``record``.

    Args:
        record: what to fill.
        model: the quantized model.
        reference: the model before.
        tokenizer: of both.
        windows: name of a text to ``[sequences, tokens]``.
        batch_size: sequences at a time.
    """
    for name, ids in windows.items():
        record.texts[name] = asdict(evaluate(model, reference, ids.split(batch_size)))
    # from each text in turn, so that few beginnings show many kinds of text
    rows = [row for of_texts in zip(*windows.values(), strict=False) for row in of_texts]
    for row in rows[:_NUM_CONTINUATIONS]:
        prompt = row[:_PROMPT_TOKENS][None]
        theirs, ours = (_continue(of, tokenizer, prompt) for of in (reference, model))
        record.continuations.append(Continuation(tokenizer.decode(prompt[0]), theirs, ours))


def summary(record: QualityRecord) -> Iterator[str]:
    """Yield what was measured, a line per number that matters."""
    for name, found in record.texts.items():
        yield f"{name}: {found['num_sequences']} sequences, {found['num_tokens']} tokens predicted"
        yield (
            f"  perplexity {found['reference_perplexity']:.4f} -> {found['perplexity']:.4f}, "
            f"nll {found['nll_change']:+.5f} ± {found['nll_change_stderr']:.5f}"
        )
        yield (
            f"  KL mean {found['kl']:.5f} ± {found['kl_stderr']:.5f}, "
            f"median {found['kl_median']:.5f} ± {found['kl_median_stderr']:.5f}, "
            f"99 % {found['kl_p99']:.4f} ± {found['kl_p99_stderr']:.4f}, max {found['kl_max']:.3f}"
        )
        agreement, error = found["top1_agreement"], found["top1_agreement_stderr"]
        yield f"  same first token {100 * agreement:.2f} ± {100 * error:.2f} %"
        if found["routing"] is not None:
            yield from _routing(found["routing"])
    for task in record.tasks:
        recovery = "" if task.recovery is None else f", {100 * task.recovery:.1f} % of it left"
        errors = [
            f" ± {e:.4f}" if e is not None else "" for e in (task.reference_stderr, task.stderr)
        ]
        yield (
            f"{task.task} ({task.metric}): {task.reference:.4f}{errors[0]} -> "
            f"{task.score:.4f}{errors[1]}{recovery}"
        )


def _routing(routing: Mapping[str, Any]) -> Iterator[str]:
    worst = min(routing["layers"], key=lambda layer: layer["jaccard"])
    router = ""
    if routing["router_kl"] is not None:
        router = f", router KL {routing['router_kl']:.5f} ± {routing['router_kl_stderr']:.5f}"
    yield (
        f"  same experts (Jaccard) {routing['jaccard']:.4f} ± {routing['jaccard_stderr']:.4f}"
        f"{router}; least in {worst['name']}: {worst['jaccard']:.4f}"
    )


def _continue(model: Any, tokenizer: Any, prompt: torch.Tensor) -> str:
    """Return what the model writes next, the likeliest token each time."""
    with torch.no_grad():
        written = model.generate(
            prompt.to(model.device),
            attention_mask=torch.ones_like(prompt).to(model.device),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
    text: str = tokenizer.decode(written[0, prompt.shape[1] :])
    return text
