"""Are tokenizer and generation config those of the source?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.untrusted.broken import UnreadableFileError
from moeq_plugin.untrusted.reading import MAX_LIST_BYTES, read_json

_VOCABULARIES = ("tokenizer.model", "merges.txt", "vocab.txt", "vocab.json", "spiece.model")
_OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# set by whoever tokenized last, and what says nothing about the text's tokens
_OF_USE = {"truncation", "padding", "version"}
_TOKENS = ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "chat_template")
_DECISIVE = ("eos_token_id", "bos_token_id", "decoder_start_token_id")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample")
_MAX_BYTES = 1 << 28


def check_file_changes(directory: Path, source: Path) -> Iterator[Finding]:
    """Yield files beside the weights that decide about tokens and differ from the source's.

    Args:
        directory: of the checkpoint.
        source: of the 16-bit model.
    """
    # models are saved without a tokenizer on purpose, but not with half of one
    has_any = any((directory / name).is_file() for name in (*_VOCABULARIES, *_OF_TOKENIZERS))
    for name in _OF_TOKENIZERS if has_any else ():
        if (source / name).is_file() and not (directory / name).is_file():
            yield error("missing-file", name, "the source has it")
    for name in _PROCESSORS:
        if (source / name).is_file() and not (directory / name).is_file():
            yield warning("missing-file", name, "the source has it")
    for name in _VOCABULARIES:
        one, other = _bytes(directory / name), _bytes(source / name)
        if one is not None and other is not None and one != other:
            yield error("file-change", name, "not that of the source")
    pairs = {
        name: (_json(directory / name), _json(source / name))
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    }
    yield from _tokenizer(*pairs["tokenizer.json"])
    yield from _tokenizer_config(*pairs["tokenizer_config.json"], directory, source)
    yield from _generation(*pairs["generation_config.json"])


def _tokenizer(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Iterator[Finding]:
    if one is None or other is None:
        return
    for key in sorted({*one, *other} - _OF_USE):
        ours, theirs = one.get(key), other.get(key)
        if key == "model" and isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            for inner in ("type", "vocab", "merges", "unk_token", "byte_fallback"):
                if _pairs(ours.get(inner)) != _pairs(theirs.get(inner)):
                    yield error("file-change", f"tokenizer.json: model.{inner}", _NOT_THE_SOURCES)
        elif ours != theirs:
            yield error("file-change", f"tokenizer.json: {key}", _NOT_THE_SOURCES)


_NOT_THE_SOURCES = "not that of the source: texts would get other tokens"


def _pairs(value: Any) -> Any:
    """Return merges as pairs, however this version of the file writes them."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [list(merge.split(" ")) if isinstance(merge, str) else merge for merge in value]
    return value


def _tokenizer_config(
    one: Mapping[str, Any] | None, other: Mapping[str, Any] | None, directory: Path, source: Path
) -> Iterator[Finding]:
    if one is None or other is None:
        return
    for key in _TOKENS:
        ours, theirs = _token(one.get(key)), _token(other.get(key))
        if key == "chat_template":
            ours, theirs = (
                _bytes(path / "chat_template.jinja") or value
                for path, value in ((directory, ours), (source, theirs))
            )
            ours, theirs = (v.encode() if isinstance(v, str) else v for v in (ours, theirs))
        if theirs is not None and ours != theirs and (ours is not None or key == "chat_template"):
            what = "not that of the source" + (
                ""
                if key == "chat_template"
                else f": {ascii(ours)[:40]}, {ascii(theirs)[:40]} there"
            )
            yield error("file-change", f"tokenizer_config.json: {key}", what)


def _token(value: Any) -> Any:
    return value.get("content") if isinstance(value, Mapping) else value


def _generation(
    one: Mapping[str, Any] | None, other: Mapping[str, Any] | None
) -> Iterator[Finding]:
    if one is None or other is None:
        return
    for keys, severe in ((_DECISIVE, error), (_SAMPLING, warning)):
        for key in keys:
            ours, theirs = one.get(key), other.get(key)
            if theirs is not None and ours != theirs:
                what = f"{ascii(ours)[:40]}, in the source {ascii(theirs)[:40]}"
                yield severe("file-change", f"generation_config.json: {key}", what)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() and path.stat().st_size <= _MAX_BYTES else None


def _json(path: Path) -> dict[str, Any] | None:
    """Return a file's content, ``None`` if there is none; what is broken is said elsewhere."""
    try:
        return read_json(path, MAX_LIST_BYTES) if path.is_file() else None
    except UnreadableFileError:
        return None
