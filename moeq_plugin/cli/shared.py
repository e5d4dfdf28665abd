"""What all commands share: the application, what they print and how a wrong request ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

try:
    import typer
except ImportError as error:
    raise ImportError(
        "the command line needs typer: pip install 'moeq-plugin[llmcompressor]'"
    ) from error

from moeq_plugin.untrusted.broken import origin, sentence
from moeq_plugin.untrusted.text import harmless

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

# by these a command ends as it is told to
_ENDS = (typer.Exit, typer.Abort, typer.BadParameter)


@app.callback()
def moeq() -> None:
    """Quantize Mixture-of-Experts models so that no expert is damaged."""


def say(text: str, *, err: bool = False) -> None:
    """Print a line, whatever files of strangers put into it."""
    typer.echo(harmless(text), err=err)


@contextmanager
def errors(command: str) -> Iterator[None]:
    """Turn what the request or a file got wrong into a message and exit code 2.

    Raises:
        typer.Exit: with that code, 130 if interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"moeq {command}: interrupted", err=True)
        raise typer.Exit(130) from None
    # Files of strangers fail in every way there is, also in libraries that raise what they like.
    except Exception as error:
        if isinstance(error, _ENDS):
            raise
        say(f"moeq {command}: {sentence(error)}{origin(error)}", err=True)
        raise typer.Exit(2) from None
