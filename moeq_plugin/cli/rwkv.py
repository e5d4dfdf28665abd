"""What commands do for RWKV, which transformers does not know: official files and folders."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moeq_plugin.files.mapped import letting_go, unchanged
from moeq_plugin.records.progress import Phase, Progress, listening
from moeq_plugin.untrusted.reading import read_json

BUDGETS = {"bits_per_weight", "size_gb", "allocation"}


def is_official_rwkv(model: str) -> bool:
    """Tell whether a model is an official file."""
    return model.endswith(".pth")


def is_rwkv(model: str) -> bool:
    """Tell whether a model is an official file or a folder with an RWKV-6 or RWKV-7."""
    config = Path(model) / "config.json"
    if is_official_rwkv(model) or not config.is_file():
        return is_official_rwkv(model)
    return read_json(config).get("model_type") in ("rwkv6", "rwkv7")


def know_rwkv(model: str) -> None:
    """Make transformers know RWKV and its quantized checkpoints, if that is what the model is."""
    if is_rwkv(model):
        import moeq_plugin.integrations.hf  # noqa: F401


def modifiers_for_rwkv(**settings: Any) -> list[Any]:
    """Return the modifiers of a request: of a scheme, of a budget, or of nothing: codebooks then.

    Args:
        **settings: fields of the modifier.
    """
    from moeq_plugin import RWKVQuantModifier
    from moeq_plugin.core.codebook import CodebookFormat

    asked: dict[str, Any] = {"ignore": ["lm_head"], **settings}
    if "codebook" in settings:
        asked["codebook"] = CodebookFormat(*settings["codebook"])
    if settings.keys() & {"scheme", "config_groups"}:
        asked["scalar_frac"] = 1.0
    elif not settings.keys() & BUDGETS:
        asked["scalar_frac"] = 0.0
    return [RWKVQuantModifier(**asked)]


def measuring_rwkv(**settings: Any) -> Any:
    """Return what measures the losses of an RWKV as a budget would.

    Args:
        **settings: fields of the modifier that would be given the budget.
    """
    from moeq_plugin import RWKVQuantModifier

    return RWKVQuantModifier(**settings).sensitivity_modifier()


def load_official(path: str, dtype: str) -> Any:
    """Return the model of an official file.

    Args:
        path: of the file.
        dtype: name of a dtype, or ``auto`` for that of the file.

    Raises:
        ValueError: if it is not there, or holds no RWKV-6 or RWKV-7.
    """
    import torch

    from moeq_plugin.rwkv import load_pth

    if not Path(path).is_file():
        raise ValueError("there is no such file")
    know_rwkv(path)
    model = load_pth(path, dtype=None if dtype == "auto" else getattr(torch, dtype))
    model.name_or_path = path
    # the host reads the configuration again from where the model is said to come from
    folder = TemporaryDirectory(prefix="moeq-")
    weakref.finalize(model, folder.cleanup)
    model.config.save_pretrained(folder.name)
    model.config.name_or_path = folder.name
    return model


@contextmanager
def reading_official(path: str) -> Iterator[None]:
    """Keep little of an official file in memory while a run reads it, and let nobody change it.

    Where the model writes text and where gradients are taken all of it is read for every token or
    every batch: there it stays in memory.

    Args:
        path: of a model; nothing is done if it is no official file.

    Raises:
        ValueError: in the end, if the file has been written to.
    """
    if not is_official_rwkv(path) or not Path(path).is_file():
        yield
        return
    phase: Phase | None = None

    def hear(step: Progress) -> None:
        nonlocal phase
        phase = step.phase

    def is_read_in_turn() -> bool:
        return phase not in ("sample", "measure")

    with unchanged(Path(path)), listening(hear), letting_go(Path(path), is_read_in_turn):
        yield


def world_tokenizer(path: str) -> Any:
    """Return the tokenizer of an official file.

    Raises:
        ValueError: if the model has another vocabulary than the world models.
    """
    from moeq_plugin.rwkv.official import read_pth
    from moeq_plugin.rwkv.tokenizer import VOCABULARY_SIZE, RWKVWorldTokenizer

    found = read_pth(path)["emb.weight"].shape[0]
    if found != VOCABULARY_SIZE:
        raise ValueError(
            f"{path} has a vocabulary of {found}, not of {VOCABULARY_SIZE} as the world models: "
            "load it with moeq_plugin.rwkv.load_pth and save it beside its own tokenizer"
        )
    return RWKVWorldTokenizer()
