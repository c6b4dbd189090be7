"""Coverage: how many of the facts that a run was asked for are in its folder."""

from dataclasses import dataclass

__all__ = ["Coverage"]

SHOWN = 3
"""Damaged parts that the notes name."""


@dataclass(frozen=True)
class Coverage:
    """How much of what its run was asked for a store has, at one moment.

    Attributes:
        asked: how many facts the last start of the run was asked for; None where the manifest does not say.
        traced: how many of the facts to show have a trace.
        skipped: how many of the facts to show were skipped, with a reason.
        missing: how many that were asked for are not there.
        damaged: for each part that cannot be used, the reason.
        further: how many facts are in the folder that the run was not asked for, such as rows that are no longer in
            its facts file.
        everything: whether the further facts are among those to show.
        ids: the facts to show, in the order of `Store.records`.
    """

    asked: int | None
    traced: int
    skipped: int
    missing: int
    damaged: tuple[str, ...]
    further: int
    everything: bool
    ids: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every fact that was asked for is there, traced or skipped."""
        return not self.missing and (self.asked is not None or not self.damaged)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for people; none when all that was asked for is there and nothing else."""
        return tuple(note for note in (self._amount(), *self.damaged[:SHOWN], self._others()) if note)

    def _amount(self) -> str:
        parts = f"{_counted(len(self.damaged), 'part')} damaged"
        if self.complete:
            return f"all {self.asked} facts; {parts}, whose facts are in other parts" if self.damaged else ""
        again = "start the same run again to trace the others"
        if self.asked is None:
            return f"{parts}: how many facts are missing is not known"
        amount = f"{self.asked - self.missing} of {self.asked} facts"
        return f"{amount}; {parts}: {again}" if self.damaged else f"unfinished: {amount}: {again}"

    def _others(self) -> str:
        if not self.further:
            return ""
        what = "included" if self.everything else "left out"
        verb = "is" if self.further == 1 else "are"
        return (
            f"{_counted(self.further, 'further fact')} in the folder {verb} not among those that the run was last "
            f"asked for: {what}"
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
