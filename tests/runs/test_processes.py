"""One run in several processes: the records of one process, whatever is shared out and whoever fails."""

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import fasttrace
from fasttrace import PlanError
from fasttrace.experiment.cells import grid_cells
from fasttrace.experiment.settings import Settings
from fasttrace.facts.dataset import read_facts
from fasttrace.runs import processes as distributed
from fasttrace.runs.processes import RANK_NAMES, Ranks
from fasttrace.runs.run import run
from fasttrace.runs.shared_cells import SharedCells, shares_of_cells
from fasttrace.runs.store import Store
from tests.conftest import all_grids, make_job
from tests.helpers.run_facts import (
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
from tests.helpers.tracers import tracer_with_text

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_accelerate_launch_shares_facts_out_too(home, tmp_path, alone):
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2)
    settings = ("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0)
    done = finished(*launch, *settings, "-m", "fasttrace", *arguments(home, tmp_path, "--budget", SMALL))
    assert done.returncode == 0, done.stderr[-4000:]
    assert one_of_each(Store.read(tmp_path)) == alone
    assert ranks_in(tmp_path) == {"part-000", "part-001"}
    assert done.stdout.count("60 facts traced") == 1


@pytest.mark.slow
def test_a_process_that_dies_at_its_start_ends_the_launch_with_an_error(home, tmp_path):
    script = "import os, sys; os.environ['RANK'] == '1' and os._exit(7); from fasttrace.cli.app import app; app()"
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

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "PartialState", State)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks.current() == Ranks(1, 2)
    assert Ranks.current(cpu=True) == Ranks(1, 2)
    assert asked == [not gpus, True]


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    class State:
        process_index, num_processes = 0, 1

        def __init__(self, cpu):
            pass

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(distributed, "PartialState", State)
    with pytest.raises(PlanError, match="started 4 processes, of which this one sees 1"):
        Ranks.current()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x' in the environment: expected a whole number >= 1"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2", "RANK": "two"}, "RANK is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1' in the environment: expected a whole number >= 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2: expected 0 to 1"),
        ({"WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "5"}, "OMPI_COMM_WORLD_RANK is 5, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "gpu1"}, "LOCAL_RANK is 'gpu1'"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "cannot meet"),
    ],
)
def test_a_launchers_variables_that_make_no_sense_are_named(monkeypatch, variables, message):
    _set(monkeypatch, variables)
    with pytest.raises(PlanError, match=message):
        Ranks.current(cpu=True)


@pytest.mark.parametrize(
    ("gpus", "variables", "message"),
    [
        (2, {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but there are 2 GPUs here"),
        (1, {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but there is 1 GPU here"),
        (1, {"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "2"}, None),
        (4, {"LOCAL_RANK": "2"}, None),
        (4, {}, "WORLD_SIZE is 4, but LOCAL_RANK is not set"),
        (0, {"LOCAL_RANK": "2"}, None),
        (0, {}, None),
    ],
)
def test_every_process_needs_a_gpu_where_there_are_any(monkeypatch, gpus, variables, message):
    class State:
        process_index, num_processes = 2, 4

        def __init__(self, cpu):
            pass

    monkeypatch.setattr(distributed, "PartialState", State)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    _set(monkeypatch, {"WORLD_SIZE": "4", "RANK": "2"} | variables)
    assert Ranks.current(cpu=True) == Ranks(2, 4)
    if message is None:
        assert Ranks.current() == Ranks(2, 4)
    else:
        with pytest.raises(PlanError, match=message):
            Ranks.current()


@pytest.mark.parametrize(("variables", "said"), [({"WORLD_SIZE": ""}, ""), ({"WORLD_SIZE": "8"}, "taken as left over")])
def test_a_world_that_no_launcher_made_is_a_process_alone(monkeypatch, caplog, variables, said):
    _set(monkeypatch, variables)
    assert Ranks.current() == Ranks()
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


def _set(monkeypatch, variables):
    """These variables of a launcher and no others; accelerate adds some, which do not outlive the test."""
    names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", *RANK_NAMES)
    kept = {name: value for name, value in os.environ.items() if name not in names}
    monkeypatch.setattr(os, "environ", kept | variables)


# A process that is lost, of those that no launcher ends.


@pytest.mark.parametrize(("shard", "world"), [("facts", 2), ("facts", 3), ("cells", 2)])
def test_a_process_that_dies_is_one_line_for_the_others_and_the_same_command_goes_on(
    home, tmp_path, alone, launcher, shard, world
):
    request = arguments(home, tmp_path, "--budget", SMALL, "--shard", shard)
    codes, said = launcher.run(*request, world=world, launched=False, fault="second_is_killed", pause=0.05)
    assert codes == [2, -9, 2][:world], said
    assert said.count("error: a process was lost (") == world - 1
    assert "start the same command again: it goes on where it stopped" in said
    assert "Traceback" not in said
    before = len(Store.read(tmp_path).done)
    assert before > 0
    codes, said = launcher.run(*request, world=world)
    assert codes == [0] * world, said
    assert f"({before} were there before)" in said
    found = one_of_each(Store.read(tmp_path))
    assert_same_numbers(found, alone)


def test_a_process_without_memory_is_one_line_for_the_others(home, tmp_path, launcher):
    request = arguments(home, tmp_path, "--shard", "cells")
    codes, said = launcher.run(*request, launched=False, fault="no_memory_in_the_second")
    assert codes[0] == 2
    assert codes[1] != 0
    assert "MemoryError" in said
    assert "lost" not in said


def test_an_interrupted_process_does_not_keep_the_others_waiting(home, tmp_path, launcher):
    codes, said = launcher.run(*arguments(home, tmp_path), launched=False, fault="interrupt_in_the_second", pause=0.05)
    assert codes == [2, 130]
    assert "interrupted: " in said
    assert "a process was lost" in said
    assert "Traceback" not in said


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
    study, encoded, _ = tracer.study_of(read_facts(facts_of(2)), Settings(budget=SMALL, **OPTIONS))
    expected = [record.result for pack in study.packed(encoded) for record in next(study.run([pack]))]

    def all_of(ranks, work):
        found = []
        for rank in range(world):
            monkeypatch.setitem(vars(study.sharing.ranks), "rank", rank)
            found.append(work())
        return found

    monkeypatch.setattr(Ranks, "all", all_of)
    study = replace(study, sharing=SharedCells(Ranks(0, world)))
    found = [records[0].result for records in study.run(study.packed(encoded))]
    for result, one in zip(found, expected, strict=True):
        for stream in one.streams:
            np.testing.assert_allclose(result.prob[stream], one.prob[stream], rtol=1e-5)
            np.testing.assert_allclose(result.prob_std[stream], one.prob_std[stream], atol=1e-6)
