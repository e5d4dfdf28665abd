"""What ``moeq eval`` reads and says: texts in pieces, and what was measured in lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moeq_plugin.records.quality import QualityRecord

_DTYPES = ("float32", "bfloat16", "float16", "auto")


def check_request(
    texts: Sequence[Path],
    tasks: Sequence[str],
    seq_len: int,
    num_sequences: int,
    batch_size: int,
    dtype: str,
    reference: Path | None,
    device_map: str | None,
) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        ValueError: saying what was expected.
    """
    if not (texts or tasks):
        raise ValueError("nothing to compare on: give --text FILE, --tasks NAMES or both")
    if seq_len < 2 or num_sequences < 1 or batch_size < 1:
        raise ValueError("--seq-len must be at least 2, the other numbers at least 1")
    if reference is not None and (tasks or not texts):
        raise ValueError("--reference keeps predictions on texts: give --text, and no --tasks")
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if device_map not in (None, "auto"):
        try:
            torch.device(device_map)
        except RuntimeError:
            raise ValueError(
                f"--device-map: expected auto or a device such as cpu or cuda:1, got {device_map!r}"
            ) from None


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
        recovery = "" if task.recovery is None else f", {100 * task.recovery:.1f} % recovery"
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
