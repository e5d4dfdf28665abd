"""``moeq imatrix``: an importance matrix for llama.cpp that no expert is missing from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeq_plugin.cli.loading import TrustRemoteCode, run_oneshot
from moeq_plugin.cli.shared import app, errors, say

_LISTED = 5


@app.command()
def imatrix(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    out: Annotated[Path, typer.Argument(help="importance matrix to write, a GGUF file")],
    dataset: Annotated[
        Path | None, typer.Option(help="JSON lines with `text` or `input_ids`; default: EBSS")
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="sequences")] = 512,
    max_seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 2048,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write an importance matrix for `llama-quantize --imatrix`, with data for every expert.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    from moeq_plugin.files.atomic import write_whole
    from moeq_plugin.files.datasets import read_dataset
    from moeq_plugin.files.places import check_new_file, check_places

    with errors("imatrix"):
        from moeq_plugin.integrations.llama_cpp.matrix_file import read_matrix, write_matrix
        from moeq_plugin.integrations.llama_cpp.modifier import ImportanceModifier
        from moeq_plugin.integrations.llama_cpp.tensor_names import gguf_package

        gguf_package()
        check_places(reads={"MODEL": Path(model), "--dataset": dataset}, makes={"OUT": out})
        check_new_file("OUT", out, read_matrix)
        text = "text that the model wrote" if dataset is None else dataset.name
        modifier = ImportanceModifier(dataset_name=text)
        run_oneshot(
            model,
            modifier,
            trust_remote_code=trust_remote_code,
            dataset="ebss" if dataset is None else read_dataset(dataset, num_calibration_samples),
            num_calibration_samples=128 if dataset is None else num_calibration_samples,
            max_seq_length=512 if dataset is None else max_seq_length,
            shuffle_calibration_samples=False,
        )
        matrix = modifier.matrix
        write_whole(out, lambda path: write_matrix(path, matrix))
    rows = sum(len(of.counts) for of in matrix.tensors.values())
    say(f"{out}: {len(matrix.tensors)} tensors, {rows} matrices, all with data")
    if rows == len(matrix.tensors):
        say("this model has no routed experts: llama.cpp's own program computes as much of it")
    if matrix.borrowed:
        some = ", ".join(matrix.borrowed[:_LISTED])
        more = ", ..." if len(matrix.borrowed) > _LISTED else ""
        say(f"{len(matrix.borrowed)} of them borrowed tokens of their layer: {some}{more}")
