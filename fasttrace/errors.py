"""Errors a user can meet. Each message says what was found, what was expected and what to do."""

__all__ = [
    "EngineError",
    "FasttraceError",
    "ModelError",
    "NumericsError",
    "PlanError",
    "PromptError",
    "StoreError",
    "UnequalLengthsError",
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
