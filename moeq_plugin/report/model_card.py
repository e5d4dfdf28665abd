"""The model card, ``README.md`` beside the weights: what was done and what a reader has to know."""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moeq_plugin.core.names import place
from moeq_plugin.records.quality import QualityRecord
from moeq_plugin.records.run import RunRecord
from moeq_plugin.report.card_metadata import base_model, metadata
from moeq_plugin.report.card_use import needs_import, use
from moeq_plugin.report.directory import Findings, read_directory
from moeq_plugin.report.section import number, percent, size, with_error
from moeq_plugin.report.section_experts import IN_WORDS, effective_tokens
from moeq_plugin.report.starved_rows import starved_rows
from moeq_plugin.untrusted.text import harmless, markdown

FILE_NAME = "README.md"
_MAX_ROWS = 40
_MAX_NAMES = 8  # that one reason keeps in 16 bit
_OF_THIS_MACHINE = ("work_dir", "sensitivity", "allocation")  # paths that nobody else has


def model_card(found: Findings) -> str:
    """Return Markdown, with the metadata that hubs read: all that the directory says of itself."""
    name = found.directory.resolve().name
    parts = (
        metadata(found),
        _overview(found, name),
        use(found, name),
        _evaluation(found, name),
        _schemes(found),
        _calibration(found),
        _recipe(found),
        _limits(found),
    )
    return "\n".join(_safe(line for part in parts for line in part)) + "\n"


def _safe(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines such that names in records are text: no HTML, no line of their own.

    What is fenced is shown as it is, and the metadata quotes its own values.
    """
    is_fenced = False
    for line in lines:
        if line.startswith("```") or line == "---":
            is_fenced = not is_fenced
            yield line
        else:
            yield harmless(line) if is_fenced else markdown(line)


def save_model_card(
    records: Sequence[RunRecord], directory: Path, *, published: Path | None = None
) -> None:
    """Write the card, unless there is one already.

    Args:
        records: what was done, one per modifier.
        directory: holds the other files of the checkpoint.
        published: where these files will go, if not there already; its card stays too.
    """
    if not any((of / FILE_NAME).exists() for of in (directory, published or directory)):
        found = read_directory(directory)
        found.records = list(records)
        (directory / FILE_NAME).write_text(model_card(found))


def _overview(found: Findings, name: str) -> Iterator[str]:
    config = found.config
    yield from ("", f"# {name}", "")
    made = " and ".join(f"`{record.modifier}`" for record in found.records)
    base = f" of `{base_model(found)}`" if found.model else ""
    yield f"A quantized copy{base}, made with {made or 'unknown means'} of moeq-plugin."
    yield from ("", "| | |", "|---|---|")
    if config.get("architectures"):
        yield f"| architecture | {', '.join(map(str, config['architectures']))} |"
    experts = next((config[k] for k in _EXPERTS if config.get(k)), None)
    if experts:
        shared = config.get("n_shared_experts") or int("shared_expert_intermediate_size" in config)
        also = f", {shared} shared" if shared else ""
        top_k = config.get("num_experts_per_tok")
        yield f"| experts per layer | {experts}, {top_k} per token{also} |"
    if found.bits_per_weight is not None:
        yield f"| true bits per quantized weight, scales included | {found.bits_per_weight:.3f} |"
    if found.stored is not None:
        before = size(2 * found.stored.num_weights)
        yield f"| size | {size(found.stored.num_bytes)}; {before} in 16 bit |"
        yield f"| parameters that are quantized | {percent(found.stored.quantized_share)} |"


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _schemes(found: Findings) -> Iterator[str]:
    if not found.linears:
        return
    yield from ("", "## Scheme", "", "| linears | scheme |", "|---|---|")
    counts = Counter(linear.scheme for linear in found.linears)
    yield from (f"| {count} | {scheme} |" for scheme, count in sorted(counts.items()))
    kept = {name: why for record in found.records for name, why in record.kept.items()}
    if kept:
        yield from ("", f"In 16 bit: {', '.join(_kept_in_words(kept))}.")
    if len(counts) > 1:
        yield from _bits_of_layers(found)


def _kept_in_words(kept: Mapping[str, str]) -> Iterator[str]:
    """Yield what stays in 16 bit, by name where few do for the same reason."""
    names: dict[str, list[str]] = {}
    for name, why in kept.items():
        names.setdefault(why, []).append(name)
    for why, of in names.items():
        if len(of) <= _MAX_NAMES:
            yield from (f"`{name}` ({why})" for name in of)
        else:
            yield f"{len(of)} x {why} (`{of[0]}` and so on)"


def _bits_of_layers(found: Findings) -> Iterator[str]:
    groups: dict[int, dict[bool, Counter[str]]] = {}
    for linear in found.linears:
        where = place(linear.name)
        if where.layer is not None:
            of_layer = groups.setdefault(where.layer, {True: Counter(), False: Counter()})
            of_layer[where.expert is not None][linear.scheme.split(" ")[0]] += 1
    yield from ("", "| layer | routed experts | other linears |", "|---|---|---|")
    for layer, of in sorted(groups.items()):
        cells = (
            ", ".join(f"{n} × {s}" for s, n in sorted(of[key].items())) for key in (True, False)
        )
        yield f"| {layer} | " + " | ".join(cells) + " |"


def _calibration(found: Findings) -> Iterator[str]:
    if not found.linears:
        return
    yield from ("", "## Calibration", "")
    for record in found.records:
        if record.sampling is not None:
            yield f"On text that the model wrote itself: {record.sampling.summary()}."
        elif record.calibration:
            yield f"On {record.calibration}."
        line = record.summary(len(record.linears))
        yield f"{line[0].upper()}{line[1:]}."
    everything = [t for of in effective_tokens(found.linears).values() for t in of.values()]
    if everything:
        low, middle = min(everything), statistics.median(everything)
        yield f"Effective tokens of an expert: at least {number(low)}, median {number(middle)}."
    weak = sorted(starved_rows(found.linears), key=lambda row: row.effective_tokens)
    if weak:
        yield from (
            "",
            "| linear without enough tokens of its own | Hessian of | effective tokens |",
            "|---|---|---|",
        )
        for x in weak[:_MAX_ROWS]:
            yield f"| {x.name} | {IN_WORDS[x.basis]} | {number(x.effective_tokens)} |"
        if len(weak) > _MAX_ROWS:
            yield f"| and {len(weak) - _MAX_ROWS} more rows: see `moeq_run.json` | | |"


def _evaluation(found: Findings, name: str) -> Iterator[str]:
    yield from ("", "## Evaluation", "")
    if found.quality is None:
        yield "No results here yet: this checkpoint was not evaluated when it was saved."
    else:
        yield from _results(found.quality)
    base = shlex.quote(base_model(found) or "BASE")  # people paste these lines into a shell
    tasks = ",".join(t.task for t in found.quality.tasks) if found.quality else ""
    yield from ("", "Measured, or to be measured, with:", "", "```")
    tasks = shlex.quote(tasks) if tasks else "arc_challenge,hellaswag,gsm8k"
    served = not needs_import(found)  # else lm-eval has to be called by us
    also = "" if served else f" --tasks {tasks}"
    yield f"moeq eval {base} {name} --text FILE{also} --json {name}/moeq_eval.json"
    if served:
        yield (
            f"lm_eval --model vllm --model_args pretrained={name},dtype=auto --tasks {tasks} "
            "--batch_size auto"
        )
    yield "```"


def _results(quality: QualityRecord) -> Iterator[str]:
    if quality.texts:
        yield from (
            "",
            "| text | perplexity before | after | KL mean | KL 99 % | same first token |",
        )
        yield "|---|---|---|---|---|---|"
        for name, text in quality.texts.items():
            cells = ("reference_perplexity", "perplexity", "kl", "kl_p99", "top1_agreement")
            values = (with_error(text[cell], text[f"{cell}_stderr"]) for cell in cells)
            yield f"| {name} | " + " | ".join(values) + " |"
    if quality.tasks:
        yield from ("", "| task | before | after | recovery |", "|---|---|---|---|")
        for task in quality.tasks:
            before = with_error(task.reference, task.reference_stderr)
            after = with_error(task.score, task.stderr)
            yield f"| {task.task} ({task.metric}) | {before} | {after} | {percent(task.recovery)} |"
    if quality.worst_task is not None:
        worst = quality.worst_task
        yield from ("", f"Worst task: {worst.task}, recovery {percent(worst.recovery)}.")


def _recipe(found: Findings) -> Iterator[str]:
    if not found.records:
        return
    yield from ("", "## Recipe", "")
    yield "`moeq quantize MODEL OUT --recipe recipe.yaml --dataset FILE` with this `recipe.yaml`:"
    yield from ("", "```yaml", "quant_stage:", "  quant_modifiers:")
    for record in found.records:
        yield f"    {record.modifier}:"
        yield from (f"      {key}: {json.dumps(value)}" for key, value in _given(record))
    yield from ("```", "", "Made with:", "")
    versions = {package: v for record in found.records for package, v in record.versions.items()}
    facts = {key: value for record in found.records for key, value in record.run.items()}
    yield from (f"- {key} {value}" for key, value in {**versions, **facts}.items())


def _given(record: RunRecord) -> Iterator[tuple[str, Any]]:
    for key, value in record.settings.items():
        says_something = key in record.given if record.given else value not in (None, [], {})
        if says_something and key not in _OF_THIS_MACHINE:
            yield key, value


def _limits(found: Findings) -> Iterator[str]:
    yield from ("", "## Not tested", "")
    yield "Quantizing does not serve a model: no server and no GPU has run this checkpoint yet."
    if found.quality is None or not found.quality.tasks:
        yield "No task was scored; perplexity and KL do not tell what a task loses."
    if found.records:
        yield from ("", "Every linear, its effective tokens and its loss: `moeq_run.json`.")
