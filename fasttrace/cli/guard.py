"""What surrounds every command: output that gets through whatever the terminal, errors as one line and an exit code."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from fasttrace.checks import is_out_of_memory
from fasttrace.errors import FasttraceError, StoreError, UnequalLengthsError, first_line

__all__ = ["Guarded", "is_utf8", "say", "tell"]

UsageError: Any = typer.BadParameter.__mro__[1]
"""Base of what the parser raises; typer exports only this subclass, and brings a parser of its own or takes click's."""

BROKEN_PIPE = 128 + 13
"""Exit code of a program that a closed pipe has ended."""


class Guarded(TyperGroup):
    """Turns the errors a user can meet into one line on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a command; texts that the terminal's encoding lacks are written with backslashes."""
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed before the program began
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            stream: Any = getattr(sys, name)
            with suppress(AttributeError, OSError, ValueError):  # another kind of stream, or one closed meanwhile
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def make_context(self, info_name: str | None, args: Any, *others: Any, **extra: Any) -> Any:
        """Parses what stands before a command's name; nothing at all asks for help."""
        with nullcontext() if not args else _explained(debug=False):
            return super().make_context(info_name, args, *others, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was parsed."""
        with _explained(ctx.params.get("debug", False)):
            return super().invoke(ctx)


@contextmanager
def _explained(debug: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        tell(f"interrupted: {str(error) or 'nothing half-written was left'}")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        if debug:
            raise
        _silence(sys.stdout)
        raise typer.Exit(BROKEN_PIPE) from None
    except Exception as error:
        message = _message_of(error)
        if message is None or debug:
            raise
        if not getattr(error, "elsewhere", False):  # which another process of the same start says
            tell(f"error: {message}")
        raise typer.Exit(2) from None


def say(message: str) -> None:
    """Prints a result.

    Raises:
        StoreError: standard output cannot be written to, as on a full disk.
    """
    try:
        _write(sys.stdout, message)
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence(sys.stdout)
        raise StoreError(
            f"cannot write to standard output ({error.strerror}): send it elsewhere; files of --out are written before"
        ) from error


def tell(message: str) -> None:
    """Says something that is no result, on stderr; where that cannot be written to, nothing is said."""
    try:
        _write(sys.stderr, message)
    except OSError:
        _silence(sys.stderr)


def is_utf8() -> bool:
    """Whether standard output takes every character."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "").replace("_", "") == "utf8"


def _message_of(error: Exception) -> str | None:
    """What to say on one line; None for an error that nobody expects."""
    if isinstance(error, UnequalLengthsError):
        return str(error)  # two prompts, one under the other
    if isinstance(error, FasttraceError):
        return " ".join(str(error).splitlines())
    if isinstance(error, UsageError):
        usage: Any = error
        path = usage.ctx.command_path if usage.ctx else "fasttrace"
        return f"{' '.join(usage.format_message().split())} (see {path} --help)"
    if is_out_of_memory(error):
        return f"out of memory ({first_line(error)}): lower --samples or --budget, or free memory"
    return None


def _write(stream: TextIO, message: str) -> None:
    stream.write(f"{message}\n")
    stream.flush()


def _silence(stream: TextIO) -> None:
    """Sends what a stream still holds nowhere, so that Python does not try to write it again when it ends."""
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(descriptor, stream.fileno())
        finally:
            os.close(descriptor)
