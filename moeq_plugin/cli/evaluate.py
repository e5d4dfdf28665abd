"""``moeq eval``: how far a quantized model is from the one that it was made of."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeq_plugin.cli.loading import TrustRemoteCode, device, load_tokenizer
from moeq_plugin.cli.shared import app, errors, say

if TYPE_CHECKING:
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
    out: Annotated[
        Path | None, typer.Option("--json", help="write the result, for `moeq report`")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare perplexity, predictions and routing on texts, and scores of tasks.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    from moeq_plugin.cli.quality import (
        check_request,
        load_plain,
        load_quantized,
        measure_texts,
        read_windows,
        summary,
    )
    from moeq_plugin.cli.tasks import check_tasks, score_tasks
    from moeq_plugin.records.quality import QualityRecord

    with errors("eval"):
        _check_json(out, [Path(base), Path(quant), *(text or ())])
        names = [name for name in (tasks or "").split(",") if name]
        check_request(bool(text or names), seq_len, num_sequences, batch_size, dtype)
        if names:
            check_tasks(names, include_path=task_files)
        trust: Any = {"trust_remote_code": trust_remote_code}
        tokenizer = load_tokenizer(base, **trust)
        windows = {
            path.stem: read_windows(tokenizer, path, seq_len, num_sequences) for path in text or ()
        }
        reference = load_plain(base, dtype=dtype, **trust).to(device())
        model = load_quantized(quant, dtype, **trust).to(device())
        record = QualityRecord(
            reference=base,
            quantized=quant,
            settings={"seq_len": seq_len, "num_sequences": num_sequences, "dtype": dtype},
            versions={package: version(package) for package in _PACKAGES},
        )
        measure_texts(record, model, reference, tokenizer, windows, batch_size)
        if names:
            record.settings |= {"limit": limit}
            record.versions |= {"lm-eval": version("lm-eval")}
            record.tasks = score_tasks(
                model, reference, tokenizer, names,
                limit=limit, batch_size=batch_size, include_path=task_files,
            )  # fmt: skip
        for line in summary(record):
            say(line)
        if out is not None:
            _write(record, out)


def _check_json(out: Path | None, reads: list[Path]) -> None:
    """Refuse to write the result over something else, before anything is computed."""
    from moeq_plugin.files.places import check_new_file, check_places
    from moeq_plugin.records.quality import QualityRecord

    check_places(reads={str(path): path for path in reads}, makes={"--json": out})
    check_new_file("--json", out, QualityRecord.load)


def _write(record: QualityRecord, out: Path) -> None:
    from moeq_plugin.files.atomic import write_whole

    write_whole(out, record.save)
    say(f"{out}: written")
