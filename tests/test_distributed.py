"""One run in several processes: the records of one process, whatever is shared out and whoever fails."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

import fasttrace
from fasttrace import PlanError, StoreError, distributed
from fasttrace.cells import grid_cells
from fasttrace.datasets import read_facts
from fasttrace.distributed import CLAIMS, STALE_SECONDS, CellSharded, Claims, Ranks, claims, shares_of_cells
from fasttrace.many import study_of
from fasttrace.runs import run
from fasttrace.stores import Store
from tests.conftest import all_grids, make_job
from tests.run_facts import (
    FLAGS,
    OPTIONS,
    SMALL,
    Launcher,
    assert_same_numbers,
    facts_of,
    finished,
    known_and_unknown,
    one_of_each,
    save_model,
    torchrun,
    write_facts,
)
from tests.test_api import tracer_with_text

FACTS = facts_of(60)
STREAMS = ("block_output", "mlp_activation", "attention_output")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and facts."""
    path = tmp_path_factory.mktemp("home")
    save_model(path / "model")
    write_facts(path / "facts.jsonl", FACTS)
    return path


@pytest.fixture(scope="module")
def tracer(home):
    return fasttrace.Tracer.from_pretrained(str(home / "model"), device="cpu")


@pytest.fixture(scope="module")
def alone(home, tracer, tmp_path_factory):
    """The records of one process."""
    facts = read_facts(home / "facts.jsonl")
    return one_of_each(run(tracer, facts, tmp_path_factory.mktemp("alone"), budget=SMALL, **OPTIONS).store)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with Launcher(tmp_path_factory.mktemp("launcher")) as made:
        yield made


def arguments(home, out, *others):
    return ("run", "--model", home / "model", "--facts", home / "facts.jsonl", "--out", out, *FLAGS, *others)


def ranks_in(out):
    return {path.name[:8] for path in (out / "parts").iterdir()}


# Real launchers.


def test_torchrun_gives_the_records_of_one_process_bit_for_bit_and_one_process_speaks(home, tmp_path, alone):
    done = finished(*torchrun(), "fasttrace", *arguments(home, tmp_path, "--budget", SMALL))
    assert done.returncode == 0, done.stderr[-4000:]
    assert one_of_each(Store.read(tmp_path)) == alone
    assert ranks_in(tmp_path) == {"part-000", "part-001"}
    assert done.stdout.splitlines()[0] == f"60 facts traced, 0 skipped: {tmp_path}"
    assert len(done.stdout.splitlines()) == 2
    for said in ("loading ", "0 of 60 facts, 0 skipped\n", "\n60 of 60 facts"):
        assert done.stderr.count(said) == 1, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "parts"]


def test_accelerate_launch_shares_facts_out_too(home, tmp_path, alone):
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2)
    settings = ("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0)
    done = finished(*launch, *settings, "-m", "fasttrace", *arguments(home, tmp_path, "--budget", SMALL))
    assert done.returncode == 0, done.stderr[-4000:]
    assert one_of_each(Store.read(tmp_path)) == alone
    assert ranks_in(tmp_path) == {"part-000", "part-001"}
    assert done.stdout.count("60 facts traced") == 1


def test_a_process_that_dies_at_its_start_ends_the_launch_with_an_error(home, tmp_path):
    script = "import os, sys; os.environ['RANK'] == '1' and os._exit(7); from fasttrace.cli import app; app()"
    launch = (*torchrun()[:-1], "--no-python", sys.executable, "-c", script)
    done = finished(*launch, *arguments(home, tmp_path / "run"))
    assert done.returncode not in (0, None)
    assert "exitcode" in done.stderr
    assert not (tmp_path / "run").exists()


# Processes that a launcher of the tests forks.


def test_shared_cells_give_the_grids_of_one_process(home, tmp_path, alone, launcher):
    codes, said = launcher.run(*arguments(home, tmp_path, "--limit", 24, "--shard", "cells"))
    assert codes == [0, 0], said
    assert_same_numbers(one_of_each(Store.read(tmp_path)), {str(number): alone[str(number)] for number in range(24)})
    assert ranks_in(tmp_path) == {"part-000"}
    assert said.count("24 facts traced") == said.count("24 of 24 facts") == 1


@pytest.mark.parametrize("shard", ["facts", "cells"])
def test_three_processes_agree_on_what_the_model_knows(home, tmp_path, tracer, launcher, shard):
    facts = known_and_unknown(tracer)
    write_facts(tmp_path / "facts.jsonl", facts)
    options = OPTIONS | {"budget": SMALL, "require_correct": True}
    expected = run(tracer, read_facts(tmp_path / "facts.jsonl"), tmp_path / "alone", **options)
    flags = (*FLAGS, "--budget", SMALL, "--require-correct", "--shard", shard)
    request = ("run", "--model", home / "model", "--facts", tmp_path / "facts.jsonl", "--out", tmp_path / "run", *flags)
    for before in ("", f" ({len(facts)} were there before)"):
        codes, said = launcher.run(*request, world=3)
        assert codes == [0, 0, 0], said
        assert said.count(f"{expected.traced} facts traced, {expected.skipped} skipped{before}: ") == 1
        found = one_of_each(Store.read(tmp_path / "run"))
        assert_same_numbers(found, one_of_each(expected.store))
        assert shard == "cells" or found == one_of_each(expected.store)
    assert ranks_in(tmp_path / "run") == {"part-000", "part-001", "part-002"}


def test_more_processes_than_packs_leave_some_with_nothing_to_do(home, tmp_path, alone, launcher):
    codes, said = launcher.run(*arguments(home, tmp_path, "--limit", 2), world=3)
    assert codes == [0, 0, 0], said
    assert_same_numbers(one_of_each(Store.read(tmp_path)), {name: alone[name] for name in "01"})


def test_an_error_of_the_first_process_reaches_all(home, tmp_path, launcher):
    assert launcher.run(*arguments(home, tmp_path, "--limit", 2))[0] == [0, 0]
    codes, said = launcher.run(*arguments(home, tmp_path, "--limit", 2, "--seed", 5))
    assert 2 in codes
    assert 0 not in codes
    assert "error: " in said
    assert "holds another run (seed 1 there, 5 here)" in said


@pytest.mark.parametrize("shard", ["facts", "cells"])
def test_an_error_of_one_process_at_work_ends_the_launch(home, tmp_path, launcher, shard):
    """The second process finds no room for its part."""
    codes = launcher.wait(launcher.start(*arguments(home, tmp_path, "--shard", shard), fail=1))
    assert 0 not in codes
    assert "no room for this" in launcher.log.read_text()


def test_a_model_that_is_not_there_ends_the_launch(home, tmp_path, launcher):
    codes, said = launcher.run("run", "--model", tmp_path / "none", "--facts", home / "facts.jsonl", "--out", tmp_path)
    assert 0 not in codes
    assert said.count("error: ") == 1
    assert "is not a local folder" in said


def test_one_process_speaks_of_rows_that_are_no_facts(home, tmp_path, launcher):
    (tmp_path / "facts.jsonl").write_text((home / "facts.jsonl").read_text() + json.dumps({"prompt": "x"}) + "\n")
    request = ("run", "--model", home / "model", "--facts", tmp_path / "facts.jsonl", "--out", tmp_path / "run", *FLAGS)
    codes, said = launcher.run(*request)
    assert codes == [0, 0], said
    assert said.count("skipped 1 of 61 rows") == 1
    assert said.count("malformed rows of facts.jsonl, skipped: 1") == 1


# Ranks.


def test_a_process_that_is_alone_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.current()
    assert (ranks.rank, ranks.world, ranks.is_first, ranks.device) == (0, 1, True, "auto")
    assert ranks.first(lambda: 5) == ranks.in_turn(lambda: 5) == 5
    assert ranks.all(lambda: 5) == [5]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Ranks.current() == ranks


@pytest.mark.parametrize("ask", [Ranks().first, Ranks().all, Ranks().in_turn])
def test_errors_of_a_process_that_is_alone_are_its_own(ask):
    with pytest.raises(ZeroDivisionError):
        ask(lambda: 1 // 0)


@pytest.mark.parametrize("gpus", [False, True])
def test_without_gpus_processes_meet_on_the_cpu_although_nobody_says_so(monkeypatch, gpus):
    asked = []

    class State:
        process_index, num_processes = 1, 2

        def __init__(self, cpu):
            asked.append(cpu)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "PartialState", State)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    assert Ranks.current() == Ranks(1, 2)
    assert Ranks.current(cpu=True) == Ranks(1, 2)
    assert asked == [not gpus, True]


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    class State:
        process_index, num_processes = 0, 1

        def __init__(self, cpu):
            pass

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(distributed, "PartialState", State)
    with pytest.raises(PlanError, match="started 4 processes, of which this one sees 1"):
        Ranks.current()


# Claims.


def test_threads_never_take_the_same_number(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: list(Claims(tmp_path).taken(200)), range(8)))
    assert sorted(number for numbers in taken for number in numbers) == list(range(200))


def _taken(folder):
    return list(Claims(Path(folder)).taken(200))


def test_processes_never_take_the_same_number(tmp_path):
    with get_context("fork").Pool(4) as pool:
        taken = pool.map(_taken, [str(tmp_path)] * 4, chunksize=1)
    assert sorted(number for numbers in taken for number in numbers) == list(range(200))


def test_the_lowest_free_number_is_taken_and_only_finished_ones_are_told(tmp_path):
    first, second = Claims(tmp_path).taken(4), Claims(tmp_path).taken(4)
    assert [next(first), next(second), next(first)] == [0, 1, 2]
    assert Claims(tmp_path).finished() == frozenset()
    for number in (1, 2, 2):
        Claims(tmp_path).finish(number)
    assert Claims(tmp_path).finished() == {1, 2}
    assert list(second) == [3]
    assert list(first) == []


def test_claims_in_a_folder_that_is_gone_say_what_to_do(tmp_path):
    with pytest.raises(StoreError, match=r"cannot write to .*start the same run again"):
        next(Claims(tmp_path / "none").taken(1))
    with pytest.raises(StoreError, match=r"cannot write to .*give another folder"), claims(Ranks(), tmp_path / "none"):
        pass


def test_claims_are_removed_at_the_end_also_after_an_error(tmp_path):
    with claims(Ranks(), tmp_path) as made:
        assert list(made.taken(2)) == [0, 1]
        assert made.folder.is_dir()
    with pytest.raises(KeyboardInterrupt), claims(Ranks(), tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_only_claims_of_runs_that_must_be_dead_are_removed_by_another(tmp_path):
    old, young = tmp_path / f"{CLAIMS}old", tmp_path / f"{CLAIMS}young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "0.taken").touch()
    before = old.stat().st_mtime - STALE_SECONDS - 60
    os.utime(old, (before, before))
    with claims(Ranks(), tmp_path):
        assert not old.exists()
    assert [path.name for path in tmp_path.iterdir()] == [young.name]


# Cells.


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("positions", "begin"), [(12, 1), (30, 4)])
def test_shares_of_cells_are_a_partition_of_about_equal_work(world, positions, begin):
    job = make_job(positions, (begin, begin + 2), 2, all_grids(STREAMS, 3, positions))
    shares = shares_of_cells(job, 4, world)
    assert len(shares) == world
    assert sorted(np.concatenate(shares)) == list(range(len(job.cells)))
    work = [sum(_work(job.cells[number], 4, positions) for number in share) for share in shares]
    assert max(work) - min(work) <= 2 * 4 * positions


def _work(cell, n_layers, n_positions):
    first = min(cell, key=lambda edit: edit.layer)
    return (n_layers - first.layer) * (n_positions - first.position)


def test_a_column_is_cut_at_most_once_a_process(tmp_path):
    job = make_job(12, (1, 3), 2, all_grids(STREAMS, 3, 12))
    shares = shares_of_cells(job, 4, 3)
    columns = [{job.cells[number][0].position for number in share} for share in shares]
    assert len(columns[0] & columns[1]) <= 1
    assert len(columns[1] & columns[2]) <= 1
    assert not columns[0] & columns[2]


@pytest.mark.parametrize("cells", [(), grid_cells("block_output", 1, 4, 1)[:2]], ids=["none", "two"])
def test_shares_may_be_empty(cells):
    shares = shares_of_cells(make_job(1, (0, 1), 1, tuple(cells)), 4, 3)
    assert sorted(np.concatenate(shares)) == list(range(len(cells)))
    assert len(shares) == 3


@pytest.mark.parametrize("world", [2, 5, 40])
def test_cells_of_many_processes_are_joined_in_their_order(monkeypatch, world):
    """Every process's share is computed here, one after the other."""
    tracer = tracer_with_text()
    study, encoded, _ = study_of(tracer, facts_of(2), budget=SMALL, **OPTIONS)
    expected = [record.result for pack in study.packed(encoded) for record in next(study.run([pack]))]

    def all_of(ranks, work):
        found = []
        for rank in range(world):
            monkeypatch.setitem(vars(study.ranks), "rank", rank)
            found.append(work())
        return found

    monkeypatch.setattr(Ranks, "all", all_of)
    values = {name: getattr(study, name) for name in ("sweep", "encode", "fuse", "budget")}
    study = CellSharded(**values, ranks=Ranks(0, world))
    found = [records[0].result for records in study.run(study.packed(encoded))]
    for result, one in zip(found, expected, strict=True):
        for stream in one.streams:
            np.testing.assert_allclose(result.prob[stream], one.prob[stream], rtol=1e-5)
            np.testing.assert_allclose(result.prob_std[stream], one.prob_std[stream], atol=1e-6)
