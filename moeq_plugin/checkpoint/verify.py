"""Verify a checkpoint of any origin: names, shapes, schemes as readers resolve them, numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moeq_plugin.checkpoint.checks.config_changes import check_config_changes
from moeq_plugin.checkpoint.checks.config_values import check_config_values
from moeq_plugin.checkpoint.checks.file_changes import check_file_changes
from moeq_plugin.checkpoint.checks.findings import INCOMPLETE, Finding, Report
from moeq_plugin.checkpoint.checks.gptq_config import check_gptq_config
from moeq_plugin.checkpoint.checks.mixed_schemes import check_mixed_schemes
from moeq_plugin.checkpoint.checks.names import check_names
from moeq_plugin.checkpoint.checks.quantization_section import check_quantization_section
from moeq_plugin.checkpoint.checks.readers import check_transformers, check_vllm
from moeq_plugin.checkpoint.checks.scheme_lookup import check_lookups
from moeq_plugin.checkpoint.checks.structure import check_structure
from moeq_plugin.checkpoint.checks.tensor_parallel import check_parallel
from moeq_plugin.checkpoint.checks.tokenizer import check_tokenizer
from moeq_plugin.checkpoint.headers import files_stay_open
from moeq_plugin.checkpoint.layout import Layout, lay_out
from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint
from moeq_plugin.checkpoint.schemes import describe

TARGETS = ("vllm", "transformers", "gguf")
_MAY_BE_SO = ("zeroed", "duplicate-weight")  # in an expert that was never trained, say


def verify_checkpoint(
    path: str | Path, source: str | Path | None = None, *, target: str = "vllm", tp: int = 1
) -> Report:
    """Check a checkpoint of compressed-tensors, GPTQ format or 16 bit, whoever wrote it.

    Every tensor is read once; memory is bounded by the largest. No model is built.

    Args:
        path: directory with ``config.json`` and safetensors files.
        source: the 16-bit model that it was quantized from; compares every weight with it.
        target: what is to read it: ``vllm``, ``transformers`` or ``gguf``. What others would
            misread is a warning.
        tp: ranks of tensor parallelism that it is to be served on.

    Raises:
        ValueError: if there is no such checkpoint, or its config is not one.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if tp < 1:
        raise ValueError(f"tp must be at least 1, got {tp}")
    layout = lay_out(open_checkpoint(path))
    with files_stay_open():
        findings = list(_findings(layout, target, tp))
        if source is not None and not any(found.check in INCOMPLETE for found in findings):
            against = list(_against_source(layout, lay_out(open_checkpoint(source))))
            if not against:  # all of it was compared: what is odd, the source has as well
                findings = [found for found in findings if found.check not in _MAY_BE_SO]
            findings += against
    schemes = Counter(describe(layout.stored[linear.name]) for linear in layout.present())
    schemes += Counter(of.describe() for of in layout.checkpoint.codebooks.values())
    return Report(
        checkpoint=str(path),
        family=layout.architecture.family,
        target=target,
        tp=tp,
        num_tensors=len(layout.checkpoint.tensors),
        schemes=dict(schemes.most_common()),
        findings=tuple(dict.fromkeys(findings)),
    )


def _findings(layout: Layout, target: str, tp: int) -> Iterator[Finding]:
    from moeq_plugin.checkpoint.checks.values import check_values  # loads torch
    from moeq_plugin.checkpoint.checks.values.codebook_tensors import check_codebooks

    yield from layout.checkpoint.problems
    if any(found.check in INCOMPLETE for found in layout.checkpoint.problems):
        return  # whatever else is missing or mixed follows from that
    checkpoint = layout.checkpoint
    yield from check_config_values(checkpoint.config)
    of_section = list(check_quantization_section(layout))
    yield from of_section
    is_plain = not any(layout.stored.values())
    if is_plain and any(found.check == "not-compressed" for found in of_section):
        return  # every scale beside a plain weight would be told as one thing too many
    yield from check_gptq_config(checkpoint.directory, checkpoint.config)
    yield from check_names(layout)
    yield from check_structure(layout)
    yield from check_lookups(layout, target)
    yield from check_mixed_schemes(layout, target)
    yield from check_transformers(layout, target)
    yield from check_vllm(layout, target)
    yield from check_parallel(layout.architecture, layout.stored, tp)
    yield from check_tokenizer(layout)
    yield from check_values(layout)
    yield from check_codebooks(layout)


def _against_source(layout: Layout, source: Layout) -> Iterator[Finding]:
    from moeq_plugin.checkpoint.checks.source import check_source  # loads torch
    from moeq_plugin.checkpoint.checks.source.recipe import read_rewrites
    from moeq_plugin.checkpoint.checks.values.codebook_tensors import check_codebooks

    here, there = layout.checkpoint, source.checkpoint
    rewrites = read_rewrites(here.directory)
    changed = {"experts"} if rewrites.pruned_experts else set()
    if "lm_head" in layout.modules:
        changed.add("ties")
    yield from check_config_changes(here.config, there.config, changed)
    yield from check_file_changes(here.directory, there.directory)
    yield from check_source(layout, source)
    yield from check_codebooks(layout, source)
