"""One run in any number of processes: packs are dealt to whoever is free, and every process writes its own parts.

Processes are started by `accelerate launch` or `torchrun`, or one by one: several starts on one folder share the work
as well. They work out the same packs and take their numbers one by one (see `fasttrace.runs.claims`); so a slow process
holds nobody up, and what one that is killed was computing is computed by another.
"""

import atexit
import logging
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from fasttrace.errors import FasttraceError, PlanError
from fasttrace.runs.claims import CLAIMS, Claims, claims, workers_are
from fasttrace.runs.leases import LEASE_SECONDS, Worker

__all__ = ["CLAIMS", "Claims", "Patience", "Ranks", "claims"]

logger = logging.getLogger(__name__)

SHORT_WAIT, PACKS_OF_WAIT = 5.0, 3.0
"""How long a process waits for others' last packs: seconds, and times its own longest pack; whichever is more."""
SECONDS_BETWEEN_LOOKS = 0.25
RANK_NAMES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Where accelerate looks for a process's number."""
AGAIN = "start the same command again: it goes on where it stopped"
LAUNCHERS = "start with accelerate launch or torchrun, which set it; or unset WORLD_SIZE to start one process alone"

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

        A WORLD_SIZE without a number of this process is left over from a batch system: it is noted, and the process
        works alone.

        Args:
            cpu: compute on the CPU although there are GPUs.

        Raises:
            PlanError: the launcher's variables make no sense, or it started several processes that do not meet.
        """
        # Without GPUs, and without being told so, accelerate takes every process for the only one.
        cpu = cpu or not torch.cuda.is_available()
        started = _started(0 if cpu else torch.cuda.device_count())
        if started < 2:
            return cls()
        try:
            state = PartialState(cpu=cpu)
        except (ValueError, RuntimeError) as error:
            PartialState._reset_state()  # what is half made would be found by the next that asks
            raise PlanError(
                f"the launcher started {started} processes, which cannot meet ({_first_line(error)}): start them with "
                "accelerate launch or torchrun, or unset WORLD_SIZE to start one alone"
            ) from error
        if state.num_processes != started:
            raise PlanError(
                f"the launcher started {started} processes, of which this one sees {state.num_processes}: start them "
                "with accelerate launch or torchrun, and make no PartialState or Accelerator before"
            )
        _part_at_exit()
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
            FasttraceError: what `work` raised, or a process was lost.
        """
        if self.world == 1:
            return work()
        outcome, raised = self._tried(work) if self.is_first else (None, None)
        outcomes: list[Any] = [outcome]
        with _meeting():
            distributed.broadcast_object_list(outcomes, src=0, group=_messages())
        return self._values(outcomes, raised)[0]

    def in_turn(self, work: Callable[[], Value]) -> Value:
        """What `work` gives here; each machine's first process does it first: the others find what it leaves on disk.

        Raises:
            FasttraceError: what `work` raised somewhere, or a process was lost.
        """
        if self.world == 1:
            return work()
        goes_first, made = PartialState().is_local_main_process, []
        for turn in (True, False):
            self.all(lambda turn=turn: made.append(work()) if turn == goes_first else None)
        return made[0]

    def all(self, work: Callable[[], Value]) -> list[Value]:
        """What `work` gives in each process, in every process; the first error of any is raised in all.

        Raises:
            FasttraceError: what `work` raised somewhere, or a process was lost.
        """
        if self.world == 1:
            return [work()]
        outcome, raised = self._tried(work)
        outcomes: list[Any] = [None] * self.world
        with _meeting():
            distributed.all_gather_object(outcomes, outcome, group=_messages())
        return self._values(outcomes, raised)

    def _tried(self, work: Callable[[], Any]) -> tuple["_Outcome", BaseException | None]:
        try:
            return (work(), None), None
        except BaseException as error:  # also Ctrl-C: the others would wait for this process
            return (None, _as_message(error, self.rank)), error

    def _values(self, outcomes: Sequence["_Outcome"], raised: BaseException | None) -> list[Any]:
        if raised is not None and not isinstance(raised, FasttraceError):
            raise raised
        for rank, (_, error) in enumerate(outcomes):
            if error is not None and rank == self.rank and raised is not None:
                raise raised
            if error is not None:
                error.elsewhere = True
                raise error
        return [value for value, _ in outcomes]


_Outcome = tuple[Any, FasttraceError | None]


def _as_message(error: BaseException, rank: int) -> FasttraceError:
    if isinstance(error, FasttraceError):
        with suppress(Exception):
            return pickle.loads(pickle.dumps(error))
        return FasttraceError(str(error))
    said = f"{type(error).__name__}: {_first_line(error)}" if str(error) else type(error).__name__
    return FasttraceError(f"process {rank} stopped ({said}): see what it said, then {AGAIN}")


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo: the connection was closed, or nothing came for half an hour
        raise FasttraceError(f"a process was lost ({_first_line(error)}): {AGAIN}") from error


@cache
def _messages() -> Any:
    """The group in which messages go: of gloo, which tells at once when a process has died; NCCL only waits."""
    return None if "gloo" in distributed.get_backend() else distributed.new_group(backend="gloo")


@cache
def _part_at_exit() -> None:
    """Ends the group's threads before Python ends: one that comes later aborts the process, whose work is done."""
    atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())


def _first_line(error: BaseException) -> str:
    # Gloo's messages begin with a line of its code and end with a greeting.
    line = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).partition("\n")[0].partition(". This is")[0]
    return line.strip(" .") or type(error).__name__


def _started(gpus: int) -> int:
    """How many processes the launcher started, by its variables; of which this one has to be a possible one."""
    world = _whole("WORLD_SIZE", least=1) or 1
    if world == 1:
        return 1
    name = next((name for name in RANK_NAMES if os.environ.get(name)), "RANK")
    rank, local = _whole(name), _whole("LOCAL_RANK")
    if rank is None and local is None:
        logger.warning(
            "WORLD_SIZE is %d, and neither RANK nor LOCAL_RANK is set: taken as left over, this process works alone; "
            "starts on one folder share the work",
            world,
        )
        return 1
    if rank is None or (gpus and local is None):
        missing = "RANK" if rank is None else "LOCAL_RANK"
        raise PlanError(f"WORLD_SIZE is {world}, but {missing} is not set: {LAUNCHERS}")
    if rank >= world:
        raise PlanError(f"{name} is {rank}, but WORLD_SIZE is {world}: expected 0 to {world - 1}; {LAUNCHERS}")
    own_gpu = gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # as Slurm gives each process its own
    if gpus and local is not None and local >= gpus and not own_gpu:
        raise PlanError(
            f"LOCAL_RANK is {local}, but there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'} here: start at most "
            "as many processes on a machine as it has GPUs, or compute on its CPU with --device cpu"
        )
    return world


def _whole(name: str, least: int = 0) -> int | None:
    """A number from the environment; None if it is not set, or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise PlanError(f"{name} is {text!r} in the environment: expected a whole number >= {least}; {LAUNCHERS}")
    return number


class Patience:
    """How long a process waits for the last packs of other starts, before it computes them itself.

    Args:
        longest: seconds that one of its own packs took; None if it computed none.
        clock, sleep: as of `time`.
    """

    def __init__(
        self,
        longest: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._seconds = LEASE_SECONDS if longest is None else max(SHORT_WAIT, PACKS_OF_WAIT * longest)
        self._clock, self._sleep = clock, sleep
        self._holders: Mapping[int, Worker] = {}
        self._since = clock()

    def is_over(self, holders: Mapping[int, Worker]) -> bool:
        """Whether nothing has changed for too long; if not, a moment has passed.

        Args:
            holders: who computes what.
        """
        if holders != self._holders:
            self._holders, self._since = holders, self._clock()
            who = workers_are(set(holders.values()))
            logger.warning("%s at work on the last packs (%d): waiting for them", who, len(holders))
        elif self._clock() - self._since > self._seconds:
            return True
        self._sleep(SECONDS_BETWEEN_LOOKS)
        return False
