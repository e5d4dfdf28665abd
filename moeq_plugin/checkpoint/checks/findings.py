"""What can be wrong with a checkpoint: every check by its id, and the report of one verification.

A finding says where, what, and the way out, which most often belongs to its check.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"  # the target fails on the checkpoint, or computes something else
    WARNING = "warning"  # the target copes; another reader, or a feature, does not


_REWRITE = "copy the file again, or save the model again"
_REQUANTIZE = "quantize this layer again; with moeq_plugin no expert loses its weights"
_PATTERN = (
    "write targets that match both spellings, such as "
    r"re:.*layers\.1\.(mlp|block_sparse_moe)\.experts.*, and ignore what is stored in 16 bit"
)
_ONE_SCHEME = "quantize again with one scheme for these linears (moeq quantize --target vllm)"
_LOAD_DEQUANTIZED = (
    "serve it with vLLM, or read it with "
    "moeq_plugin.integrations.llm_compressor.load_dequantized(directory)"
)

# id -> the way out
CHECKS = {
    "bad-header": _REWRITE,
    "truncated-file": _REWRITE,
    "missing-shard": "copy the missing file into the directory; the index names it",
    "bad-index": "write the index again: save the model again, or delete it if one file holds all",
    "index-names-absent-tensor": "save the model again: the index and the shards differ in origin",
    "not-in-index": "save the model again: readers may skip tensors that the index does not name",
    "duplicate-tensor": "delete the file that does not belong to this checkpoint",
    "stale-file": "delete the file: readers differ about which of the files they read",
    "two-names": "delete one of the two: save the model again",
    "foreign-name": "save the model again with save_pretrained, which names tensors as readers do",
    "config-value": "correct config.json: take it from the 16-bit model",
    "config-change": "take config.json from the source, with the quantization_config of this one",
    "section": "save the model again, which writes the section anew, or correct this entry",
    "not-compressed": "save the model compressed: save_pretrained with save_compressed=True",
    "missing-scale": "save the scales, or quantize again without what needs them",
    "two-configs": "delete the file that is wrong; readers differ about which of the two they read",
    "bad-json": _REWRITE,
    "tokenizer": "take the tokenizer's files from the 16-bit model",
    "generation-config": "take generation_config.json from the 16-bit model, or correct the entry",
    "missing-file": "copy it from the source; servers need it",
    "file-change": "copy it from the source",
    "missing-tensor": "save the model again; readers would leave random numbers in its place",
    "missing-expert": "save the model again; readers would leave random numbers in its place",
    "missing-router": "save the model again; without a router no expert is chosen",
    "missing-zero-point": "save the zero points, or declare the scheme symmetric if it is",
    "unexpected-tensor": "correct config.json (it is of another model?), or remove the tensor",
    "wrong-shape": "save the model again, or correct config.json: one of the two is of another",
    "transposed": "store weights as [out, in]: transpose the tensor and save again",
    "wrong-dtype": "save the tensor in the dtype that its format prescribes",
    "old-packing": "save again with compressed-tensors 0.18 or newer, which packs bits densely",
    "unknown-format": "nothing to do if another program checks it; only names were checked here",
    "scheme-mismatch": _PATTERN,
    "lm-head-not-ignored": "add lm_head to `ignore`, or quantize it",
    "router-quantized": "keep routers in 16 bit and list them in `ignore`",
    "router-not-ignored": "add the router to `ignore`; vLLM would look for its packed weights",
    "mtp-not-ignored": "quantize the next-token-prediction layer too, or add it to `ignore`",
    "mtp-dropped": "serve without speculative decoding, or copy these tensors from the source",
    "mixed-layer": _ONE_SCHEME,
    "mixed-fused-group": _ONE_SCHEME,
    "tp-indivisible": "serve with fewer ranks, or quantize again with a smaller group size",
    "transformers-misreads": _LOAD_DEQUANTIZED,
    "vllm-refuses": "quantize again with what vLLM serves, such as W4A16 in groups of 128",
    "vllm-kernel": "serve on a GPU with Humming kernels, or use 4 or 8 bits, symmetric",
    "gguf-mixed": "quantize again with one scheme per projection of a layer (--target gguf)",
    "non-finite": _REQUANTIZE,
    "zeroed": _REQUANTIZE,
    "constant": _REQUANTIZE,
    "saturated": _REQUANTIZE,
    "scale-not-positive": _REQUANTIZE,
    "scale-sign": "compare with the 16-bit model (--source): a scale may have lost its sign",
    "scale-outlier": "compare with the 16-bit model (--source); a scale is far from all others",
    "magnitude": _REQUANTIZE,
    "dead-rows": _REQUANTIZE,
    "zero-point": "write zero points as the format's version has them, and quantize again if codes "
    "are not around them",
    "router-rows": "copy the router from the 16-bit model; it is not quantized",
    "duplicate-weight": "compare with the 16-bit model (--source): one was written twice?",
    "duplicate-layer": "compare with the 16-bit model (--source): a layer was written twice?",
    "group-index": "write the group of each input column, 0 to groups - 1, or no g_idx at all",
    "duplicate-expert": "compare with the 16-bit model (--source): one was written twice?",
    "swapped-expert": "write every expert under its own number; the router's choice is by number",
    "far-from-source": "check that this is the source; quantize again if it is",
    "not-comparable": "give the model that this was quantized from; weights that a rotation or "
    "smoothing changed cannot be compared one by one",
    "not-compared": "compare what the two compute: moeq eval SOURCE CHECKPOINT --text FILE",
    "not-in-checkpoint": "save the model again with all its parts, or copy these tensors from the "
    "source",
    "generation": "look at the other findings, and at the 16-bit model on the same prompt",
}
# with one of these a file could not be read as it stands: exit code 2
UNREADABLE = {"bad-header", "truncated-file", "missing-shard", "bad-index"}
INCOMPLETE = {"bad-header", "missing-shard"}  # tensors are not known by name either


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        check: id of the check, a key of ``CHECKS``.
        severity: for the target of the verification.
        where: tensor, module, layer or file.
        what: what was expected and what is there.
        way_out: what to do about it.
    """

    check: str
    severity: Severity
    where: str
    what: str
    way_out: str


def error(check: str, where: str, what: str, way_out: str = "") -> Finding:
    """Return a finding that makes a checkpoint unsound; its check knows the way out."""
    return Finding(check, Severity.ERROR, where, what, way_out or CHECKS[check])


def warning(check: str, where: str, what: str, way_out: str = "") -> Finding:
    """Return a finding that the target copes with."""
    return replace(error(check, where, what, way_out), severity=Severity.WARNING)


def counted(count: int, noun: str) -> str:
    """Return a count in words.

    Example:
        >>> counted(1, "warning"), counted(0, "error")
        ('1 warning', '0 errors')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True)
class Report:
    """What a verification found.

    Attributes:
        checkpoint: its directory.
        family: the config's model type.
        target: what is to read it: vllm, transformers or gguf.
        tp: ranks of tensor parallelism.
        num_tensors: tensors in the files.
        schemes: how many linears are stored in each scheme.
        findings: in order of the checks.
    """

    checkpoint: str
    family: str
    target: str
    tp: int
    num_tensors: int
    schemes: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        """Return the findings that make the checkpoint unsound."""
        return [found for found in self.findings if found.severity is Severity.ERROR]

    @property
    def warnings(self) -> list[Finding]:
        """Return the findings that the target copes with."""
        return [found for found in self.findings if found.severity is Severity.WARNING]

    @property
    def exit_code(self) -> int:
        """Return 0 for a sound checkpoint, 1 for errors, 2 for files that cannot be read."""
        if any(found.check in UNREADABLE for found in self.findings):
            return 2
        return 1 if self.errors else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report in JSON types; ``schema_version`` rises when a field changes."""
        return {"schema_version": 1, **asdict(self), "exit_code": self.exit_code}

    def lines(self, per_check: int = 5) -> Iterator[str]:
        """Yield the report for a person, at most ``per_check`` findings of each check."""
        counts = Counter(found.check for found in self.findings)
        shown: Counter[str] = Counter()
        for found in self.findings:
            shown[found.check] += 1
            if shown[found.check] > per_check:
                continue
            yield f"{found.severity}: {found.where}: {found.what} [{found.check}]"
            if shown[found.check] == 1:
                yield f"    way out: {found.way_out}"
        for check, count in counts.items():
            if count > per_check:
                yield f"    and {count - per_check} more [{check}]"
        schemes = ", ".join(f"{n} x {scheme}" for scheme, n in self.schemes.items())
        warnings = len(self.findings) - len(self.errors)
        yield (
            f"{self.checkpoint}: {self.family}, {self.num_tensors} tensors, {schemes or 'none'}; "
            f"{counted(len(self.errors), 'error')}, {counted(warnings, 'warning')} for "
            f"{self.target}, tp {self.tp}"
        )
