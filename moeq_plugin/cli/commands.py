"""The group of all commands: what cannot be parsed is said in one line, as every other error is."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
import typer.core

from moeq_plugin.untrusted.text import one_line


class Commands(typer.core.TyperGroup):
    """A group whose usage errors are no box of five lines."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Parse, run the command that was asked for, and exit with its code.

        Raises:
            Exception: what a command lets through; none of ours does.
        """
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            # by what it can do: the class stands in another package since typer 0.20
            if not standalone_mode or not hasattr(error, "format_message"):
                raise
            code = 2
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
            else:
                typer.echo(_in_a_line(error), err=True)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _in_a_line(error: Any) -> str:
    """Return where a request went wrong, how, and where its words are explained."""
    context = getattr(error, "ctx", None)
    path = "moeq" if context is None else context.command_path
    message = one_line(error.format_message()).rstrip(".")
    message = re.sub(r"Input should be (a valid )?", "expected ", message).split(", unable to ")[0]
    return f"{path}: {message[:1].lower()}{message[1:]}; see `{path} --help`"
