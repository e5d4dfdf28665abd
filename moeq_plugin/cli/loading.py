"""Models as commands load them: their files looked at before, their code run only if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeq_plugin.cli.rwkv import (
    is_official_rwkv,
    know_rwkv,
    load_official,
    reading_official,
    world_tokenizer,
)
from moeq_plugin.untrusted.reading import check_model

if TYPE_CHECKING:
    from moeq_plugin.cli.data import Data

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that the model brings along")
]


def device() -> str:
    """Return the accelerator's type, ``cpu`` if there is none."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def run_oneshot(
    model: str,
    recipe: Any,
    data: Data,
    *,
    trust_remote_code: bool,
    dtype: str = "auto",
    revision: str | None = None,
    check: Callable[[Any], None] = lambda _model: None,
    **arguments: Any,
) -> None:
    """Load a model, its tokenizer and the data, and quantize in place.

    Args:
        model: directory or id.
        recipe: of the host.
        data: to calibrate on.
        trust_remote_code: run Python code that the model brings along, if it needs any.
        dtype: name of a dtype, or ``auto`` for its own.
        revision: branch, tag or commit of an id; ``None`` for the newest.
        check: refuses the model before there are data, which it may have to write itself.
        **arguments: of ``oneshot``.
    """
    from llmcompressor.entrypoints.oneshot import oneshot

    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    with reading_official(model):
        loaded, tokenizer = load_model(model, dtype=dtype, **settings)
        check(loaded)
        arguments.setdefault("num_calibration_samples", data.num_sequences)
        arguments.setdefault("max_seq_length", data.seq_len)
        arguments.setdefault("dataset", data.read(tokenizer))
        oneshot(model=loaded, tokenizer=tokenizer, recipe=recipe, **arguments)


def load_model(
    model: str,
    *,
    trust_remote_code: bool,
    dtype: str = "auto",
    revision: str | None = None,
    config: Any = None,
) -> tuple[Any, Any]:
    """Return a model and its tokenizer, as :func:`load_weights` and :func:`load_tokenizer` do."""
    of: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    return load_weights(model, dtype=dtype, config=config, **of), load_tokenizer(model, **of)


def load_weights(
    model: str,
    *,
    trust_remote_code: bool,
    dtype: str = "auto",
    revision: str | None = None,
    config: Any = None,
) -> Any:
    """Return the whole of a model, towers of a multi-modal one included.

    Args:
        model: directory or id.
        trust_remote_code: run Python code that the model brings along, if it needs any.
        dtype: name of a dtype, or ``auto`` for its own.
        revision: branch, tag or commit of an id; ``None`` for the newest.
        config: another one than its own.

    Raises:
        ValueError: if it cannot be loaded, whatever the reason, or not as a whole.
    """
    from moeq_plugin.models.auto_class import language_class_of

    if is_official_rwkv(model):
        with loading(model):
            return load_official(model, dtype)
    with loading(model):
        know_rwkv(model)
    if config is None:
        config = load_config(model, trust_remote_code=trust_remote_code, revision=revision)
    auto = language_class_of(config)
    with loading(model):
        return auto.from_pretrained(
            model,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
        )


def load_config(model: str, *, trust_remote_code: bool, revision: str | None = None) -> Any:
    """Return the configuration of a model, directory or id.

    Raises:
        ValueError: if it cannot be loaded, whatever the reason.
    """
    from transformers import AutoConfig

    with loading(model):
        return AutoConfig.from_pretrained(
            model, trust_remote_code=trust_remote_code, revision=revision or "main"
        )


def load_tokenizer(model: str, *, trust_remote_code: bool, revision: str | None = None) -> Any:
    """Return the tokenizer of a model, directory or id.

    Raises:
        ValueError: if it cannot be loaded, whatever the reason, or is not there.
    """
    from transformers import AutoTokenizer

    if is_official_rwkv(model):
        return world_tokenizer(model)
    with loading(model):
        know_rwkv(model)
        found = AutoTokenizer.from_pretrained(
            model, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    if len(found) <= len(found.all_special_tokens):  # what transformers makes of no files at all
        raise ValueError(
            f"{model} has no tokenizer: copy tokenizer.json and what else belongs to it from where "
            "the model is from"
        )
    return found


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Look at a model's files before others load them, and say in a sentence why they cannot.

    transformers asks on the terminal whether to run a model's code, unless it is told that it is
    not to: the answer is a flag of the command, and never a key pressed.

    Args:
        model: directory or id.

    Raises:
        ValueError: if it cannot be loaded, whatever the reason.
    """
    try:
        check_model(model)
        know_rwkv(model)
        yield
    except Exception as error:  # configs and weights of strangers fail in every way there is
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"{model} needs Python code that it brings along (auto_map); read it, and run it "
                "with --trust-remote-code if you trust whoever wrote it"
            ) from error
        raise ValueError(f"cannot load {model}: {type(error).__name__}: {error}") from error
