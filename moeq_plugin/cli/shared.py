"""What all commands share: the application, what they print and how a wrong request ends."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, TextIO

import typer

from moeq_plugin import __version__
from moeq_plugin.cli.commands import Commands
from moeq_plugin.cli.extras import install_line
from moeq_plugin.cli.validation import in_words, is_validation_error
from moeq_plugin.untrusted.broken import origin, sentence
from moeq_plugin.untrusted.text import harmless

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)

# by these a command ends as it is told to
_ENDS = (typer.Exit, typer.Abort, typer.BadParameter)
# where results go while whatever others print goes to standard error
_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


class Interrupted(KeyboardInterrupt):  # noqa: N818 - as that is called
    """Ctrl-C, with what is kept of the run: said when no live display can write over it."""


def _print_version(is_asked: bool) -> None:
    if is_asked:
        say(f"moeq {__version__}")
        raise typer.Exit


@app.callback()
def moeq(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Quantize Mixture-of-Experts and RWKV models, check the result and report on it."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # read when it is imported


def help_without_sections(application: typer.Typer) -> None:
    """Give every command the help that its docstring starts with; what it raises is for readers."""
    for command in application.registered_commands:
        text = inspect.cleandoc((command.callback and command.callback.__doc__) or "")
        command.help = text.split("\n\nRaises:")[0]


def say(text: str, *, err: bool = False) -> None:
    """Print a line, whatever files of strangers put into it."""
    typer.echo(harmless(text), err=err, file=None if err else _results.get())


def say_json(text: str) -> None:
    """Print JSON of any length to standard output, and nothing else ever stands there."""
    typer.echo(text, file=_results.get())


@contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Send what others print to standard error: what a command prints can be piped."""
    before = _results.set(_results.get() or sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(before)


@contextmanager
def errors(command: str) -> Iterator[None]:
    """Turn what the request or a file got wrong into a message and exit code 2.

    Raises:
        typer.Exit: with that code, 130 if interrupted.
        BrokenPipeError: if nobody reads the results any more; typer ends the command silently.
    """
    try:
        with only_results_on_stdout():
            yield
    except KeyboardInterrupt as interrupt:
        what_is_kept = f"; {interrupt}" if str(interrupt) else ""
        say("", err=True)  # after the ^C of the terminal
        say(f"moeq {command}: interrupted{what_is_kept}", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        raise
    except ModuleNotFoundError as error:
        line = install_line(error.name)
        say(f"moeq {command}: {sentence(error)}{line and f': {line}'}", err=True)
        raise typer.Exit(2) from None
    # Files of strangers fail in every way there is, also in libraries that raise what they like.
    except Exception as error:
        if isinstance(error, _ENDS):
            raise
        if is_validation_error(error):
            say(f"moeq {command}: {in_words(error)}", err=True)
            raise typer.Exit(2) from None
        say(f"moeq {command}: {sentence(error)}{origin(error)}", err=True)
        raise typer.Exit(2) from None
