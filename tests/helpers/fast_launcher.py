"""A launcher that has imported everything: `fasttrace` in several processes at the cost of forks.

`python -m tests.helpers.fast_launcher` reads requests and writes answers, a line of JSON each; `Launcher` in
`tests.helpers.run_facts` is its other end. What it starts is what torchrun starts, in one process group.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
import transformers.models.gpt2.modeling_gpt2  # noqa: F401 (imported once for all)

from fasttrace import api  # noqa: F401
from fasttrace import study as studies
from fasttrace.cli import progress  # noqa: F401
from fasttrace.cli.app import app
from fasttrace.errors import StoreError
from fasttrace.reports import exports  # noqa: F401
from fasttrace.runs import processes, run  # noqa: F401
from tests.helpers import faults


def start(arguments: Sequence[str], log: str, world: int, pause: float, fail: int, fault: str) -> list[int]:
    """Starts `fasttrace` with some arguments in `world` processes; gives their numbers, the first is the group's.

    Args:
        arguments: those of a command line; "{rank}" in them stands for a process's number.
        log: a file that gets all they say.
        pause: seconds before each pack, as if the model were larger.
        fail: the process that finds no room for its first pack; -1: none.
        fault: a function of `tests.helpers.faults`, called with the rank; "": none.
    """
    port, pids = _free_port(), []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            _run(
                arguments,
                log,
                pause if rank != fail else -1.0,
                {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port},
                fault,
            )
        if not pids:
            os.setpgid(pid, pid)  # here too: whichever of the two is first
        pids.append(pid)
    return pids


def _run(arguments: Sequence[str], log: str, pause: float, places: dict[str, int], fault: str) -> None:
    """What a new process does; it never comes back."""
    code: Any = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
        _slow_down(pause)
        if fault:
            getattr(faults, fault)(places["RANK"])
        app([word.replace("{rank}", str(places["RANK"])) for word in arguments], prog_name="fasttrace")
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _slow_down(pause: float) -> None:
    right = studies.Study._records

    def slow(study: studies.Study, planned: studies.Planned) -> Any:
        if pause < 0:
            raise StoreError("no room for this")
        time.sleep(pause)
        return right(study, planned)

    studies.Study._records = slow


def wait(pids: Sequence[int], seconds: float, launched: bool) -> list[int]:
    """Exit codes, those of killed processes negative; if launched, as by torchrun, one that fails ends the others."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if (launched and any(codes.values())) or time.monotonic() > end:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main() -> None:
    """Answers one request after the other, until there are no more."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"start": start, "wait": wait}[request.pop("do")](**request)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
