"""What all commands share: the application, how a wrong request ends, and models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    import typer
except ImportError as error:
    raise ImportError(
        "the command line needs typer: pip install 'moeq-plugin[llmcompressor]'"
    ) from error

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def moeq() -> None:
    """Quantize Mixture-of-Experts models so that no expert is damaged."""


@contextmanager
def errors(command: str) -> Iterator[None]:
    """Turn what the request got wrong into a message and exit code 2.

    Raises:
        typer.Exit: with that code, 130 if interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nmoeq {command}: interrupted", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"moeq {command}: {error}", err=True)
        raise typer.Exit(2) from None


def device() -> str:
    """Return the accelerator's type, ``cpu`` if there is none."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def run_oneshot(model: str, recipe: Any, **arguments: Any) -> None:
    """Load a model and its tokenizer and quantize it in place."""
    from llmcompressor.entrypoints.oneshot import oneshot

    loaded, tokenizer = load_model(model)
    oneshot(model=loaded, tokenizer=tokenizer, recipe=recipe, **arguments)


def load_model(model: str, **settings: Any) -> tuple[Any, Any]:
    """Return a model in its own dtype and its tokenizer.

    Args:
        model: directory or id.
        **settings: of ``from_pretrained``, such as another ``config``.

    Raises:
        ValueError: if either cannot be loaded, whatever the reason.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", **settings)
        return loaded, AutoTokenizer.from_pretrained(model)
    except Exception as error:  # configs and weights of strangers fail in every way there is
        raise ValueError(f"cannot load {model}: {type(error).__name__}: {error}") from error
