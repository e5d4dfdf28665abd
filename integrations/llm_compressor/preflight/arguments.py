"""What ``oneshot`` was called with, looked at before the host does anything with it.

The host reads, tokenizes and batches the data before it asks a modifier, and what is wrong with
them comes out of the depths of a tokenizer or a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from moeq_plugin.integrations.llm_compressor.preflight.columns import EXPECTED, check_columns

_OURS = __name__.partition(".")[0]
_COUNTS = ("num_calibration_samples", "max_seq_length", "batch_size")


def check_arguments(oneshot: Oneshot) -> bool:
    """Refuse numbers and data that cannot be calibrated with, where a modifier of ours takes part.

    Args:
        oneshot: about to run. A recipe of a kind that the host does not read is replaced by what
            it says.

    Returns:
        Whether a modifier of ours takes part.

    Raises:
        ValueError: saying what to pass instead.
    """
    oneshot.recipe = _readable(oneshot.recipe)
    if not any(type(m).__module__.startswith(_OURS) for m in _modifiers(oneshot)):
        return False
    arguments = oneshot.dataset_args
    for name in _COUNTS:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected a number from 1 on")
    if arguments.dataset is not None:
        _check_kind(arguments.dataset)
    if isinstance(arguments.dataset, Dataset):
        check_columns(arguments.dataset, oneshot)
    return True


def _readable(recipe: Any) -> Any:
    """Return a recipe that the host reads: it knows neither paths nor mappings, nor lists of them.

    Raises:
        ValueError: for a file that is not there.
    """
    if isinstance(recipe, Path):
        if not recipe.is_file():
            raise ValueError(f"the recipe {recipe} is not a file")
        return str(recipe)
    if isinstance(recipe, Mapping):
        return json.dumps(recipe)
    if isinstance(recipe, list) and any(isinstance(r, str | Path | Mapping) for r in recipe):
        parts = [_readable(part) for part in recipe]
        return [m for part in parts for m in Recipe.create_instance(part).modifiers]
    return recipe


def _modifiers(oneshot: Oneshot) -> list[Modifier]:
    recipe = oneshot.recipe
    if isinstance(recipe, str):
        stage = oneshot.recipe_args.stage if oneshot.recipe_args is not None else None
        recipe = Recipe.create_instance(recipe, target_stage=stage)
    if isinstance(recipe, Recipe):
        return list(recipe.modifiers)
    return [m for m in tree_leaves(recipe) if isinstance(m, Modifier)]


def _check_kind(data: Any) -> None:
    if isinstance(data, IterableDataset | IterableDatasetDict):
        raise ValueError(
            "the calibration data are streamed, and every layer needs all of them again: take what "
            "is to be used, with Dataset.from_list(list(dataset.take(512)))"
        )
    if isinstance(data, DataLoader):
        if not isinstance(data.dataset, Sized) or not _has_length(data):
            raise ValueError(
                "the DataLoader has no length, and every layer needs all of its batches again: "
                "pass one over a data set with a length"
            )
        return
    if isinstance(data, list | tuple):
        has_texts = bool(data) and isinstance(data[0], str)
        way = 'from_dict({"text": rows})' if has_texts else "from_list(rows)"
        raise ValueError(f"the calibration data are a {type(data).__name__}: pass Dataset.{way}")
    if not isinstance(data, str | Dataset | DatasetDict):
        raise ValueError(f"the calibration data are a {type(data).__name__}, {EXPECTED}")


def _has_length(loader: DataLoader[Any]) -> bool:
    try:
        return len(loader) >= 0
    except TypeError:
        return False
