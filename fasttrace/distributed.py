"""One run in any number of processes: packs are dealt to whoever is free, and every process writes its own parts.

Processes are started by `accelerate launch` or `torchrun`. They work out the same packs and take their numbers one by
one, by making a file that only one of them can make; so a slow process holds nobody up, and one that is killed loses
the packs that it was computing, which the next start computes. A single huge prompt can be shared out by cells instead.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from fasttrace.cost import Cost, total
from fasttrace.engines.job import Job
from fasttrace.engines.passes import run_together
from fasttrace.errors import FasttraceError, PlanError, StoreError
from fasttrace.many import Encoded, Planned, Study
from fasttrace.ops import fused
from fasttrace.readout import Scores

__all__ = ["CellSharded", "Claims", "Ranks"]

CLAIMS = ".claims-"
STALE_SECONDS = 24 * 3600.0
"""Claims of runs that began longer ago belong to dead ones."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those that were started together.

    Attributes:
        rank: number of this process, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls, cpu: bool = False) -> "Ranks":
        """As the launcher says; a process that was started alone is the only one.

        Args:
            cpu: compute on the CPU although there are GPUs.

        Raises:
            PlanError: the launcher started several processes, and they do not see each other.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started < 2:
            return cls()
        # Without GPUs, and without being told so, accelerate takes every process for the only one.
        state = PartialState(cpu=cpu or not torch.cuda.is_available())
        if state.num_processes != started:
            raise PlanError(
                f"the launcher started {started} processes, of which this one sees {state.num_processes}: start them "
                "with accelerate launch or torchrun, and make no PartialState or Accelerator before"
            )
        return cls(state.process_index, state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def device(self) -> str:
        """Where this process computes by default."""
        return "auto" if self.world == 1 else str(PartialState().device)

    def first(self, work: Callable[[], Value]) -> Value:
        """What `work` gives to the first process, in every process; so is an error that it raises.

        Raises:
            FasttraceError: what `work` raised.
        """
        if self.world == 1:
            return work()
        outcome: list[Any] = [_outcome(work) if self.is_first else None]
        broadcast_object_list(outcome)
        return _value(outcome[0])

    def in_turn(self, work: Callable[[], Value]) -> Value:
        """What `work` gives here; the first process does it first, so that the others find what it leaves on disk."""
        if self.world == 1:
            return work()
        with PartialState().local_main_process_first():
            return work()

    def all(self, work: Callable[[], Value]) -> list[Value]:
        """What `work` gives in each process, in every process; the first error of any is raised in all.

        Raises:
            FasttraceError: what `work` raised somewhere.
        """
        if self.world == 1:
            return [work()]
        return [_value(outcome) for outcome in gather_object([_outcome(work)])]


def _outcome(work: Callable[[], Any]) -> tuple[Any, FasttraceError | None]:
    try:
        return work(), None
    except FasttraceError as error:
        return None, error


def _value(outcome: tuple[Any, FasttraceError | None]) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value


class Claims:
    """Numbers that processes take, each number once: files that only one process can make.

    Attributes:
        folder: where the files are; all processes see it, on one machine or several.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def taken(self, count: int) -> Iterator[int]:
        """Takes numbers below `count`, the lowest that is free first, until all are taken.

        Raises:
            StoreError: the folder cannot be written to.
        """
        for number in range(count):
            if self._make(f"{number}.taken"):
                yield number

    def finish(self, number: int) -> None:
        """Says that a number's work is done, and written."""
        self._make(f"{number}.done")

    def finished(self) -> frozenset[int]:
        """Numbers whose work is done, in any process."""
        return frozenset(int(path.stem) for path in self.folder.glob("*.done"))

    def _make(self, name: str) -> bool:
        try:
            os.close(os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.folder} ({error}): free some space or make the folder writable, then start the "
                "same run again: it goes on where it stopped"
            ) from error
        return True


@contextmanager
def claims(ranks: Ranks, folder: Path) -> Iterator[Claims]:
    """Claims for one run in a store's folder, removed when all processes are done.

    After an error they stay where other processes may still ask for numbers; a later run removes them.

    Raises:
        StoreError: the folder cannot be written to.
    """
    made = Claims(Path(ranks.first(lambda: str(_new_claims(folder)))))
    unused = ranks.world == 1
    try:
        yield made
        ranks.all(lambda: None)  # nobody asks for a number any more
        unused = True
    finally:
        if unused and ranks.is_first:
            shutil.rmtree(made.folder, ignore_errors=True)


def _new_claims(folder: Path) -> Path:
    for old in folder.glob(f"{CLAIMS}*"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    made = folder / f"{CLAIMS}{secrets.token_hex(8)}"
    try:
        made.mkdir()
    except OSError as error:
        raise StoreError(f"cannot write to {folder} ({error}): give another folder, or make it writable") from error
    return made


@dataclass(frozen=True)
class CellSharded(Study):
    """A study in which all processes work on one prompt, each on a part of its cells.

    Attributes:
        ranks: the processes.
    """

    ranks: Ranks = Ranks()

    def packed(self, facts: Any) -> list[list[Encoded]]:
        """Every fact alone."""
        return [[each] for pack in super().packed(facts) for each in pack]

    def _scores(self, planned: Planned) -> list[tuple[Scores, Cost]]:
        (job,) = planned.jobs
        shares = shares_of_cells(job, self.sweep.anatomy.n_layers, self.ranks.world)
        found = self.ranks.all(lambda: self._scores_of(job, shares[self.ranks.rank]))
        return [(_joined([scores for scores, _ in found], shares), total(cost for _, cost in found))]

    def _scores_of(self, job: Job, share: np.ndarray) -> tuple[Scores, Cost]:
        anatomy, name = self.sweep.anatomy, self.sweep.choice.name
        part = replace(job, cells=tuple(job.cells[number] for number in share))
        with fused(anatomy, self.fuse and name != "reference"):
            return run_together(name, anatomy, [part], self.budget)[0]


def shares_of_cells(job: Job, n_layers: int, world: int) -> list[np.ndarray]:
    """[process] numbers of the cells it computes: about equal work, neighbours in a column together.

    Cells of one position share most of their rows, so that a position is cut as rarely as can be.
    """
    if not job.cells:
        return [np.zeros(0, dtype=np.int64) for _ in range(world)]
    first = np.array([min(cell, key=lambda edit: edit.layer)[1:3] for cell in job.cells])
    order = np.lexsort((first[:, 0], first[:, 1]))
    work = (n_layers - first[:, 0]) * (len(job.token_ids) - first[:, 1])
    before = np.cumsum(work[order]) - work[order] / 2
    return np.split(order, np.searchsorted(before, before[-1] * np.arange(1, world) / world))


def _joined(parts: Sequence[Scores], shares: Sequence[np.ndarray]) -> Scores:
    cells = np.empty((sum(map(len, shares)), parts[0].cells.shape[1]))
    for part, share in zip(parts, shares, strict=True):
        cells[share] = part.cells
    return replace(parts[0], cells=cells)
