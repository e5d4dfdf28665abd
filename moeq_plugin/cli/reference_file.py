"""Predictions of a model in a file: written once, read for every checkpoint made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from moeq_plugin.models.stored_predictions import Predictions
from moeq_plugin.untrusted.broken import BROKEN, sentence

_VERSION = "1"


@dataclass(frozen=True)
class Reference:
    """What is kept of a model.

    Attributes:
        predictions: by the name of the text.
        continuations: what the model wrote after the same words as in the evaluation.
    """

    predictions: Mapping[str, Predictions]
    continuations: list[str]


def save_reference(
    path: Path, reference: Reference, base: str, windows: Mapping[str, torch.Tensor]
) -> None:
    """Write a file that appears whole or not at all.

    Args:
        path: of the file.
        reference: what to keep.
        base: what the model was called.
        windows: the token ids that it predicted, by the name of the text.
    """
    from safetensors.torch import save_file

    from moeq_plugin.files.atomic import write_whole

    tensors = {
        f"{number}.{field.name}": getattr(found, field.name)
        for number, found in enumerate(reference.predictions.values())
        for field in fields(Predictions)
    }
    told = {
        "moeq_reference": _VERSION,
        "base": base,
        "texts": json.dumps({name: _digest(ids) for name, ids in windows.items()}),
        "continuations": json.dumps(reference.continuations),
    }
    write_whole(path, lambda partial: save_file(tensors, partial, metadata=told))


def load_reference(path: Path, windows: Mapping[str, torch.Tensor]) -> Reference:
    """Read what :func:`save_reference` wrote.

    Args:
        path: of the file.
        windows: the token ids that are to be compared on.

    Raises:
        ValueError: if the file is something else, or of other texts.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            if told.get("moeq_reference") != _VERSION:
                raise ValueError("it is no file of predictions of `moeq eval --reference`")
            texts, continuations = json.loads(told["texts"]), json.loads(told["continuations"])
            predictions = {
                name: Predictions(
                    *(file.get_tensor(f"{number}.{field.name}") for field in fields(Predictions))
                )
                for number, name in enumerate(texts)
            }
    except Exception as error:  # safetensors raises errors of its own
        if not isinstance(error, BROKEN) and "Safetensor" not in type(error).__name__:
            raise
        raise ValueError(f"{path} cannot be read: {sentence(error)}") from error
    asked = {name: _digest(ids) for name, ids in windows.items()}
    if texts != asked:
        raise ValueError(
            f"{path} holds predictions on {', '.join(texts)} with other tokens than asked for now; "
            "give the same --text, --seq-len and --num-sequences, or another file"
        )
    return Reference(predictions, continuations)


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.long().numpy().tobytes()).hexdigest()[:16]
