"""What ``moeq eval`` measures: two models side by side, or one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moeq_plugin.cli.loading import device, load_weights, loading
from moeq_plugin.cli.reference_file import Reference, load_reference, save_reference
from moeq_plugin.models.evaluation import evaluate
from moeq_plugin.models.stored_predictions import compare_with, predict
from moeq_plugin.records.progress import Phase, Progress, report_progress
from moeq_plugin.records.quality import Continuation, QualityRecord
from moeq_plugin.untrusted.reading import read_json

_NUM_CONTINUATIONS, _PROMPT_TOKENS, _NEW_TOKENS = 3, 24, 40


@dataclass(frozen=True)
class Models:
    """The two models, loaded when they are asked for.

    Attributes:
        base: directory or id of the model before quantization.
        quant: of the quantized one.
        dtype: name of a dtype, or ``auto``.
        trust_remote_code: whether to run Python code that they bring along.
        device_map: how to spread them over devices; ``None`` for one device.
    """

    base: str
    quant: str
    dtype: str
    trust_remote_code: bool
    device_map: str | None = None

    def load_base(self) -> Any:
        """Load the model before quantization as transformers does."""
        return self._placed(self._plain(self.base))

    def load_quantized(self) -> Any:
        """Load the checkpoint, every expert exactly as stored.

        transformers reads one scheme for all experts and not every family, so compressed-tensors
        checkpoints on disk are read by our own loader.
        """
        config = Path(self.quant) / "config.json"
        section = (read_json(config) if config.exists() else {}).get("quantization_config")
        method = section.get("quant_method") if isinstance(section, dict) else None
        if method != "compressed-tensors":
            return self._placed(self._plain(self.quant))
        from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized

        with loading(self.quant):
            model: Any = load_dequantized(self.quant, trust_remote_code=self.trust_remote_code)
        return self._placed(model if self.dtype == "auto" else model.to(getattr(torch, self.dtype)))

    def _plain(self, model: str) -> Any:
        return load_weights(
            model, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        ).eval()

    def _placed(self, model: Any) -> Any:
        if self.device_map is None:
            return model.to(device())
        if self.device_map != "auto":
            return model.to(self.device_map)
        from accelerate import dispatch_model, infer_auto_device_map

        return dispatch_model(model, infer_auto_device_map(model))


def measure_side_by_side(
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
    watched = _Watched("evaluate", windows, batch_size)
    for name in windows:
        record.texts[name] = asdict(evaluate(model, reference, watched.batches(name)))
    _continue_both(record, model, continuations(reference, tokenizer, windows), tokenizer, windows)


def measure_one_after_the_other(
    record: QualityRecord,
    models: Models,
    path: Path,
    tokenizer: Any,
    windows: Mapping[str, torch.Tensor],
    batch_size: int,
) -> None:
    """Compare with predictions in a file, which are made first if it is not there.

    Args:
        record: what to fill.
        models: both; the first is only loaded for the file, and let go before the second.
        path: of the file.
        tokenizer: of both.
        windows: name of a text to ``[sequences, tokens]``.
        batch_size: sequences at a time.
    """
    if not path.exists():
        save_reference(
            path, _predicted(models, tokenizer, windows, batch_size), models.base, windows
        )
    stored = load_reference(path, windows)
    model = models.load_quantized()
    watched = _Watched("evaluate", windows, batch_size)
    for name in windows:
        found = compare_with(stored.predictions[name], model, watched.batches(name))
        record.texts[name] = asdict(found)
    _continue_both(record, model, stored.continuations, tokenizer, windows)


def _predicted(
    models: Models, tokenizer: Any, windows: Mapping[str, torch.Tensor], batch_size: int
) -> Reference:
    """Return what is kept of the model before quantization; it leaves memory with the return."""
    base = models.load_base()
    watched = _Watched("reference", windows, batch_size)
    predictions = {name: predict(base, watched.batches(name)) for name in windows}
    return Reference(predictions, continuations(base, tokenizer, windows))


class _Watched:
    """Batches of all texts that report how many sequences have gone by."""

    def __init__(self, phase: Phase, windows: Mapping[str, torch.Tensor], batch_size: int) -> None:
        self._phase, self._windows, self._batch_size = phase, windows, batch_size
        self._done, self._total = 0, sum(map(len, windows.values()))

    def batches(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the batches of one text."""
        for batch in self._windows[name].split(self._batch_size):
            report_progress(Progress(self._phase, self._done, self._total, "sequences"))
            yield batch
            self._done += len(batch)
        report_progress(Progress(self._phase, self._done, self._total, "sequences"))


def continuations(model: Any, tokenizer: Any, windows: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what a model writes after a few beginnings, the likeliest token each time."""
    return [_continue(model, tokenizer, prompt) for prompt in _prompts(windows)]


def _continue_both(
    record: QualityRecord,
    model: Any,
    theirs: Sequence[str],
    tokenizer: Any,
    windows: Mapping[str, torch.Tensor],
) -> None:
    ours = continuations(model, tokenizer, windows)
    for prompt, of_reference, of_model in zip(_prompts(windows), theirs, ours, strict=True):
        beginning = tokenizer.decode(prompt[0])
        record.continuations.append(Continuation(beginning, of_reference, of_model))


def _prompts(windows: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return beginnings from each text in turn, so that few show many kinds of text."""
    rows = [row for of_texts in zip(*windows.values(), strict=False) for row in of_texts]
    return [row[:_PROMPT_TOKENS][None] for row in rows[:_NUM_CONTINUATIONS]]


def _continue(model: Any, tokenizer: Any, prompt: torch.Tensor) -> str:
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
