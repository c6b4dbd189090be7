"""Facts: prompts with a subject and an expected answer, from the files that people have."""

from dataclasses import dataclass

__all__ = ["Fact"]


@dataclass(frozen=True)
class Fact:
    """One fact to trace.

    Attributes:
        id: names it in a store; unique in its set.
        prompt: text that the model continues.
        subject: text that occurs in the prompt.
        target: the expected answer, of which the first token is scored; None: the clean run's top token.
        foil: an answer that is wrong, kept beside the fact.
        relation: what kind of fact it is, such as ROME's "P103".
    """

    id: str
    prompt: str
    subject: str
    target: str | None = None
    foil: str | None = None
    relation: str | None = None
