"""Leases: which processes are at work in a folder, also those of other starts, on this machine or on others.

A process puts a file of its own into the folder, its badge, writes it again every few seconds, and takes work by giving
the badge a second name: a lease. A lease counts as long as its holder may be alive. Of a process of this machine that
is looked up; of others the badge's age tells. Ages are told by the file system's clock alone: those of machines that
share a folder may be hours apart. Badges are opened to be looked at, because NFS answers for closed files from memory.
"""

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from fasttrace.files.writing import TEMPORARY, clock_of, paths_in
from fasttrace.memories import remembered

__all__ = ["BADGE", "LEASE_SECONDS", "Badge", "Worker", "workers_in"]

LEASE_SECONDS = 60.0
"""Seconds without a new badge after which a process is taken for dead."""
BEAT_SECONDS = 10.0
BADGE = ".worker"
SAME_SECONDS = 60.0
"""Seconds by which two readings of when a process began may differ, as a machine's clock may be set meanwhile."""


@dataclass(frozen=True)
class Worker:
    """A process at work.

    Attributes:
        token: unique, also within a process.
        place: the machine, what it calls this boot, and the space of its process numbers.
        pid: number of the process there.
        began: when it started, in seconds, by its machine's clock.
    """

    token: str
    place: tuple[str, ...]
    pid: int
    began: float

    @classmethod
    def here(cls) -> "Worker":
        """This process."""
        return cls(secrets.token_hex(8), place(), os.getpid(), psutil.Process().create_time())

    @classmethod
    def read(cls, path: Path) -> "Worker | None":
        """The process whose badge or lease a file is; None if it is gone, or is neither."""
        try:
            values = json.loads(path.read_bytes())
            token, pid, began = str(values["token"]), int(values["pid"]), float(values["began"])
            return cls(token, tuple(map(str, values["place"])), pid, began) if token.isalnum() else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.place[0] if self.place else '?'}"

    @property
    def content(self) -> bytes:
        """What its badge holds."""
        return json.dumps(asdict(self)).encode()

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine, or did."""
        return self.place == place()

    def is_gone(self) -> bool:
        """Whether it is known to have ended: it ran on this machine, and does not any more."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.began) > SAME_SECONDS
        except psutil.NoSuchProcess:
            return True
        except (psutil.Error, ValueError, OverflowError):
            return False

    def may_live(self, folder: Path, now: float | None) -> bool:
        """Whether it may still be at work.

        Args:
            folder: where its badge is.
            now: by the clock of the folder's file system; None if that is not known.
        """
        if self.is_gone():
            return False
        try:
            with (folder / f"{self.token}{BADGE}").open("rb") as file:
                return now is None or now - os.fstat(file.fileno()).st_mtime <= LEASE_SECONDS
        except FileNotFoundError:
            return False  # it has left
        except OSError:
            return True


@remembered()
def place() -> tuple[str, ...]:
    """Where a process number names one process: host name, boot and container, because host names may repeat."""
    found = [socket.gethostname()]
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        found.append(os.readlink("/proc/self/ns/pid"))
    return tuple(found)


class Badge:
    """This process's file in a folder, which says that it is at work there.

    Attributes:
        worker: this process.
        folder: where the file is.
    """

    def __init__(self, folder: Path):
        self.worker, self.folder = Worker.here(), folder
        self._path = folder / f"{self.worker.token}{BADGE}"
        self._left = threading.Event()
        self._beats: threading.Thread | None = None

    def enter(self) -> None:
        """Makes the folder and the file where they are missing, and keeps the file young from now on.

        Raises:
            OSError: they cannot be made.
        """
        self.folder.mkdir(exist_ok=True)
        self._path.write_bytes(self.worker.content)
        if self._beats is None:
            self._beats = threading.Thread(target=self._beat, name="fasttrace-badge", daemon=True)
            self._beats.start()

    def leave(self) -> None:
        """Removes the file, which gives up all leases."""
        self._left.set()
        if self._beats is not None:
            self._beats.join()
        with suppress(OSError):
            self._path.unlink()

    def put(self, name: str) -> bool:
        """Makes a lease of this process unless there is one of that name.

        Returns:
            Whether this call made it. False is also the answer where NFS asked twice, and was told the second time that
            the file is there: who holds it can be read.

        Raises:
            OSError: it cannot be made.
        """
        path = self.folder / name
        try:
            os.link(self._path, path)
        except FileNotFoundError:
            raise
        except FileExistsError:
            return False
        except OSError:  # no hard links here, or no more of one file
            return self._make(path)
        return True

    def put_over(self, name: str) -> None:
        """Makes a lease of this process in place of another's.

        Raises:
            OSError: it cannot be made.
        """
        temporary = self.folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            temporary.write_bytes(self.worker.content)
            os.replace(temporary, self.folder / name)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _make(self, path: Path) -> bool:
        try:
            with path.open("xb") as file:
                file.write(self.worker.content)
        except FileExistsError:
            return False
        return True

    def _beat(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            # Written and not touched: some file systems take the time of a touch from the machine that asks for it.
            with suppress(OSError), self._path.open("r+b") as file:
                file.write(self.worker.content)


def workers_in(folder: Path, but: Iterable[str] = ()) -> list[Worker]:
    """Processes that may be at work in a folder; on this machine also those that are suspended.

    Args:
        folder: with their badges.
        but: tokens of those to leave out.
    """
    now, but = clock_of(folder), set(but)
    found = [Worker.read(path) for path in paths_in(folder, f"*{BADGE}")]
    workers = [each for each in found if each and each.token not in but and not each.is_gone()]
    return [each for each in workers if each.is_here or each.may_live(folder, now)]
