"""Commands as processes of their own, on a model that takes no time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from helpers import tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_tiny(directory: Path, **changes: int) -> Path:
    """Write ``model``, random, and ``data.jsonl``, which feeds its experts well; return where."""
    tiny_model("qwen3_moe", directory / "model", **changes)
    words = models.WordLevel({str(i): i for i in range(128)}, "0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory / "model")
    rows = tokens(16, 32).tolist()
    text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (directory / "data.jsonl").write_text(text)
    return directory


def command(*arguments: object) -> list[str]:
    """Return what starts ``moeq`` with these arguments."""
    return [sys.executable, "-c", "from moeq_plugin.cli import main; main()", *map(str, arguments)]


def listing(directory: Path) -> dict[str, tuple[int, bytes | None]]:
    """Return everything below a directory with what tells a change: kind, mode and content."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mode,
            path.read_bytes() if path.is_file() else None,
        )
        for path in directory.rglob("*")
    }
