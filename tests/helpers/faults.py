"""What goes wrong on file systems and machines: functions that `fast_launcher` calls in what it starts."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from fasttrace import study as studies
from fasttrace.runs import claims, leases, shared_cells
from fasttrace.runs import processes as distributed
from fasttrace.runs import store as stores


def clock_ahead(rank: int) -> None:
    """This machine's clock is 25 hours ahead of the file system's."""
    right = time.time
    time.time = lambda: right() + 25 * 3600


def clock_behind(rank: int) -> None:
    """And 25 hours behind."""
    right = time.time
    time.time = lambda: right() - 25 * 3600


def answered_twice(rank: int) -> None:
    """Every third lease is made, and the answer is that it was there: as NFS answers when a first answer was lost."""
    right = os.link

    def link(source: Any, target: Any, **options: Any) -> None:
        right(source, target, **options)
        if str(target).endswith("0.taken") or str(target).endswith("3.taken"):
            raise FileExistsError(17, "File exists", str(target))

    os.link = link


def without_links(rank: int) -> None:
    """The file system has no hard links."""

    def link(source: Any, target: Any, **options: Any) -> None:
        raise PermissionError(1, "Operation not permitted", str(target))

    os.link = link


def without_claims(rank: int) -> None:
    """No file can be made where claims are."""

    def enter(badge: leases.Badge) -> None:
        raise PermissionError(13, "Permission denied", str(badge.folder))

    leases.Badge.enter = enter


def old_listings(rank: int) -> None:
    """A listing of parts shows what the first one showed, as for a minute on NFS."""
    right, first = stores.Store._paths, []

    def paths(store: stores.Store) -> Any:
        first.append(right(store))
        return first[0]

    stores.Store._paths = paths


def short_leases(rank: int) -> None:
    """A process that does not move for a second is taken for dead."""
    leases.LEASE_SECONDS = distributed.LEASE_SECONDS = claims.LEASE_SECONDS = 1.0
    leases.BEAT_SECONDS, distributed.SHORT_WAIT = 0.1, 0.5


def no_memory_in_the_second(rank: int) -> None:
    """The second process finds no memory for its share of a prompt's cells."""
    if rank == 1:

        def scores_of(sharing: shared_cells.SharedCells, study: Any, job: Any, share: Any) -> Any:
            raise MemoryError

        shared_cells.SharedCells._scores_of = scores_of


def interrupted(rank: int) -> None:
    """Somebody interrupts every process."""
    _before_pack(2, lambda: _raise(KeyboardInterrupt()))


def interrupt_in_the_second(rank: int) -> None:
    """Somebody interrupts the second process."""
    if rank == 1:
        _before_pack(2, lambda: _raise(KeyboardInterrupt()))


def second_is_killed(rank: int) -> None:
    """The second process dies."""
    if rank == 1:
        _before_pack(2, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _raise(error: BaseException) -> None:
    raise error


def _before_pack(number: int, fault: Callable[[], None]) -> None:
    right, asked = studies.Study._records, []

    def records(study: studies.Study, planned: studies.Planned) -> Any:
        asked.append(1)
        if len(asked) == number:
            fault()
        return right(study, planned)

    studies.Study._records = records
