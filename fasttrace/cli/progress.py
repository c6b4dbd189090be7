"""How far a run is, for people: one bar on a terminal, plain lines elsewhere, or nothing."""

import sys
import time
from contextlib import AbstractContextManager
from typing import Any, TextIO

from tqdm import tqdm

from fasttrace.runs.run import Told

SECONDS_BETWEEN_LINES = 10.0


class FactsBar(AbstractContextManager):
    """Facts done, facts and cells a second, time left, facts skipped.

    Args:
        quiet: say nothing.
        stream: where it is said; a bar if that is a terminal.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self.quiet, self.stream = quiet, stream or sys.stderr
        self.began = self.said = time.monotonic()
        self.bar: Any = None

    def __call__(self, told: Told) -> None:
        """Says how far it is."""
        if self.quiet:
            return
        if self.stream.isatty():
            self._draw(told)
        elif time.monotonic() - self.said > SECONDS_BETWEEN_LINES or told.done in (0, told.facts):
            self.said = time.monotonic()
            self.stream.write(line(told, self.said - self.began) + "\n")
            self.stream.flush()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def _draw(self, told: Told) -> None:
        if self.bar is None:
            self.bar = tqdm(total=told.facts, unit="fact", file=self.stream, dynamic_ncols=True)
        elapsed = max(time.monotonic() - self.began, 1e-9)
        self.bar.set_postfix_str(f"{told.cells / elapsed:,.0f} cells/s, {told.skipped} skipped", refresh=False)
        self.bar.update(told.done - self.bar.n)


def line(told: Told, seconds: float) -> str:
    """One line of a log.

    >>> line(Told(facts=60, done=20, skipped=2, cells=18000), 40)
    '20 of 60 facts, 2 skipped, 0.50 facts/s, 450 cells/s, 80 s left'
    """
    done = f"{told.done} of {told.facts} facts, {told.skipped} skipped"
    if not told.done or seconds <= 0:
        return done
    left = seconds * (told.facts - told.done) / told.done
    return f"{done}, {told.done / seconds:.2f} facts/s, {told.cells / seconds:,.0f} cells/s, {_duration(left)} left"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
