"""Runs of which one file call fails: the n-th in the run's folder, for one n after the other.

`python -m tests.helpers.file_faults MODEL FACTS WORK FAULT BEGUN FIRST STEP` prints a line of JSON for each n, from
FIRST on, until a run makes no n calls. Every run is a fork that has loaded the model before. It counts files that
are opened, read, written, renamed, linked, removed and synced, folders that are made and listed.
"""

import builtins
import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fasttrace
from fasttrace.facts.dataset import FactSet, read_facts
from fasttrace.results.record import Record
from fasttrace.runs.run import run
from fasttrace.runs.store import Store
from tests.helpers.run_facts import OPTIONS, SMALL, assert_same_numbers, one_of_each

FAULTS = {"full": (errno.ENOSPC, False), "once": (errno.EIO, True)}
"""The error, and whether only one call fails; otherwise all fail from there on that need space."""
CHANGES = ("os.mkdir", "os.link", "os.rename", "write", "os.fsync")
COUNTED = ("open", "read", "os.listdir", "os.scandir", "os.remove", "os.rmdir", *CHANGES)


@dataclass
class Calls:
    """Counts file calls in a folder, and lets one fail, or all from there on."""

    folder: str
    failing: int
    number: int
    once: bool
    made: int = 0

    def count(self, event: str, path: Any, writes: bool) -> None:
        """Called before each."""
        if event not in COUNTED or not str(path).startswith(self.folder) or not (self.once or writes):
            return
        self.made += 1
        if self.made == self.failing or (self.made > self.failing and not self.once):
            raise OSError(self.number, os.strerror(self.number), str(path))

    def install(self) -> None:
        """From now on, for ever."""
        sys.addaudithook(self._heard)
        right_open, right_sync = io.open, os.fsync

        def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = right_open(path, mode, *arguments, **options)
            return Watched(file, str(path), self) if str(path).startswith(self.folder) else file

        def sync(descriptor: int) -> None:
            self.count("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"), True)
            right_sync(descriptor)

        io.open = builtins.open = opened
        os.fsync = sync

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            self.count(event, path, bool(set(mode or "") & set("wxa+")) or bool((flags or 0) & os.O_CREAT))
        elif event in COUNTED and arguments:
            self.count(event, arguments[0], event in CHANGES)


class Watched:
    """An open file whose reading and writing can fail, writing half way."""

    def __init__(self, file: Any, path: str, calls: Calls):
        self._file, self._path, self._calls = file, path, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, *arguments: Any) -> Any:
        self._calls.count("read", self._path, False)
        return self._file.read(*arguments)

    def write(self, content: Any) -> Any:
        try:
            self._calls.count("write", self._path, True)
        except OSError:
            self._file.write(content[: len(content) // 2])
            raise
        return self._file.write(content)


def forked(work: Callable[[], Any], folder: Path) -> Any:
    """What `work` gives as JSON in a process of its own."""
    answer = folder / "answer.json"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            content = json.dumps(work())
            with os.fdopen(os.open(answer, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), "w") as file:
                file.write(content)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "a run ended in something that is no exception"
    return json.loads(answer.read_text())


def tried(tracer: Any, facts: FactSet, out: Path, calls: Calls | None) -> dict[str, Any]:
    """One start of the run: its error, what it said that it wrote, how many calls it made."""
    said, right = [], Store.write

    def write(store: Store, records: Any, **options: Any) -> Path:
        path = right(store, records, **options)
        said.extend(record.fact.id for record in records)
        return path

    Store.write = write
    error = None
    if calls is not None:
        calls.install()
    try:
        run(tracer, facts, out, progress=lambda told: None, budget=SMALL, **OPTIONS)
    except Exception as raised:
        error = [isinstance(raised, fasttrace.FasttraceError), f"{type(raised).__name__}: {raised}"]
    return {"error": error, "said": said, "calls": 0 if calls is None else calls.made}


def there(out: Path) -> dict[str, Any]:
    """What is in the folder afterwards."""
    if not (out / "manifest.json").exists():
        return {"done": [], "damaged": 0}
    store = Store.read(out)
    return {"done": sorted(store.done), "damaged": len(store.damaged)}


def are_same(found: dict[str, Record], expected: dict[str, Record]) -> bool:
    """Whether numbers agree but for rounding: a run that was begun with other facts makes other packs."""
    try:
        assert_same_numbers(found, expected)
    except AssertionError:
        return False
    return True


def main(model: str, facts_path: str, work: str, fault: str, begun: str, first: str, step: str) -> None:
    """Runs with one failing call after the other."""
    torch.set_num_threads(1)
    tracer, facts, folder = fasttrace.Tracer.from_pretrained(model, device="cpu"), read_facts(facts_path), Path(work)
    tracer.choose_engine()
    expected = one_of_each(run(tracer, facts, folder / "whole", budget=SMALL, **OPTIONS).store)
    if begun == "begun":
        some = FactSet(facts.name, facts.facts[::2])
        run(tracer, some, folder / "begun", budget=SMALL, **OPTIONS)
    number, once = FAULTS[fault]
    failing, made = int(first), sys.maxsize
    while made + int(step) >= failing:
        out = folder / f"run-{failing}"
        if begun == "begun":
            shutil.copytree(folder / "begun", out)
        calls = Calls(str(out), failing, number, once)
        found = forked(lambda out=out, calls=calls: tried(tracer, facts, out, calls), folder)
        made = found["calls"]
        between = forked(lambda out=out: there(out), folder)
        again = forked(lambda out=out: tried(tracer, facts, out, None), folder)
        same = are_same(one_of_each(Store.read(out)), expected)
        line = {"n": failing, **found, **between, "again": again["error"], "same": same}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        shutil.rmtree(out)
        failing += int(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
