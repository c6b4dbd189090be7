"""Errors a user can meet. Each message says what was found, what was expected and what to do."""

import re

__all__ = [
    "EngineError",
    "FasttraceError",
    "ModelError",
    "NumericsError",
    "PlanError",
    "PromptError",
    "StoreError",
    "UnequalLengthsError",
    "first_line",
    "kind_and_line",
]


class FasttraceError(ValueError):
    """Base of all errors that fasttrace raises on purpose.

    Attributes:
        elsewhere: it was raised in another process of the same start, which says it.
    """

    elsewhere = False


class PromptError(FasttraceError):
    """The prompt, its subject or its target cannot be traced."""


class PlanError(FasttraceError):
    """An argument that cannot be used: an unknown stream, a window below 1, an edit outside the prompt."""


class ModelError(FasttraceError):
    """The model cannot be loaded, or is not a decoder-only language model that fasttrace knows."""


class EngineError(FasttraceError):
    """An engine cannot run this model, its self-check found wrong numbers, or memory ran out."""


class NumericsError(FasttraceError):
    """The forward pass produced inf or NaN."""


class StoreError(FasttraceError):
    """A result cannot be written to, or read from, the given place."""


class UnequalLengthsError(PromptError):
    """A counterfactual has another number of tokens than its prompt; the message has both, one under the other."""


SPEAKING = (OSError, ValueError, RuntimeError, ImportError)
"""Errors whose words are sentences; of others the class is given too."""


def first_line(error: object, most: int = 200) -> str:
    """The first line of an error's message, with its class where the words say little without it.

    Args:
        error: an error of any package, or its text.
        most: letters; a longer line is cut.
    """
    line = _line(error)
    if not line or (isinstance(error, Exception) and not isinstance(error, SPEAKING)):
        line = f"{type(error).__name__}: {line}".rstrip(": ")
    return line if len(line) <= most else line[: most - 3] + "..."


def kind_and_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    return f"{type(error).__name__}: {_line(error) or 'no message'}"


def _line(error: object) -> str:
    """The first line that is not empty, without terminal colors; a heading with the line below it."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
