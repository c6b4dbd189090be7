"""Claims: starts share the work of one folder, and nothing that becomes of a claim loses a fact."""

import dataclasses
import logging
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import fasttrace
from fasttrace.facts.dataset import read_facts
from fasttrace.files.writing import clock_of, remove_stale, write_new
from fasttrace.runs import claims as claims_module
from fasttrace.runs import leases
from fasttrace.runs import processes as distributed
from fasttrace.runs.claims import CLAIMS, Claims, claims
from fasttrace.runs.leases import LEASE_SECONDS, Badge, Worker, workers_in
from fasttrace.runs.processes import Patience, Ranks
from fasttrace.runs.run import _Run, run
from fasttrace.runs.store import Store
from tests.helpers.run_facts import FLAGS, OPTIONS, SMALL, Launcher, facts_of, one_of_each, save_model, write_facts
from tests.helpers.tracers import tracer_with_text

FACTS = facts_of(60)
DAY = 25 * 3600.0
ELSEWHERE = ("another host", "another boot", "pid:[1]")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and facts."""
    path = tmp_path_factory.mktemp("home")
    save_model(path / "model")
    write_facts(path / "facts.jsonl", FACTS)
    return path


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with Launcher(tmp_path_factory.mktemp("launcher")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(home, launcher, tmp_path_factory):
    """The records of a run that nothing happened to, by a process like those that are compared with it.

    Not by this one: what tests before have left in it, such as the library that multiplies, rounds otherwise.
    """
    out = tmp_path_factory.mktemp("undisturbed")
    assert launcher.run(*arguments(home, out), world=1)[0] == [0]
    return one_of_each(Store.read(out))


def arguments(home, out, *others):
    flags = (*FLAGS, "--budget", SMALL, "--device", "cpu")
    return ("run", "--model", home / "model", "--facts", home / "facts.jsonl", "--out", out, *flags, *others)


def rows_in(out):
    """How many facts were computed, those that are there twice twice."""
    store = Store.read(out)
    assert store.damaged == ()
    return sum(map(len, store.seen.values()))


def entered(folder, **options):
    made = Claims(folder, **options)
    made.enter()
    return made


def forged(folder, number=None, age=0.0, **changes):
    """A process of another start, by its badge, and its lease."""
    worker = dataclasses.replace(Worker.here(), **changes)
    folder.mkdir(exist_ok=True)
    badge = folder / f"{worker.token}.worker"
    badge.write_bytes(worker.content)
    moment = clock_of(folder) - age
    os.utime(badge, (moment, moment))
    if number is not None:
        (folder / f"{number}.taken").write_bytes(worker.content)
    return worker


# Starts that do not know of each other.


@pytest.mark.parametrize("starts", [2, 3])
def test_starts_on_one_folder_share_the_work_and_say_so(home, tmp_path, undisturbed, launcher, starts):
    work = []
    for _ in range(starts):
        work.append((launcher.start(*arguments(home, tmp_path), world=1, pause=0.15), launcher.log))
    for pids, log in work:
        assert launcher.wait(pids) == [0], log.read_text()
    assert rows_in(tmp_path) == len(FACTS)
    assert one_of_each(Store.read(tmp_path)) == undisturbed
    assert "at work in" in "".join(log.read_text() for _, log in work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "parts"]


def test_a_start_that_comes_at_the_last_pack_waits_for_it(home, tmp_path, undisturbed, launcher):
    first = launcher.start(*arguments(home, tmp_path), world=1, pause=0.1)
    _wait_for(lambda: len(Store.read(tmp_path).done) >= len(FACTS) - 12, tmp_path)
    assert launcher.run(*arguments(home, tmp_path), world=1)[0] == [0]
    assert launcher.wait(first) == [0]
    assert rows_in(tmp_path) <= len(FACTS) + 10
    assert one_of_each(Store.read(tmp_path)) == undisturbed


def test_two_starts_of_two_processes_share_the_cells_of_prompts(home, tmp_path, launcher):
    request = arguments(home, tmp_path, "--shard", "cells", "--limit", 20)
    first = launcher.start(*request, pause=0.05)
    second = launcher.start(*request, pause=0.05)
    assert launcher.wait(first) == launcher.wait(second) == [0, 0], launcher.log.read_text()
    assert rows_in(tmp_path) == 20


def test_a_start_with_other_facts_says_who_is_at_work(home, tmp_path, launcher):
    first = launcher.start(*arguments(home, tmp_path), world=1, pause=0.2)
    _wait_for(lambda: any(tmp_path.glob(f"{CLAIMS}*/*.taken")), tmp_path)
    codes, said = launcher.run(*arguments(home, tmp_path, "--limit", 5), world=1)
    assert (codes, launcher.wait(first)) == ([0], [0])
    assert f"process {first[0]} on " in said
    assert "with other facts or another budget or engine" in said


def test_a_killed_start_leaves_its_packs_to_the_other(home, tmp_path, undisturbed, launcher):
    first = launcher.start(*arguments(home, tmp_path), world=1, pause=0.1)
    second = launcher.start(*arguments(home, tmp_path), world=1, pause=0.1)
    _wait_for(lambda: len(Store.read(tmp_path).done) >= 20, tmp_path)
    os.kill(first[0], signal.SIGKILL)
    launcher.wait(first)
    assert launcher.wait(second) == [0], launcher.log.read_text()
    assert one_of_each(Store.read(tmp_path)) == undisturbed
    assert rows_in(tmp_path) == len(FACTS)


def test_an_interrupted_start_leaves_its_packs_to_the_other(home, tmp_path, undisturbed, launcher):
    first = launcher.start(*arguments(home, tmp_path), world=1, pause=0.1)
    codes, said = launcher.run(*arguments(home, tmp_path), world=1, fault="interrupted")
    assert codes == [130], said
    assert launcher.wait(first) == [0]
    assert one_of_each(Store.read(tmp_path)) == undisturbed
    assert rows_in(tmp_path) == len(FACTS)


def test_a_start_that_is_stopped_for_longer_than_its_lease_goes_on_and_spoils_nothing(
    home, tmp_path, undisturbed, launcher
):
    first = launcher.start(*arguments(home, tmp_path), world=1, pause=0.1, fault="short_leases")
    _wait_for(lambda: len(Store.read(tmp_path).done) >= 10, tmp_path)
    os.kill(first[0], signal.SIGSTOP)
    codes, said = launcher.run(*arguments(home, tmp_path), world=1)
    assert codes == [0], said
    assert len(Store.read(tmp_path).done) == len(FACTS)
    os.kill(first[0], signal.SIGCONT)
    assert launcher.wait(first) == [0]
    assert rows_in(tmp_path) <= len(FACTS) + 20
    assert one_of_each(Store.read(tmp_path)) == undisturbed


def _wait_for(true, out):
    for _ in range(6000):
        if (out / "manifest.json").exists() and true():
            return
        time.sleep(0.01)
    raise TimeoutError("nothing happened")


# Clocks, NFS, and folders in which claims do not work.


@pytest.mark.parametrize("fault", ["clock_ahead", "clock_behind"])
def test_clocks_hours_apart_disturb_nobody(home, tmp_path, undisturbed, launcher, fault):
    first = launcher.start(*arguments(home, tmp_path), world=1, pause=0.1)
    _wait_for(lambda: any(tmp_path.glob(f"{CLAIMS}*/2.taken")), tmp_path)
    codes, said = launcher.run(*arguments(home, tmp_path), world=1, fault=fault)
    assert codes == launcher.wait(first) == [0], said
    assert rows_in(tmp_path) == len(FACTS)
    assert one_of_each(Store.read(tmp_path)) == undisturbed


@pytest.mark.parametrize("fault", ["answered_twice", "old_listings", "without_links", "without_claims"])
@pytest.mark.parametrize("world", [1, 2])
def test_what_a_file_system_answers_loses_no_fact_and_doubles_none(home, tmp_path, undisturbed, launcher, fault, world):
    codes, said = launcher.run(*arguments(home, tmp_path), world=world, fault=fault)
    assert codes == [0] * world, said
    assert rows_in(tmp_path) == len(FACTS)
    assert one_of_each(Store.read(tmp_path)) == undisturbed
    assert ("shares no work" in said) == (fault == "without_claims")


@pytest.mark.parametrize("fault", ["answered_twice", "old_listings", "without_links", "without_claims"])
def test_what_a_file_system_answers_to_one_of_two_starts_loses_no_fact(home, tmp_path, undisturbed, launcher, fault):
    first = launcher.start(*arguments(home, tmp_path), world=1, pause=0.1)
    codes, said = launcher.run(*arguments(home, tmp_path), world=1, fault=fault)
    assert codes == launcher.wait(first) == [0], said
    assert one_of_each(Store.read(tmp_path)) == undisturbed


def test_claims_that_are_deleted_at_work_are_made_again(home, tmp_path, undisturbed, launcher):
    pids = launcher.start(*arguments(home, tmp_path), pause=0.1)
    chance = random.Random(1)
    for _ in range(3):
        _wait_for(lambda: any(tmp_path.glob(f"{CLAIMS}*/*.done")), tmp_path)
        for folder in tmp_path.glob(f"{CLAIMS}*"):
            folder.rename(tmp_path / f"gone-{chance.random()}")
    assert launcher.wait(pids) == [0, 0], launcher.log.read_text()
    assert one_of_each(Store.read(tmp_path)) == undisturbed


def test_a_file_that_was_made_although_the_answer_is_that_it_was_there_counts_as_made(tmp_path, monkeypatch):
    right_link, right_replace = os.link, os.replace

    def link(source, target):
        right_link(source, target)
        raise FileExistsError(17, "File exists")

    def replace(source, target):
        right_replace(source, target)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "link", link)
    assert write_new(tmp_path / "a", b"1")
    monkeypatch.setattr(os, "link", right_link)
    assert not write_new(tmp_path / "a", b"2")
    monkeypatch.setattr(os, "replace", replace)
    with fasttrace.files.writing.atomic_write(tmp_path / "b") as temporary:
        temporary.write_bytes(b"3")
    assert [(path.name, path.read_bytes()) for path in sorted(tmp_path.iterdir())] == [("a", b"1"), ("b", b"3")]


def test_a_file_that_is_there_is_not_replaced_where_a_look_still_says_that_it_is_not(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"1")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert not write_new(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


@pytest.mark.parametrize("hours", [-25, 25])
def test_temporary_files_of_living_processes_stay_whatever_this_machines_clock_says(tmp_path, monkeypatch, hours):
    young, old = tmp_path / ".fasttrace-young", tmp_path / ".fasttrace-old"
    for path in (young, old):
        path.touch()
    os.utime(old, (clock_of(tmp_path) - 7200,) * 2)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + hours * 3600)
    remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [young.name]


# Who is at work.


def test_a_process_of_this_machine_is_gone_when_its_number_is_free_or_anothers(tmp_path):
    assert not Worker.here().is_gone()
    ended = get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    assert dataclasses.replace(Worker.here(), pid=ended.pid).is_gone()
    assert dataclasses.replace(Worker.here(), began=Worker.here().began - 3600).is_gone()


def test_of_another_machine_a_process_with_the_number_of_one_that_is_gone_here_counts_by_its_badge(tmp_path):
    ended = get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    for place in (ELSEWHERE, (*Worker.here().place[:-1], "pid:[1]")):
        worker = forged(tmp_path, place=place, pid=ended.pid)
        now = clock_of(tmp_path)
        assert worker.may_live(tmp_path, now)
        assert worker.may_live(tmp_path, now + LEASE_SECONDS - 5)
        assert not worker.may_live(tmp_path, now + LEASE_SECONDS + 5)
        (tmp_path / f"{worker.token}.worker").unlink()
        assert not worker.may_live(tmp_path, now)


def test_a_badge_is_kept_young(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.02)
    badge = Badge(tmp_path / "claims")
    badge.enter()
    path = tmp_path / "claims" / f"{badge.worker.token}.worker"
    os.utime(path, (1, 1))
    for _ in range(1000):
        if path.stat().st_mtime > 1:
            break
        time.sleep(0.01)
    assert clock_of(tmp_path) - path.stat().st_mtime < LEASE_SECONDS
    assert Worker.read(path) == badge.worker
    badge.leave()
    assert list((tmp_path / "claims").iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[1]", b'{"token": "../x", "place": [], "pid": 1, "began": 0}', b"[" * 100_000]
)
def test_a_badge_that_is_none_is_nobodys(tmp_path, content):
    (tmp_path / "x.worker").write_bytes(content)
    assert Worker.read(tmp_path / "x.worker") is None
    assert workers_in(tmp_path) == []


# Claims.


def test_threads_never_take_the_same_number(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: list(entered(tmp_path / "claims").taken(range(200))), range(8)))
    assert sorted(number for numbers in taken for number in numbers) == list(range(200))


def _taken(folder):
    return list(entered(Path(folder)).taken(range(200)))


def test_processes_never_take_the_same_number(tmp_path):
    with get_context("fork").Pool(4) as pool:
        taken = pool.map(_taken, [str(tmp_path / "claims")] * 4, chunksize=1)
    assert sorted(number for numbers in taken for number in numbers) == list(range(200))


def test_the_lowest_free_number_is_taken_and_only_finished_ones_are_told(tmp_path):
    made = entered(tmp_path / "claims")
    first, second = made.taken(range(4)), entered(tmp_path / "claims").taken(range(4))
    assert [next(first), next(second), next(first)] == [0, 1, 2]
    assert made.finished() == frozenset()
    for number in (1, 2, 2):
        made.finish(number, f"part-{number}")
    assert made.finished() == {1, 2}
    assert [made.part(number) for number in range(4)] == ["", "part-1", "part-2", ""]
    assert list(second) == [3]
    assert list(first) == []


def test_numbers_are_held_by_who_may_be_at_work_on_them_and_is_not_done(tmp_path):
    folder = tmp_path / "claims"
    made = entered(folder)
    assert list(made.taken([0])) == [0]
    living = forged(folder, 1, token="aa", place=ELSEWHERE)
    forged(folder, 2, token="bb", place=ELSEWHERE, age=DAY)
    forged(folder, 3, token="cc", pid=2**22 + 1)
    forged(folder, 4, token="dd", place=ELSEWHERE)
    made.finish(4, "part")
    (folder / "5.taken").touch()
    assert made.holders(range(7)) == {1: living}
    assert list(made.taken_over([1, 6])) == [1, 6]
    assert made.holders(range(7)) == {}


@pytest.mark.parametrize("world", [1, 3])
def test_where_no_claims_can_be_made_processes_take_what_falls_to_them(tmp_path, caplog, world):
    (tmp_path / "claims").write_text("a file is in the way")
    with caplog.at_level(logging.WARNING, "fasttrace"):
        taken = [list(entered(tmp_path / "claims", rank=rank, world=world).taken(range(8))) for rank in range(world)]
    assert sorted(number for numbers in taken for number in numbers) == list(range(8))
    assert caplog.text.count("shares no work") == world


def test_packs_are_those_of_whoever_was_first_unless_they_make_no_sense(tmp_path):
    first, second = entered(tmp_path / "claims"), entered(tmp_path / "claims")
    assert first.agreed([["1", "2"]]) == [["1", "2"]]
    assert second.agreed([["1"], ["2"]]) == [["1", "2"]]
    for nonsense in ("", "[", "{}", "[1]", "[[1]]", '["12"]', "[" * 100_000):
        (tmp_path / "claims" / claims_module.PACKS).write_text(nonsense)
        assert second.agreed([["1"], ["2"]]) == [["1"], ["2"]]


def test_claims_are_removed_at_the_end_also_after_an_error_but_not_under_another_start(tmp_path):
    with claims(Ranks(), tmp_path) as made:
        assert list(made.taken(range(2))) == [0, 1]
        assert made.folder.is_dir()
        with claims(Ranks(), tmp_path) as other:
            assert list(other.taken(range(3))) == [2]
        assert made.folder.is_dir()
        assert made.part(0) == ""
    with pytest.raises(KeyboardInterrupt), claims(Ranks(), tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_only_claims_of_the_dead_are_removed_by_another_start(tmp_path, monkeypatch):
    forged(tmp_path / f"{CLAIMS}killed", pid=2**22 + 1)
    forged(tmp_path / f"{CLAIMS}old", place=ELSEWHERE, age=DAY)
    forged(tmp_path / f"{CLAIMS}at-work", place=ELSEWHERE, age=LEASE_SECONDS - 5)
    forged(tmp_path / f"{CLAIMS}stopped", age=DAY)
    for name, age in {"begins": 0.0, "empty": DAY}.items():
        (tmp_path / f"{CLAIMS}{name}").mkdir()
        os.utime(tmp_path / f"{CLAIMS}{name}", (clock_of(tmp_path) - age,) * 2)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + DAY)
    with claims(Ranks(), tmp_path, "mine"):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"{CLAIMS}{name}" for name in ("at-work", "begins", "mine", "stopped")]


# Waiting.


def test_waiting_ends_when_nothing_changes_for_longer_than_packs_take(caplog):
    seconds = [0.0]

    def sleep(moment):
        seconds[0] += moment

    holder = dataclasses.replace(Worker.here(), place=("far",), pid=7)
    for longest, expected in ((None, LEASE_SECONDS), (0.1, distributed.SHORT_WAIT), (40.0, 120.0)):
        patience, began = Patience(longest, lambda: seconds[0], sleep), seconds[0]
        with caplog.at_level(logging.WARNING, "fasttrace"):
            assert not patience.is_over({1: holder, 2: holder})
            seconds[0] += expected / 2
            assert not patience.is_over({2: holder})
            while not patience.is_over({2: holder}):
                pass
        assert 1.5 * expected < seconds[0] - began < 1.5 * expected + 2
    assert "process 7 on far is at work on the last packs (2): waiting" in caplog.text


def test_packs_of_a_start_that_hangs_are_computed_by_another(tmp_path, monkeypatch):
    """Its badge stays young, and its packs are never done."""
    monkeypatch.setattr(distributed, "SHORT_WAIT", 0.3)
    tracer, facts = tracer_with_text(), read_facts(facts_of(30))
    whole = run(tracer, facts, tmp_path / "whole", budget=SMALL, **OPTIONS)
    seen = []

    def hang(told):
        if told.done and not seen:
            (folder,) = (tmp_path / "run").glob(f"{CLAIMS}*")
            numbers = [int(path.name.split(".")[0]) for path in folder.glob("*.taken")]
            seen.append(forged(folder, max(numbers) + 1, place=ELSEWHERE))

    found = run(tracer, facts, tmp_path / "run", budget=SMALL, progress=hang, **OPTIONS)
    assert seen
    assert found.traced == 30
    assert one_of_each(found.store) == one_of_each(whole.store)


@pytest.mark.parametrize("mark", ["", "../../manifest.json", "part-000-000000-00000000-0000000000000000.parquet", "\0"])
def test_packs_that_are_only_said_to_be_done_are_computed(tmp_path, mark):
    tracer, facts = tracer_with_text(), read_facts(facts_of(30))
    seen = []

    def lie(told):
        if not seen:
            (folder,) = (tmp_path / "run").glob(f"{CLAIMS}*")
            seen.append(forged(folder, 3, place=ELSEWHERE))
            (folder / "3.done").write_text(mark or " ")

    found = run(tracer, facts, tmp_path / "run", budget=SMALL, progress=lie, **OPTIONS)
    assert seen
    assert (found.traced, rows_in(tmp_path / "run")) == (30, 30)


def test_a_part_is_found_by_its_name_without_a_listing(tmp_path, monkeypatch):
    run(tracer_with_text(), read_facts(facts_of(3)), tmp_path, **OPTIONS)
    (part,) = (tmp_path / "parts").iterdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / part.name).write_bytes(part.read_bytes())
    monkeypatch.setattr(Store, "_paths", lambda store: [])
    store = Store.read(tmp_path)
    assert not store.look(f"../outside/{part.name}")
    assert not store.look(part.name.replace("0", "1"))
    assert store.done == frozenset()
    assert store.look(part.name)
    assert store.done == {"0", "1", "2"}


# Listing.


@pytest.fixture
def listings(monkeypatch):
    """Grows by one with every listing of claims."""
    made = []
    for module, name in ((os, "listdir"), (os, "scandir")):
        right = getattr(module, name)

        def counted(path=".", right=right):
            if CLAIMS in str(path):
                made.append(path)
            return right(path)

        monkeypatch.setattr(module, name, counted)
    return made


def test_a_run_that_shows_nothing_lists_no_claims_for_its_packs(tmp_path, listings):
    tracer, counts = tracer_with_text(), []
    for count in (3, 40):
        listings.clear()
        run(tracer, read_facts(facts_of(count)), tmp_path / str(count), engine="rows", **OPTIONS)
        counts.append(len(listings))
    assert counts[0] == counts[1] < 6


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 0), (0.26, 5), (1.5, 20)])
def test_a_run_that_shows_progress_lists_claims_once_a_second_at_most(
    tmp_path, monkeypatch, listings, seconds, expected
):
    """The clock moves by hand: some seconds from pack to pack."""
    tracer, facts, now, counts, told = tracer_with_text(), read_facts(facts_of(20)), [0.0], [], []
    right = _Run.__init__

    def made(self, *arguments):
        right(self, *arguments, clock=lambda: now[0])

    def progress(each):
        now[0] += seconds
        counts.append(len(listings))
        told.append(each.done)

    monkeypatch.setattr(_Run, "__init__", made)
    run(tracer, facts, tmp_path, engine="rows", progress=progress, **OPTIONS)
    assert told == list(range(21))
    assert abs(counts[-1] - counts[0] - expected) <= 1
