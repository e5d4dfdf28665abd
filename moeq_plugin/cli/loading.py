"""Models as commands load them: their files looked at before, their code run only if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from moeq_plugin.untrusted.reading import check_model

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that the model brings along")
]


def device() -> str:
    """Return the accelerator's type, ``cpu`` if there is none."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def run_oneshot(model: str, recipe: Any, *, trust_remote_code: bool, **arguments: Any) -> None:
    """Load a model and its tokenizer and quantize it in place."""
    from llmcompressor.entrypoints.oneshot import oneshot

    loaded, tokenizer = load_model(model, trust_remote_code=trust_remote_code)
    oneshot(model=loaded, tokenizer=tokenizer, recipe=recipe, **arguments)


def load_model(
    model: str, *, trust_remote_code: bool, dtype: str = "auto", **settings: Any
) -> tuple[Any, Any]:
    """Return a model and its tokenizer, as :func:`load_weights` and :func:`load_tokenizer` do."""
    loaded = load_weights(model, trust_remote_code=trust_remote_code, dtype=dtype, **settings)
    return loaded, load_tokenizer(model, trust_remote_code=trust_remote_code)


def load_weights(
    model: str, *, trust_remote_code: bool, dtype: str = "auto", config: Any = None
) -> Any:
    """Return the whole of a model, towers of a multi-modal one included.

    Args:
        model: directory or id.
        trust_remote_code: run Python code that the model brings along, if it needs any.
        dtype: name of a dtype, or ``auto`` for its own.
        config: another one than its own.

    Raises:
        ValueError: if it cannot be loaded, whatever the reason, or not as a whole.
    """
    from transformers import AutoConfig

    from moeq_plugin.models.auto_class import language_class_of

    with loading(model):
        if config is None:
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    auto = language_class_of(config)
    with loading(model):
        return auto.from_pretrained(
            model, config=config, dtype=dtype, trust_remote_code=trust_remote_code
        )


def load_text_config(model: str, *, trust_remote_code: bool) -> Any:
    """Return the configuration of a model, directory or id, of the part that reads text.

    Raises:
        ValueError: if it cannot be loaded, whatever the reason.
    """
    from transformers import AutoConfig

    with loading(model):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        return config.get_text_config()


def load_tokenizer(model: str, *, trust_remote_code: bool) -> Any:
    """Return the tokenizer of a model, directory or id.

    Raises:
        ValueError: if it cannot be loaded, whatever the reason.
    """
    from transformers import AutoTokenizer

    with loading(model):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)


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
        yield
    except Exception as error:  # configs and weights of strangers fail in every way there is
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"{model} needs Python code that it brings along (auto_map); read it, and run it "
                "with --trust-remote-code if you trust whoever wrote it"
            ) from error
        raise ValueError(f"cannot load {model}: {type(error).__name__}: {error}") from error
