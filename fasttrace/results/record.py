"""Record: what became of one fact."""

from dataclasses import dataclass

from fasttrace.facts.dataset import Fact
from fasttrace.results.result import TraceResult


@dataclass(frozen=True)
class Record:
    """What became of one fact.

    Attributes:
        fact: as it was given.
        result: its trace; None if it was skipped.
        reason: why it was skipped; None if it was traced.
        correct: whether the clean run's top token is the first of the expected answer, or by ROME's rule the answer;
            None if there is none.
    """

    fact: Fact
    result: TraceResult | None = None
    reason: str | None = None
    correct: bool | None = None
