"""Claims: which process computes which pack, whether one start or several compute a run.

Numbers are taken one by one, by making a file that only one process can make. These files only save work. What is done
is told by the parts that are there, so that a file that is lost, forged or not yet seen costs a pack that is computed
twice, and never one that is not computed.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fasttrace.files.writing import clock_of, paths_in, write_new
from fasttrace.runs.leases import BADGE, LEASE_SECONDS, Badge, Worker, workers_in

if TYPE_CHECKING:
    from fasttrace.runs.processes import Ranks

__all__ = ["CLAIMS", "Claims", "claims", "workers_are"]

logger = logging.getLogger(__name__)

CLAIMS = ".claims-"
PACKS = "packs.json"
TAKEN, DONE = ".taken", ".done"

Value = TypeVar("Value")


class Claims:
    """Which process computes which pack, in one folder for all that compute the same packs.

    Attributes:
        folder: where the files are, made when missing: N.taken, a lease of whoever computes pack N; N.done, the name
            of the part that holds it; packs.json, the packs.
        rank, world: this process's number, and how many processes its start has.
        ours: tokens of the processes of this start.
        was_gone: somebody removed the folder meanwhile, so that other processes may have come far without a trace here.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1):
        self.folder, self.rank, self.world = folder, rank, world
        self.was_gone = False
        self._badge = Badge(folder)
        self.ours = frozenset({self.token})
        self._works = True

    @property
    def token(self) -> str:
        """By which this process's leases are known."""
        return self._badge.worker.token

    def enter(self) -> None:
        """Makes this process known in the folder; without a folder it works alone."""
        self._try(self._badge.enter)

    def leave(self) -> None:
        """Gives up what was taken and is not done; the last process to leave removes the folder."""
        self._badge.leave()
        if self.folder.is_dir() and not workers_in(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)

    def agreed(self, packs: list[list[str]]) -> list[list[str]]:
        """The packs, by ids, of the process that came first: all take these, so that pack numbers mean the same.

        Args:
            packs: those of this process, which would do as well.
        """
        path = self.folder / PACKS
        try:
            if not self._works or write_new(path, json.dumps(packs).encode()):
                return packs
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):  # a StoreError is a ValueError, too
            return packs
        lists = isinstance(found, list) and all(isinstance(pack, list) for pack in found)
        return found if lists and all(isinstance(each, str) for pack in found for each in pack) else packs

    def taken(self, numbers: Iterable[int]) -> Iterator[int]:
        """Takes those of some numbers that nobody has taken, one by one.

        Where no file can be made, a process takes what falls to it by its rank.
        """
        for number in numbers:
            taken = self._try(lambda number=number: self._badge.put(f"{number}{TAKEN}"))
            if number % self.world == self.rank if taken is None else taken:
                yield number

    def taken_over(self, numbers: Iterable[int]) -> Iterator[int]:
        """Takes numbers one by one, whoever has them."""
        for number in numbers:
            self._try(lambda number=number: self._badge.put_over(f"{number}{TAKEN}"))
            yield number

    def finish(self, number: int, part: str) -> None:
        """Says that a number's work is done, and in which part it is."""
        self._try(lambda: (self.folder / f"{number}{DONE}").write_text(part))

    def finished(self) -> frozenset[int]:
        """Numbers whose work is done, in any process: by a listing, which may be old."""
        with suppress(OSError):
            names = (name.partition(".") for name in os.listdir(self.folder) if name.endswith(DONE))
            return frozenset(int(number) for number, *_ in names if number.isdecimal())
        return frozenset()

    def part(self, number: int) -> str:
        """The part in which a number's work is said to be; empty if nobody says so."""
        with suppress(OSError, ValueError):
            return (self.folder / f"{number}{DONE}").read_text()
        return ""

    def holders(self, numbers: Iterable[int]) -> dict[int, Worker]:
        """Which processes of other starts may be computing which of some numbers, and are not done."""
        now = clock_of(self.folder)
        found = {number: Worker.read(self.folder / f"{number}{TAKEN}") for number in numbers}
        return {
            number: worker
            for number, worker in found.items()
            if worker and worker.token not in self.ours and worker.may_live(self.folder, now) and not self.part(number)
        }

    def _try(self, work: Callable[[], Value]) -> Value | None:
        """What `work` gives; None once no files can be made here."""
        failed: OSError | None = None
        for _ in range(2 if self._works else 0):
            try:
                return work()
            except OSError as error:
                failed, self.was_gone = error, self.was_gone or isinstance(error, FileNotFoundError)
                with suppress(OSError):
                    self._badge.enter()
        if failed:
            self._works = False
            logger.warning("cannot write to %s (%s): this process shares no work with others", self.folder, failed)
        return None


@contextmanager
def claims(ranks: "Ranks", folder: Path, key: str = "") -> Iterator[Claims]:
    """Claims of one start of a run in a store's folder; tells of other starts that are at work there.

    Args:
        ranks: the processes of this start.
        folder: the store's.
        key: what starts have in common that compute the same packs; the first process's counts.
    """
    made = Claims(folder / (CLAIMS + ranks.first(lambda: key)), ranks.rank, ranks.world)
    try:
        made.enter()
        made.ours = frozenset(ranks.all(lambda: made.token))
        ranks.first(lambda: _tell_of_others(made))
        yield made
    finally:
        made.leave()


def _tell_of_others(made: Claims) -> None:
    """Says which other starts are at work in the store's folder, and removes what dead ones left."""
    folder = made.folder.parent
    if others := workers_in(made.folder, made.ours):
        logger.warning("%s at work in %s, too: the work is shared", workers_are(others), folder)
    for other in set(paths_in(folder, f"{CLAIMS}*")) - {made.folder}:
        with suppress(OSError):
            age = (clock_of(folder) or 0) - other.stat().st_mtime
            badges = paths_in(other, f"*{BADGE}")
            if others := workers_in(other):
                logger.warning(
                    "%s at work in %s, too, with other facts or another budget or engine: what both are asked for is "
                    "computed twice",
                    workers_are(others),
                    folder,
                )
            elif badges or age > LEASE_SECONDS:
                shutil.rmtree(other, ignore_errors=True)


def workers_are(workers: Collection[Worker]) -> str:
    """The beginning of a sentence about processes: "process 7 on HOST is", "process 7 on HOST and 2 more are"."""
    first, *more = sorted(map(str, workers))
    return f"{first} and {len(more)} more are" if more else f"{first} is"
