"""Open a checkpoint directory: its config, and every tensor that readers would find in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.codebooks import METHOD, Codebooks, split_section
from moeq_plugin.checkpoint.headers import StoredTensor, data_end, read_header
from moeq_plugin.checkpoint.weight_files import INDEX, SINGLE, index_of, unread_files, weight_files
from moeq_plugin.untrusted.broken import UnreadableFileError
from moeq_plugin.untrusted.reading import read_json


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's config and the headers of its files.

    Attributes:
        directory: where it is.
        config: the content of ``config.json``.
        tensors: by name.
        problems: what is wrong with the files themselves.
        codebooks: by module; ``config`` then has the section of the other weights only.
        codebook_version: of their format.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)
    codebooks: dict[str, Codebooks] = field(default_factory=dict)
    codebook_version: int | None = None


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Read config and headers; damaged files become findings, the others are read.

    Raises:
        UnreadableFileError: if there is no directory, no config or no safetensors file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UnreadableFileError(
            f"{directory} is not a directory; for a model on a hub download it first "
            "(hf download NAME --local-dir DIR)"
        )
    config = read_json(directory / "config.json")
    if "quantization_config" not in config and (directory / "quantize_config.json").exists():
        # where GPTQ tools wrote it before transformers had a place for it
        config["quantization_config"] = {
            "quant_method": "gptq",
            **read_json(directory / "quantize_config.json"),
        }
    codebooks, version = _take_codebooks(config)
    opened = Checkpoint(directory, config, codebooks=codebooks, codebook_version=version)
    if (directory / INDEX).exists():
        opened.problems.extend(_read_indexed(opened))
    else:
        paths = weight_files(directory)
        if not paths:
            raise UnreadableFileError(f"{directory} holds no safetensors file")
        for path in paths:
            opened.problems.extend(_read_shard(opened, path))
        opened.problems.extend(_unread(directory))
    return opened


def _take_codebooks(config: dict[str, Any]) -> tuple[dict[str, Codebooks], int | None]:
    """Put the section of scalar weights into the place of one of ours, and return its codebooks."""
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != METHOD:
        return {}, None
    codebooks, scalar = split_section(section)
    del config["quantization_config"]
    if scalar is not None:
        config["quantization_config"] = scalar
    return codebooks, section["format_version"]


def _unread(directory: Path) -> Iterator[Finding]:
    """Say which files one of the readers would read and another would not."""
    with_index = (directory / INDEX).exists()
    for path in unread_files(directory):
        if not with_index:
            what = f"not read beside {SINGLE}, except by vLLM, which reads both without an index"
        elif path.name == SINGLE:
            what = f"{INDEX} does not name it, and transformers reads it in place of what it names"
        else:
            what = f"{INDEX} does not name it: left over from something else"
        yield error("stale-file", path.name, what)


def _read_indexed(opened: Checkpoint) -> Iterator[Finding]:
    try:
        shards = index_of(opened.directory)
    except UnreadableFileError as cause:
        yield error("bad-index", INDEX, str(cause))
        for path in sorted(opened.directory.glob("*.safetensors")):
            yield from _read_shard(opened, path)
        return
    readable = set()
    for file, named in sorted(Counter(shards.values()).items()):
        if not (opened.directory / file).is_file():
            yield error("missing-shard", file, f"not there; the index puts {named} tensors into it")
            continue
        problems = list(_read_shard(opened, opened.directory / file))
        yield from problems
        if not any(found.check == "bad-header" for found in problems):
            readable.add(file)
    for name, file in shards.items():
        tensor = opened.tensors.get(name)
        if file in readable and (tensor is None or tensor.path.name != file):
            yield error("index-names-absent-tensor", name, f"not in {file}, where the index has it")
    yield from _unread(opened.directory)
    for name in opened.tensors.keys() - shards.keys():
        yield error("not-in-index", name, f"{opened.tensors[name].path.name} holds it")


def _read_shard(opened: Checkpoint, path: Path) -> Iterator[Finding]:
    try:
        tensors = read_header(path)
    except (UnreadableFileError, OSError) as cause:
        yield error("bad-header", path.name, str(cause))
        return
    size, expected = path.stat().st_size, data_end(tensors, path)
    if size != expected:
        lost = sum(not tensor.is_whole for tensor in tensors)
        yield error(
            "truncated-file",
            path.name,
            f"{size} bytes, its header describes {expected}; {lost} tensors are cut off",
        )
    for tensor in tensors:
        if tensor.name in opened.tensors:
            other = opened.tensors[tensor.name].path.name
            yield error("duplicate-tensor", tensor.name, f"in {other} and in {path.name}")
        opened.tensors[tensor.name] = tensor
