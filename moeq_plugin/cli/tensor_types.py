"""``moeq tensor-types``: which type of llama.cpp every tensor gets within a budget."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeq_plugin.cli.data import ChatTemplate, Data, Datasets, MaxSeqLength, NumSamples
from moeq_plugin.cli.loading import TrustRemoteCode, load_config, run_oneshot
from moeq_plugin.cli.named_model import check_named
from moeq_plugin.cli.shared import app, errors, say

if TYPE_CHECKING:
    from moeq_plugin.core.sensitivity import SensitivityTable

_LISTED = 5


@app.command()
def tensor_types(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    out: Annotated[Path, typer.Argument(help="file for `llama-quantize --tensor-type-file`")],
    bits_per_weight: Annotated[float, typer.Option(help="of all tensors that are allocated to")],
    sensitivity: Annotated[
        Path | None, typer.Option(help="table to allocate by; measured and kept if not there")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="type to choose from, such as Q3_K or IQ2_S")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            help="the model in 16 bit: names what stays so, and predicts the size of the file"
        ),
    ] = None,
    dataset: Datasets = None,
    chat_template: ChatTemplate = True,
    num_calibration_samples: NumSamples = 512,
    max_seq_length: MaxSeqLength = 2048,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Choose a type of llama.cpp for every tensor: the least loss within a budget.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    data = Data(tuple(dataset or ()), num_calibration_samples, max_seq_length, chat_template)
    with errors("tensor-types"):
        check_named(model)
        data.check()
        from moeq_plugin.core.allocation import BitBudget, allocate_bits
        from moeq_plugin.files.atomic import write_whole
        from moeq_plugin.files.places import check_new_file, check_places
        from moeq_plugin.integrations.llama_cpp.conversion import with_parts
        from moeq_plugin.integrations.llama_cpp.file_sizes import file_size, left_as_they_are
        from moeq_plugin.integrations.llama_cpp.tensor_names import gguf_package, tensor_names
        from moeq_plugin.integrations.llama_cpp.type_files import (
            chosen_types,
            read_types,
            with_embeddings,
            write_types,
        )

        gguf_package()
        reads = {"MODEL": Path(model), "--gguf": gguf, **data.reads()}
        check_places(reads=reads, makes={"OUT": out, "--sensitivity": sensitivity})
        check_new_file("OUT", out, read_types)
        config = load_config(model, trust_remote_code=trust_remote_code).get_text_config()
        table = _table(model, data, sensitivity, option, trust_remote_code)
        found = allocate_bits(table, BitBudget(bits_per_weight=bits_per_weight), target="gguf")
        names = tensor_names(found.choice, config.model_type)
        chosen = with_parts(chosen_types(found.choice, names), names)
        types = with_embeddings(chosen, config.hidden_size)
        kept = {} if gguf is None else left_as_they_are(gguf, types)
        types |= kept
        write_whole(out, lambda path: write_types(path, types))
        if gguf is None:
            size = f"tensors take {found.num_bytes + table.fixed_bytes} bytes"
        else:
            size = f"without a matrix the file will have {file_size(gguf, types, {})} bytes"
        loss = f"{found.bits_per_weight:.4f} bits per weight, predicted loss {found.value:.4g}"
        say(f"{out}: {loss}; {_in_words(types, kept)}")
        say(size)


def _in_words(types: dict[str, str], kept: dict[str, str]) -> str:
    counts = Counter(types.values())
    said = ", ".join(f"{n} {t}" for t, n in sorted(counts.items()))
    if not kept:
        return said
    some = ", ".join([*kept][:_LISTED]) + (", ..." if len(kept) > _LISTED else "")
    return f"{said}; {len(kept)} of them stay as they are, beyond the budget: {some}"


def _table(
    model: str,
    data: Data,
    place: Path | None,
    options: list[str] | None,
    trust_remote_code: bool,
) -> SensitivityTable:
    """Return the losses of all types: those kept in ``place``, or measured and kept there."""
    from moeq_plugin.core.sensitivity import SensitivityTable
    from moeq_plugin.files.atomic import write_whole
    from moeq_plugin.files.places import check_new_file

    if place is not None and place.exists():
        return SensitivityTable.load(place)
    check_new_file("--sensitivity", place, SensitivityTable.load)
    table = _measure(model, data, options, trust_remote_code)
    if place is not None:
        write_whole(place, table.save)
    return table


def _measure(
    model: str, data: Data, options: list[str] | None, trust_remote_code: bool
) -> SensitivityTable:
    from moeq_plugin.integrations.llama_cpp.ggml import check_library
    from moeq_plugin.integrations.llama_cpp.sensitivity import TypeSensitivityModifier
    from moeq_plugin.integrations.llama_cpp.tensor_types import parse_types

    modifier = TypeSensitivityModifier(options=options) if options else TypeSensitivityModifier()
    parse_types(modifier.options)  # before minutes go into loading the model
    check_library()
    run_oneshot(model, modifier, data, trust_remote_code=trust_remote_code, **data.or_written())
    return modifier.table
