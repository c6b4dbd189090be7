"""Facts, a tiny model in a folder and launchers for the tests of runs; nothing is downloaded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fasttrace.api import Tracer
from fasttrace.facts.dataset import Fact
from fasttrace.results.record import Record
from fasttrace.runs.store import Store
from tests.helpers.tokenizers import byte_level
from tests.helpers.zoo import tiny_model

SUBJECTS = ("The Space Needle", "The Needle", "Seattle", "The Space's Needle", "Seattle's Space", "Needle")
TAILS = (
    " is in downtown",
    " is in",
    " is",
    " is in The downtown",
    "'s",
    " is downtown's",
    " downtown",
    " in downtown is The",
    " is The downtown",
    " in The",
)
TARGETS = ("Seattle", "downtown", None)
OPTIONS = {"samples": 2, "window": 3, "noise": 1.0}
FLAGS = ("--samples", 2, "--window", 3, "--noise", 1.0)
"""Of the command line, as `OPTIONS`."""

SMALL = 1300
"""A budget with which some ten of the facts share a pass."""

PATIENCE = 150
"""Seconds after which a launch is taken to hang; on a busy machine of two cores one takes 30."""


def facts_of(count: int) -> list[Fact]:
    """Facts of three to twelve tokens; 60 prompts differ, then they come again under other ids."""
    texts = [(subject, subject + tail) for tail, subject in product(TAILS, SUBJECTS)]
    return [
        Fact(str(number), texts[number % len(texts)][1], texts[number % len(texts)][0], TARGETS[number % len(TARGETS)])
        for number in range(count)
    ]


def known_and_unknown(tracer: Tracer) -> list[Fact]:
    """Facts of which the model knows some, by its own answers; the target of the others is "~never~"."""
    facts = []
    for fact in facts_of(60):
        top, text, _ = tracer.trace(fact.prompt, subject=fact.subject, samples=1, streams=("mlp_output",)).top["clean"][
            0
        ]
        is_text = text.strip() and "\ufffd" not in text
        if (
            is_text
            and tracer.encode(fact.prompt, fact.subject, text, first_target_token=True, tell=False).target_id == top
        ):
            facts.append(replace(fact, target=text))
        else:
            facts.append(replace(fact, target="~never~"))
    known = [fact for fact in facts if fact.target != "~never~"]
    assert len(known) > 5
    return known + [fact for fact in facts if fact.target == "~never~"][:12]


def write_facts(path: Path, facts: Iterable[Fact]) -> Path:
    """Facts as a .jsonl file."""
    path.write_text("".join(json.dumps(asdict(fact)) + "\n" for fact in facts))
    return path


def save_model(folder: Path, family: str = "gpt2") -> Path:
    """A tiny model and its tokenizer, as `save_pretrained` leaves them."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(folder)
    tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def one_of_each(store: Store) -> dict[str, Record]:
    """A store's records by id; none is there twice."""
    records = list(store.records())
    found = {record.fact.id: record for record in records}
    assert len(found) == len(records)
    return found


def assert_same_numbers(found: dict[str, Record], expected: dict[str, Record], tolerance: float = 1e-5) -> None:
    """Two runs' records are equal but for the rounding of other matrix shapes."""
    assert list(found) == list(expected)
    for name, record in found.items():
        assert (record.fact, record.reason, record.correct) == (
            expected[name].fact,
            expected[name].reason,
            expected[name].correct,
        )
        if record.result is not None:
            assert record.result.tokens == expected[name].result.tokens
            assert record.result.target_id == expected[name].result.target_id
            for stream in expected[name].result.streams:
                np.testing.assert_allclose(
                    record.result.prob[stream], expected[name].result.prob[stream], rtol=tolerance
                )


def environment() -> dict[str, str]:
    """Of a process that computes on one core of this machine and asks no network."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    return {**os.environ, **settings}


def torchrun(processes: int = 2) -> tuple[str, ...]:
    """The command that starts a module in several processes."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    return (*launcher, "--nproc_per_node", str(processes), "-m")


def start(*command: object) -> psutil.Popen:
    """Starts a command in a session of its own, its output kept."""
    return psutil.Popen(
        [str(word) for word in command],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_all(script: psutil.Popen) -> None:
    """SIGKILLs a process and all that it started, whatever their process groups."""
    with suppress(psutil.NoSuchProcess):
        for process in (*script.children(recursive=True), script):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    script.wait()


def finished(*command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; it and what it started are gone afterwards, whatever happens."""
    script = start(*command)
    try:
        printed, complaints = script.communicate(timeout=PATIENCE)
    finally:
        if script.is_running():
            kill_all(script)
    return subprocess.CompletedProcess(script.args, script.returncode, printed, complaints)


class Launcher:
    """Starts `fasttrace` in several processes within a second; the other end of `tests.helpers.fast_launcher`."""

    def __init__(self, folder: Path):
        self.folder, self.starts = folder, 0
        self.log = folder / "0.txt"
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fast_launcher"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=PATIENCE)

    def start(
        self, *arguments: object, world: int = 2, pause: float = 0.0, fail: int = -1, fault: str = ""
    ) -> list[int]:
        """Numbers of the processes that were started; the first is their group's. What they say is in `log`.

        Args:
            arguments: of the command line.
            world: how many.
            pause: seconds before each pack.
            fail: the process that finds no room for its first pack.
            fault: a function of `tests.helpers.faults` that each calls with its rank before it begins.
        """
        self.starts += 1
        self.log = self.folder / f"{self.starts}.txt"
        self.log.write_text("")
        words = [str(word) for word in arguments]
        options = {"log": str(self.log), "world": world, "pause": pause, "fail": fail, "fault": fault}
        return self._asked(do="start", arguments=words, **options)

    def wait(self, pids: list[int], launched: bool = True) -> list[int]:
        """Their exit codes; without a launcher nobody ends the others when one has failed."""
        return self._asked(do="wait", pids=pids, seconds=PATIENCE, launched=launched)

    def run(self, *arguments: object, launched: bool = True, **options: Any) -> tuple[list[int], str]:
        """Exit codes of processes that ran to their end, and all that they said; for options see `start`."""
        codes = self.wait(self.start(*arguments, **options), launched)
        return codes, self.log.read_text()

    def _asked(self, **request: object) -> list[int]:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())
