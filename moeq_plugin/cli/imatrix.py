"""``moeq imatrix``: an importance matrix for llama.cpp that no expert is missing from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeq_plugin.cli.data import ChatTemplate, Data, Datasets, MaxSeqLength, NumSamples
from moeq_plugin.cli.loading import TrustRemoteCode, run_oneshot
from moeq_plugin.cli.named_model import check_named
from moeq_plugin.cli.shared import app, errors, say

_LISTED = 5


@app.command()
def imatrix(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    out: Annotated[Path, typer.Argument(help="importance matrix to write, a GGUF file")],
    dataset: Datasets = None,
    chat_template: ChatTemplate = True,
    num_calibration_samples: NumSamples = 512,
    max_seq_length: MaxSeqLength = 2048,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write an importance matrix for `llama-quantize --imatrix`, with data for every expert.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    data = Data(tuple(dataset or ()), num_calibration_samples, max_seq_length, chat_template)
    with errors("imatrix"):
        check_named(model)
        data.check()
        from moeq_plugin.files.atomic import write_whole
        from moeq_plugin.files.places import check_new_file, check_places
        from moeq_plugin.integrations.llama_cpp.matrix_file import read_matrix, write_matrix
        from moeq_plugin.integrations.llama_cpp.modifier import (
            ImportanceModifier,
            check_has_experts,
        )
        from moeq_plugin.integrations.llama_cpp.tensor_names import gguf_package

        gguf_package()
        reads = {"MODEL": Path(model), **data.reads()}
        check_places(reads=reads, makes={"OUT": out})
        check_new_file("OUT", out, read_matrix)
        text = ", ".join(path.name for path in data.reads().values()) or "text that the model wrote"
        modifier = ImportanceModifier(dataset_name=text)
        run_oneshot(
            model,
            modifier,
            data,
            check=check_has_experts,
            trust_remote_code=trust_remote_code,
            shuffle_calibration_samples=False,
            **data.or_written(),
        )
        matrix = modifier.matrix
        write_whole(out, lambda path: write_matrix(path, matrix))
    rows = sum(len(of.counts) for of in matrix.tensors.values())
    say(f"{out}: {len(matrix.tensors)} tensors, {rows} matrices, all with data")
    if matrix.borrowed:
        some = ", ".join(matrix.borrowed[:_LISTED])
        more = ", ..." if len(matrix.borrowed) > _LISTED else ""
        say(f"{len(matrix.borrowed)} of them borrowed tokens of their layer: {some}{more}")
