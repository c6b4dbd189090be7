"""Runs that are killed, again and again, or that find the disk full: nothing is lost, and nothing is there twice."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

import fasttrace
from fasttrace.facts.dataset import read_facts
from fasttrace.files.writing import TEMPORARY
from fasttrace.runs.claims import CLAIMS
from fasttrace.runs.leases import Worker
from fasttrace.runs.run import run
from fasttrace.runs.store import Store
from tests.helpers.records import flip
from tests.helpers.run_facts import (
    FLAGS,
    OPTIONS,
    PATIENCE,
    SMALL,
    Launcher,
    assert_same_numbers,
    facts_of,
    kill_all,
    one_of_each,
    save_model,
    start,
    torchrun,
    write_facts,
)

pytestmark = pytest.mark.slow

KILLS = 20
FACTS = facts_of(180)
PAUSE = 0.04
"""Seconds that every pack takes longer, as if the model were larger: so that kills hit work."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and facts."""
    path = tmp_path_factory.mktemp("home")
    save_model(path / "model")
    write_facts(path / "facts.jsonl", FACTS)
    return path


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory):
    """The records of a run that nothing happened to."""
    tracer = fasttrace.Tracer.from_pretrained(str(home / "model"), device="cpu")
    facts = read_facts(home / "facts.jsonl")
    return one_of_each(run(tracer, facts, tmp_path_factory.mktemp("undisturbed"), budget=SMALL, **OPTIONS).store)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with Launcher(tmp_path_factory.mktemp("launcher")) as made:
        yield made


def arguments(home, out, *others):
    flags = (*FLAGS, "--budget", SMALL, "--device", "cpu")
    return ("run", "--model", home / "model", "--facts", home / "facts.jsonl", "--out", out, *flags, *others)


def workers_of(out):
    """Tokens of all processes that were at work in a folder, and of those that took packs, once for each."""
    badges = {path.stem for path in out.glob(f"{CLAIMS}*/*.worker")}
    leases = [Worker.read(path) for path in out.glob(f"{CLAIMS}*/*.taken")]
    return badges, [lease.token for lease in leases if lease]


def wait_for_work(pids, out, before, packs):
    """Waits until processes have taken some packs that no earlier start took; False if they ended before."""
    for _ in range(PATIENCE * 500):
        with suppress(FileNotFoundError):
            if len([token for token in workers_of(out)[1] if token not in before]) >= packs:
                return True
        if not any(is_alive(pid) for pid in pids):
            return False
        time.sleep(0.002)
    raise TimeoutError(f"no work within {PATIENCE} seconds")


def is_alive(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def damage_one(out, chance):
    """Cuts or changes a part; gives its name."""
    part = chance.choice(sorted((out / "parts").glob("part-*")))
    size = part.stat().st_size
    if chance.random() < 0.5:
        os.truncate(part, chance.randrange(size))
    else:
        flip(part, chance.randrange(size), chance.randrange(8))
    return part.name


def done_in(out):
    return len(Store.read(out).done) if (out / "manifest.json").exists() else 0


def test_a_run_of_two_processes_survives_twenty_kills_and_damage_between_them(home, tmp_path, undisturbed, launcher):
    chance, at_work, damaged = random.Random(20), 0, []
    for kill in range(KILLS):
        before, _ = workers_of(tmp_path)
        pids = launcher.start(*arguments(home, tmp_path), pause=PAUSE)
        if kill % 5 == 4:  # while the processes meet, load the model, open the store
            time.sleep(chance.uniform(0.05, 1.5))
        elif wait_for_work(pids, tmp_path, before, packs=chance.randrange(1, 9)):
            time.sleep(chance.uniform(0, 2 * PAUSE))
        os.killpg(pids[0], signal.SIGKILL)
        codes = launcher.wait(pids)
        assert set(codes) <= {0, -signal.SIGKILL}, launcher.log.read_text()
        done = done_in(tmp_path)
        at_work += codes == [-signal.SIGKILL] * 2 and done < len(FACTS) and workers_of(tmp_path)[0] > before
        if kill % 4 == 3 and done:
            damaged.append(damage_one(tmp_path, chance))
    codes, said = launcher.run(*arguments(home, tmp_path))
    assert codes == [0, 0], said
    assert at_work >= KILLS // 2
    assert one_of_each(Store.read(tmp_path)) == undisturbed
    assert damaged
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == sorted(damaged)


def test_a_run_on_the_real_command_line_survives_the_kill_of_its_launcher_and_of_all(
    home, tmp_path, undisturbed, launcher
):
    """torchrun's processes outlive it; so the next start works beside those of the one before."""
    command = (*torchrun(), "fasttrace", *arguments(home, tmp_path))
    first = start(*command)
    wait_for_work([first.pid], tmp_path, set(), packs=6)
    orphans = first.children(recursive=True)
    first.kill()
    first.wait()
    before, _ = workers_of(tmp_path)
    second = start(*command)
    try:
        wait_for_work([second.pid], tmp_path, before, packs=6)
    finally:
        kill_all(second)
        for process in orphans:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    codes, said = launcher.run(*arguments(home, tmp_path))
    assert codes == [0, 0], said
    assert "180 facts traced" in said
    assert one_of_each(Store.read(tmp_path)) == undisturbed


# A full disk.


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    options = ("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk)
    if subprocess.run(options, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine lets root mount no tmpfs")
    yield disk
    subprocess.run(("umount", "-l", disk), check=True)


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_is_an_error_that_says_what_to_do_and_the_run_goes_on_when_there_is_room(
    home, undisturbed, small_disk, launcher, world
):
    request = arguments(home, small_disk / "run", "--limit", 60)
    codes, said = launcher.run(*request, world=world)
    assert 2 in codes, said
    assert 0 not in codes
    assert "No space left on device" in said
    assert "free some space or make the folder writable, then start the same run again" in said
    assert "Traceback" not in said
    there = done_in(small_disk / "run")
    assert 0 < there < 60
    # A launcher kills the other process when the first has failed, maybe while it writes: its scratch file is no part.
    names = [path.name for path in (small_disk / "run" / "parts").iterdir()]
    assert all(name.startswith(("part-", TEMPORARY) if world > 1 else "part-") for name in names), names
    subprocess.run(("mount", "-o", "remount,size=64m", small_disk), check=True)
    codes, said = launcher.run(*request, world=world)
    assert codes == [0] * world, said
    assert f"({there} were there before)" in said
    found = one_of_each(Store.read(small_disk / "run"))
    assert_same_numbers(found, {str(number): undisturbed[str(number)] for number in range(60)})
