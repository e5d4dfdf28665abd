"""Do the tokenizer's and the generation config's files fit the model?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.config import Config
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.untrusted.broken import UnreadableFileError
from moeq_plugin.untrusted.reading import MAX_LIST_BYTES, read_json

JSON_FILES = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "preprocessor_config.json", "vocab.json",
)  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# of the generation config: the numbers that transformers and vLLM take
_POSITIVE = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "num_beams")
_NOT_NEGATIVE = ("top_k", "min_p", "max_length")
_AT_MOST_1 = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def check_tokenizer(layout: Layout) -> Iterator[Finding]:
    """Yield files that are broken, and tokens that the model has no embedding for."""
    directory = layout.checkpoint.directory
    files: dict[str, dict[str, Any]] = {}
    for name in JSON_FILES:
        if (directory / name).is_file():
            try:
                files[name] = read_json(directory / name, MAX_LIST_BYTES)
            except UnreadableFileError as cause:
                yield error("bad-json", name, str(cause))
    size = num_embeddings(layout)
    if "tokenizer.json" in files:
        yield from _check_vocabulary(files["tokenizer.json"], size)
    if "generation_config.json" in files:
        known = Config(layout.checkpoint.config).content
        yield from _check_generation(files["generation_config.json"], size, known)
    yield from _check_template(directory)


def num_embeddings(layout: Layout) -> int | None:
    """Return how many tokens the model has embeddings for, ``None`` if that is not known."""
    for name, tensors in layout.modules.items():
        if name.endswith("embed_tokens") and "weight" in tensors and tensors["weight"].shape:
            return tensors["weight"].shape[0]
    stated = Config(layout.checkpoint.config).content.get("vocab_size")
    return stated if type(stated) is int else None


def _check_vocabulary(content: Mapping[str, Any], size: int | None) -> Iterator[Finding]:
    where, model = "tokenizer.json", content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocabulary, Mapping | list) or not vocabulary:
        yield error("tokenizer", where, "it has no vocabulary")
        return
    ids = list(vocabulary.values()) if isinstance(vocabulary, Mapping) else range(len(vocabulary))
    added = content.get("added_tokens") or []
    added = [t for t in added if isinstance(t, Mapping)] if isinstance(added, list) else []
    odd = [number for number in ids if type(number) is not int or number < 0]
    if odd:
        yield error("tokenizer", where, f"a token has the number {ascii(odd[0])[:40]}")
        return
    if len(set(ids)) < len(ids):
        yield error("tokenizer", where, f"{len(ids) - len(set(ids))} tokens share a number")
    numbers = [*ids, *(t["id"] for t in added if type(t.get("id")) is int)]
    if size is not None and max(numbers) >= size:
        beyond = len({number for number in numbers if number >= size})
        what = f"{beyond} tokens have numbers up to {max(numbers)}, the model {size} embeddings"
        yield error("tokenizer", where, what)


def _check_generation(
    content: Mapping[str, Any], size: int | None, model: Mapping[str, Any]
) -> Iterator[Finding]:
    where = "generation_config.json"
    for key in _TOKENS:
        ids = content.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and (type(token) is not int or token < -1):
                yield error("generation-config", f"{where}: {key}", f"{ascii(token)[:40]} is none")
            elif token is not None and size is not None and token >= size and ids != model.get(key):
                yield error("generation-config", f"{where}: {key}", f"{token} of {size} tokens")
    for key in {*_POSITIVE, *_NOT_NEGATIVE, *_AT_MOST_1}.intersection(content):
        value = content[key]
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (isinstance(value, float) and not math.isfinite(value)):
            wrong = True
        else:
            wrong = value < 0 and not (key == "top_k" and value == -1)
            wrong |= (key in _POSITIVE and value == 0 and key != "temperature") or (
                key in _AT_MOST_1 and value > 1
            )
        if wrong:
            what = f"{ascii(value)[:40]} cannot be"
            yield error("generation-config", f"{where}: {key}", what)


def _check_template(directory: Path) -> Iterator[Finding]:
    for name in ("chat_template.jinja", "merges.txt", "tokenizer.model"):
        path = directory / name
        if path.is_file() and not path.stat().st_size:
            yield error("tokenizer", name, "it is empty")
