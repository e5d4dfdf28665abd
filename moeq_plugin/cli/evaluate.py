"""``moeq eval``: how far a quantized model is from the one that it was made of."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeq_plugin.cli.display import display
from moeq_plugin.cli.loading import TrustRemoteCode, load_tokenizer
from moeq_plugin.cli.named_model import check_named
from moeq_plugin.cli.shared import app, errors, say

if TYPE_CHECKING:
    from moeq_plugin.cli.measure import Models
    from moeq_plugin.records.quality import QualityRecord

_PACKAGES = ("moeq-plugin", "transformers", "torch")


@app.command(name="eval")
def evaluate(
    base: Annotated[str, typer.Argument(help="model before quantization, directory or id")],
    quant: Annotated[str, typer.Argument(help="quantized model, directory or id")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="text that neither was calibrated on; may be given several times"),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="of lm-eval, such as arc_easy,gsm8k")] = None,
    limit: Annotated[int | None, typer.Option(help="documents per task; default: all")] = None,
    task_files: Annotated[
        Path | None, typer.Option(help="directory with tasks of your own for lm-eval")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="tokens per sequence")] = 512,
    num_sequences: Annotated[int, typer.Option(help="per text, evenly spread over it")] = 64,
    batch_size: Annotated[int, typer.Option(help="sequences or documents at a time")] = 8,
    dtype: Annotated[
        str, typer.Option(help="float32 shows quantization alone; bfloat16 or auto saves memory")
    ] = "float32",
    reference: Annotated[
        Path | None,
        typer.Option(
            help="file of predictions of BASE, written if it is not there: the two models are then "
            "never in memory together; KL counts 512 tokens and the rest in 512 groups"
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="auto spreads a model over devices; or the one device, such as cuda:1"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--json", help="write the result, for `moeq report`")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare perplexity, predictions and routing on texts, and scores of tasks.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    names = [name for name in (tasks or "").split(",") if name]
    with errors("eval"):
        check_named(base)
        check_named(quant)
        _check_places(out, reference, [Path(base), Path(quant), *(text or ())])
        from moeq_plugin.cli.quality import check_request, summary

        check_request(
            text or (), names, seq_len, num_sequences, batch_size, dtype, reference, device_map
        )
        with display(phases=["reference", "evaluate"], jsonl=False):
            from moeq_plugin.cli.measure import Models

            models = Models(base, quant, dtype, trust_remote_code, device_map)
            scoring = {"limit": limit, "batch_size": batch_size, "include_path": task_files}
            record = _record(models, {"seq_len": seq_len, "num_sequences": num_sequences})
            _measure(record, models, text or [], names, scoring, reference)
        for line in summary(record):
            say(line)
        if out is not None:
            _write(record, out)


def _record(models: Models, settings: dict[str, Any]) -> QualityRecord:
    """Return the record of an evaluation that has measured nothing yet."""
    from moeq_plugin.records.quality import QualityRecord

    return QualityRecord(
        reference=models.base,
        quantized=models.quant,
        settings={**settings, "dtype": models.dtype},
        versions={package: version(package) for package in _PACKAGES},
    )


def _measure(
    record: QualityRecord,
    models: Models,
    texts: list[Path],
    tasks: list[str],
    scoring: dict[str, Any],
    reference: Path | None,
) -> None:
    """Load what is needed, and fill the record."""
    from moeq_plugin.cli.measure import measure_one_after_the_other, measure_side_by_side
    from moeq_plugin.cli.quality import read_windows
    from moeq_plugin.cli.tasks import check_tasks, score_tasks

    if tasks:
        check_tasks(tasks, include_path=scoring["include_path"])
    tokenizer = load_tokenizer(models.base, trust_remote_code=models.trust_remote_code)
    lengths = record.settings["seq_len"], record.settings["num_sequences"]
    windows = {path.stem: read_windows(tokenizer, path, *lengths) for path in texts}
    if reference is not None:
        measure_one_after_the_other(
            record, models, reference, tokenizer, windows, scoring["batch_size"]
        )
        record.settings |= {"likeliest_tokens": _top_k()}
        return
    base, model = models.load_base(), models.load_quantized()
    measure_side_by_side(record, model, base, tokenizer, windows, scoring["batch_size"])
    if tasks:
        record.settings |= {"limit": scoring["limit"]}
        record.versions |= {"lm-eval": version("lm-eval")}
        record.tasks = score_tasks(model, base, tokenizer, tasks, **scoring)


def _top_k() -> int:
    from moeq_plugin.models.stored_predictions import TOP_K

    return TOP_K


def _check_places(out: Path | None, reference: Path | None, reads: list[Path]) -> None:
    """Refuse to write over something else, before anything is computed."""
    from moeq_plugin.files.places import check_new_file, check_places
    from moeq_plugin.records.quality import QualityRecord

    check_places(
        reads={str(path): path for path in reads}, makes={"--json": out, "--reference": reference}
    )
    check_new_file("--json", out, QualityRecord.load)


def _write(record: QualityRecord, out: Path) -> None:
    from moeq_plugin.files.atomic import write_whole

    write_whole(out, record.save)
    say(f"{out}: written")
