"""Whether the columns of a data set are what a tokenizer or the model takes, in every row."""

from __future__ import annotations

import inspect

from datasets import Dataset
from llmcompressor.entrypoints.oneshot import Oneshot
from transformers import PreTrainedTokenizerBase

EXPECTED = (
    "expected a datasets.Dataset with `input_ids` or `text`, a DataLoader, or the name of a data "
    "set"
)


def check_columns(data: Dataset, oneshot: Oneshot) -> None:
    """Refuse columns that a tokenizer does not take, and rows that have nothing in them.

    Raises:
        ValueError: naming the columns or the row.
    """
    names, arguments = data.column_names, oneshot.dataset_args
    if len(data) and not names:
        raise ValueError(f"the calibration data have no columns, {EXPECTED}")
    if "input_ids" in names:
        _check_filled(data, "input_ids")
        kind = getattr(data.features["input_ids"], "feature", None)
        if not str(getattr(kind, "dtype", None)).startswith(("int", "uint", "null")):
            raise ValueError(
                f"`input_ids` of the calibration data is {data.features['input_ids']}, expected "
                "lists of integers"
            )
        return
    if arguments.preprocessing_func is not None:
        return  # which makes columns of its own
    tokenizer = oneshot.processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return  # of several kinds of data, and takes columns of its own
    taken = {*inspect.signature(tokenizer.__call__).parameters} & {"text", "text_target"}
    column = next((n for n in (arguments.text_column, *sorted(taken)) if n in names), None)
    if column is None:
        raise ValueError(
            f"the calibration data have the columns {', '.join(names)}, {EXPECTED}; or name the "
            "one with the text: text_column=..."
        )
    _check_filled(data, column)
    dtype = getattr(data.features[column], "dtype", None)
    if dtype not in {"string", "large_string"}:
        raise ValueError(f"`{column}` of the calibration data holds {dtype}, expected strings")


def _check_filled(data: Dataset, column: str) -> None:
    """Refuse rows without a value, as of a file in which not every line has the same keys.

    Raises:
        ValueError: naming the first of them.
    """
    if not data.data.column(column).null_count:
        return
    empty = [index for index, value in enumerate(data[column]) if value is None]
    if empty:
        raise ValueError(
            f"row {empty[0]} of the calibration data has no `{column}` ({len(empty)} of "
            f"{len(data)} rows have none). Leave such rows out."
        )
