"""Stores: a folder that a run writes its facts into, part by part, and that survives being killed."""

from dataclasses import dataclass

from fasttrace.datasets import Fact
from fasttrace.results import TraceResult

__all__ = ["Record"]


@dataclass(frozen=True)
class Record:
    """What became of one fact.

    Attributes:
        fact: as it was given.
        result: its trace; None if it was skipped.
        reason: why it was skipped; None if it was traced.
        correct: whether the clean run's top token is the start of the expected answer; None if there is none.
    """

    fact: Fact
    result: TraceResult | None = None
    reason: str | None = None
    correct: bool | None = None
