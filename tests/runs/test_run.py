"""Sets of facts traced into a store by one process: complete, equal to single traces, and able to go on."""

import dataclasses
import logging
import re
from dataclasses import replace

import pytest
import torch

import fasttrace
from fasttrace import PlanError, PromptError, StoreError
from fasttrace.facts.dataset import Fact, FactSet, read_facts
from fasttrace.models.identity import digests
from fasttrace.runs import store as stores
from fasttrace.runs.run import run
from fasttrace.runs.store import Store
from tests.helpers.records import flip
from tests.helpers.run_facts import (
    OPTIONS,
    SMALL,
    assert_same_numbers,
    facts_of,
    known_and_unknown,
    one_of_each,
    write_facts,
)
from tests.helpers.tracers import tracer_with_text

FACTS = read_facts(facts_of(30))
SAME = OPTIONS | {"budget": SMALL}


@pytest.fixture(scope="module")
def tracer():
    made = tracer_with_text()
    made.choose_engine()  # its self-check is not what is counted
    return made


@pytest.fixture(scope="module")
def undisturbed(tracer, tmp_path_factory):
    """The records of a run that nothing happened to."""
    return one_of_each(run(tracer, FACTS, tmp_path_factory.mktemp("undisturbed"), **SAME).store)


@pytest.fixture
def forwards(tracer):
    """Grows by one with every forward pass of the model."""
    made = []
    hook = tracer.model.register_forward_pre_hook(lambda *_: made.append(1))
    yield made
    hook.remove()


def changed_tracer():
    """A tracer whose model differs in one weight tensor."""
    tracer = tracer_with_text()
    with torch.no_grad():
        next(tracer.model.parameters()).mul_(1.01)
    return tracer


def stop_after(packs):
    """A progress that interrupts a run after some packs."""

    def progress(told):
        seen.append(told)
        if len(seen) == packs + 1:
            raise KeyboardInterrupt

    seen = []
    return progress


def parts_of(folder):
    return sorted((folder / "parts").iterdir())


# A run, and the same one again.


def test_every_fact_is_there_once_with_the_numbers_of_a_trace_alone(tracer, undisturbed):
    assert [record.fact for record in undisturbed.values()] == list(FACTS)
    alone = {}
    for name, record in undisturbed.items():
        fact = record.fact
        request = {"subject": fact.subject, "target": fact.target, "first_target_token": True}
        alone[name] = dataclasses.replace(record, result=tracer.trace(fact.prompt, **request, **OPTIONS))
    assert_same_numbers(undisturbed, alone)


def test_a_second_run_computes_nothing_and_says_so(tracer, forwards, tmp_path):
    first = run(tracer, FACTS, tmp_path, **SAME)
    assert (first.facts, first.before, first.traced, first.skipped) == (30, 0, 30, 0)
    assert forwards
    forwards.clear()
    parts, told = parts_of(tmp_path), []
    second = run(tracer, FACTS, tmp_path, progress=told.append, **SAME)
    assert (second.facts, second.before, second.traced, second.skipped) == (30, 30, 30, 0)
    assert not forwards
    assert parts_of(tmp_path) == parts
    assert [(each.facts, each.done, each.cells) for each in told] == [(0, 0, 0)]


def test_a_run_with_more_facts_computes_only_those(tracer, tmp_path, undisturbed):
    run(tracer, read_facts(facts_of(12)), tmp_path, **SAME)
    there, told = parts_of(tmp_path), []
    outcome = run(tracer, FACTS, tmp_path, progress=told.append, **SAME)
    assert (outcome.before, outcome.traced) == (12, 30)
    assert told[-1].done == told[-1].facts == 18
    assert set(there) < set(parts_of(tmp_path))
    assert_same_numbers(one_of_each(outcome.store), undisturbed)
    assert outcome.store.description["n_facts"] == 30


def test_a_folder_keeps_its_measured_noise_when_facts_are_added_and_says_so(tracer, tmp_path):
    options = {"samples": 1, "window": 3}
    first = run(tracer, read_facts(facts_of(3)), tmp_path, **options)
    again = run(tracer, read_facts(facts_of(4)), tmp_path, **options)
    assert (again.before, again.traced) == (3, 4)
    assert first.store.notes == ()
    (note,) = again.store.notes
    assert re.fullmatch(r"noise: the folder's sigma 0\.\d+ is kept; the subjects of these facts give 0\.\d+", note)
    metadata = [record.result.metadata for record in again.store.records()]
    assert {each["sigma"] for each in metadata} == {first.store.fingerprint["sigma"]}
    assert [note in each["notes"] for each in metadata] == [False, False, False, True]
    fewer = run(tracer, read_facts(facts_of(2)), tmp_path, **options)
    assert (fewer.before, len(fewer.store.notes)) == (2, 1)


def test_noise_measured_on_another_set_of_facts_is_refused_with_what_to_do(tracer, tmp_path):
    options = {"samples": 1, "window": 3}
    run(tracer, read_facts(facts_of(3)), tmp_path, **options)
    sigma = Store.read(tmp_path).fingerprint["sigma"]
    others = [dataclasses.replace(fact, id=f"other {fact.id}") for fact in facts_of(4)]
    with pytest.raises(StoreError, match=rf"sigma {sigma} there, 0\.\d+ here.*--noise {sigma} .*--noise-subjects"):
        run(tracer, read_facts(others), tmp_path, **options)
    with pytest.raises(StoreError, match="sigma"):
        run(tracer, read_facts(facts_of(3)), tmp_path, noise_subjects=["Seattle"], **options)
    assert run(tracer, read_facts(facts_of(4)), tmp_path, noise=sigma, **options).before == 3  # as the message says


def test_a_limit_changes_no_numbers(tracer, tmp_path):
    """Noise is measured on all facts of a file, whatever part of them is traced."""
    path = write_facts(tmp_path / "facts.jsonl", facts_of(8))
    options = {"samples": 1, "window": 3}
    run(tracer, read_facts(path, limit=3), tmp_path / "run", **options)
    whole = run(tracer, read_facts(path), tmp_path / "run", **options)
    assert (whole.before, whole.traced, whole.store.notes) == (3, 8, ())
    assert one_of_each(whole.store).keys() == {fact.id for fact in facts_of(8)}
    expected = run(tracer, read_facts(path), tmp_path / "undisturbed", **options)
    assert_same_numbers(one_of_each(whole.store), one_of_each(expected.store))


def test_a_run_that_was_interrupted_goes_on_and_equals_an_undisturbed_one_bit_for_bit(tracer, tmp_path, undisturbed):
    for packs in (1, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            run(tracer, FACTS, tmp_path, progress=stop_after(packs), **SAME)
    assert 0 < len(Store.read(tmp_path).done) < len(FACTS)
    outcome = run(tracer, FACTS, tmp_path, **SAME)
    assert outcome.before > 0
    assert one_of_each(outcome.store) == undisturbed


def test_nothing_but_the_store_is_left_in_the_folder(tracer, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tracer, FACTS, tmp_path, progress=stop_after(1), **SAME)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "parts"]
    run(tracer, FACTS, tmp_path, **SAME)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "parts"]


def test_progress_tells_of_every_pack_and_ends_with_all_facts(tracer, tmp_path):
    told = []
    outcome = run(tracer, FACTS, tmp_path, progress=told.append, **SAME)
    done = [each.done for each in told]
    assert done[0] == 0
    assert done[-1] == told[-1].facts == len(FACTS)
    assert done == sorted(set(done))
    assert len(told) == 1 + len(parts_of(tmp_path)) > 5
    grids = [grid for record in outcome.store.records() for grid in record.result.prob.values()]
    assert told[-1].cells == sum(grid.size for grid in grids)


@pytest.mark.parametrize("budget", [300, 3000, "auto"])
def test_every_budget_gives_the_same_grids(tracer, tmp_path, undisturbed, budget):
    outcome = run(tracer, FACTS, tmp_path, **OPTIONS, budget=budget)
    assert_same_numbers(one_of_each(outcome.store), undisturbed)


def test_cells_can_be_shared_out_by_a_process_that_is_alone(tracer, tmp_path, undisturbed):
    outcome = run(tracer, FACTS, tmp_path, shard="cells", **SAME)
    assert_same_numbers(one_of_each(outcome.store), undisturbed)


def test_a_run_of_shared_cells_goes_on_as_one_of_shared_facts(tracer, tmp_path, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        run(tracer, FACTS, tmp_path, shard="cells", progress=stop_after(4), **SAME)
    assert run(tracer, FACTS, tmp_path, **SAME).before == 4
    assert_same_numbers(one_of_each(Store.read(tmp_path)), undisturbed)


def test_a_run_is_only_for_shards_it_knows(tracer, tmp_path):
    with pytest.raises(PlanError, match="unknown shard 'rows': give one of facts, cells"):
        run(tracer, FACTS, tmp_path / "run", shard="rows", **SAME)
    assert not (tmp_path / "run").exists()


# Another run's folder.


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 2}, "seed 1 there, 2 here"),
        ({"samples": 3}, "samples 2 there, 3 here"),
        ({"window": 4}, "windows.mlp_activation 3 there, 4 here"),
        ({"noise": 2.0}, "sigma 1.0 there, 2.0 here"),
        ({"streams": ("mlp_output",)}, r"streams \[.*\] there, \['mlp_output'\] here"),
        ({"require_correct": True}, "target 'first token of the answer' there, 'clean top token, if correct' here"),
    ],
)
def test_other_numbers_are_refused_with_the_difference(tracer, tmp_path, changes, difference):
    few = read_facts(facts_of(2))
    run(tracer, few, tmp_path, **SAME)
    there = parts_of(tmp_path)
    with pytest.raises(StoreError, match=f"holds another run .*{difference}.*give another folder"):
        run(tracer, few, tmp_path, **SAME | changes)
    assert parts_of(tmp_path) == there


def test_another_model_of_the_same_name_is_refused(tracer, tmp_path):
    few = read_facts(facts_of(2))
    run(tracer, few, tmp_path, **SAME)
    with pytest.raises(StoreError, match=r"another run \(weights '[0-9a-f]{32}' there, '[0-9a-f]{32}' here\)"):
        run(changed_tracer(), few, tmp_path, **SAME)


def test_the_same_model_under_another_name_goes_on_with_a_note(tracer, tmp_path):
    run(tracer, read_facts(facts_of(2)), tmp_path, **SAME)
    renamed = fasttrace.Tracer(tracer.model, tracer.tokenizer, name="mine", revision="main")
    outcome = run(renamed, read_facts(facts_of(3)), tmp_path, **SAME)
    assert outcome.before == 2
    assert outcome.store.notes == ("model 'GPT2LMHeadModel' there, 'mine' here", "revision None there, 'main' here")


def test_streams_in_another_order_are_the_same_run(tracer, tmp_path):
    run(tracer, read_facts(facts_of(2)), tmp_path, streams=("block_output", "mlp_output"), **SAME)
    outcome = run(tracer, read_facts(facts_of(3)), tmp_path, streams=("mlp_output", "block_output"), **SAME)
    assert (outcome.before, outcome.traced) == (2, 3)


def test_a_run_records_what_its_model_was(tracer, tmp_path):
    store = run(tracer, read_facts(facts_of(2)), tmp_path, **SAME).store
    identity = tracer.identity()
    assert store.fingerprint.items() >= identity.items()
    for record in store.records():
        assert record.result.metadata["identity"] == digests(identity)


def test_a_folder_of_an_earlier_version_is_read_and_not_gone_on_with(tracer, tmp_path):
    outcome = run(tracer, read_facts(facts_of(2)), tmp_path, **SAME)
    old = {key: value for key, value in outcome.store.fingerprint.items() if key not in ("config", "tokenizer")}
    records = list(outcome.store.records())
    for path in (*parts_of(tmp_path), tmp_path / "manifest.json"):
        path.unlink()
    Store.open(tmp_path, old | {"weights": "0123456789abcdef"}).write(records)
    assert list(Store.read(tmp_path).records()) == records
    for lost in (False, True):
        if lost:
            (tmp_path / "manifest.json").unlink()
        with pytest.raises(StoreError, match=r"was written by an earlier version of fasttrace.*give another folder"):
            run(tracer, read_facts(facts_of(3)), tmp_path, **SAME)


def test_another_fact_of_the_same_id_is_refused(tracer, tmp_path):
    run(tracer, read_facts(facts_of(2)), tmp_path, **SAME)
    other = read_facts([Fact("1", "The Needle is", "The Needle")])
    with pytest.raises(StoreError, match=r"another fact '1' .*prompt 'The Needle is in downtown' there"):
        run(tracer, other, tmp_path, **SAME)


def test_another_place_of_the_subject_is_another_fact(tracer, tmp_path):
    prompt = "The Needle is The Needle"
    first, second = (Fact("1", prompt, "Needle", subject_start=start) for start in (4, 18))
    outcome = run(tracer, read_facts([first]), tmp_path, **SAME)
    assert [record.fact for record in outcome.store.records()] == [first]
    assert run(tracer, read_facts([first]), tmp_path, **SAME).before == 1
    with pytest.raises(StoreError, match=r"another fact '1' \(subject_start 4 there, 18 here\)"):
        run(tracer, read_facts([second]), tmp_path, **SAME)


# Facts that cannot be traced, or that the model does not know.


def test_a_fact_that_cannot_be_traced_is_recorded_with_the_reason_and_not_tried_again(tracer, tmp_path, forwards):
    facts = read_facts([Fact("long", "Needle" + " is" * 40, "Needle"), *facts_of(3)])
    outcome = run(tracer, facts, tmp_path, **SAME)
    assert (outcome.traced, outcome.skipped) == (3, 1)
    record = one_of_each(outcome.store)["long"]
    assert record.result is None
    assert "32" in record.reason
    forwards.clear()
    outcome = run(tracer, facts, tmp_path, **SAME)
    assert (outcome.before, outcome.skipped) == (4, 1)
    assert not forwards


def test_strict_stops_at_a_fact_that_cannot_be_traced(tracer, tmp_path):
    facts = read_facts([*facts_of(3), Fact("long", "Needle" + " is" * 40, "Needle")])
    with pytest.raises(PromptError, match="'long'"):
        run(tracer, facts, tmp_path / "run", strict=True, **SAME)
    assert not (tmp_path / "run").exists()


def test_rows_that_are_no_facts_are_in_the_manifest_with_those_of_an_id_that_is_taken(tracer, tmp_path, caplog):
    rows = [*facts_of(3), {"prompt": "no subject"}, facts_of(3)[1]]
    with caplog.at_level(logging.WARNING, "fasttrace"):
        outcome = run(tracer, read_facts(rows), tmp_path, **SAME)
    assert list(one_of_each(outcome.store)) == ["0", "1", "2"]
    about = Store.read(tmp_path).description
    assert about["n_facts"] == 3
    assert [row.split(":")[0] for row in about["bad_rows"]] == ["row 4", "row 5"]
    assert "id '1' is already that of row 2" in about["bad_rows"][1]


@pytest.fixture(scope="module")
def answered(tracer):
    """Facts of which the model knows some."""
    return FactSet("answered", tuple(known_and_unknown(tracer)))


def test_facts_that_the_model_does_not_know_are_skipped_and_recorded_also_by_a_run_that_goes_on(
    tracer, tmp_path, answered
):
    facts = answered
    unknown = {fact.id for fact in facts if fact.target == "~never~"}
    told = []
    whole = run(tracer, facts, tmp_path / "whole", require_correct=True, progress=told.append, **SAME)
    assert (whole.skipped, whole.traced) == (len(unknown), len(facts) - len(unknown))
    assert (told[0].done, told[0].skipped, told[-1].done) == (len(unknown), len(unknown), len(facts))
    records = one_of_each(whole.store)
    for record in records.values():
        assert record.correct == (record.fact.id not in unknown) == (record.result is not None)
        assert record.result is None or record.result.target_id == record.result.top["clean"][0][0]
        assert record.result is not None or "not with '~never~'" in record.reason
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tracer, facts, tmp_path / "cut", require_correct=True, progress=stop_after(1), **SAME)
    outcome = run(tracer, facts, tmp_path / "cut", require_correct=True, **SAME)
    assert (outcome.skipped, outcome.traced) == (whole.skipped, whole.traced)
    assert one_of_each(outcome.store) == records


def test_a_run_that_goes_on_asks_the_model_only_about_facts_that_are_left(tracer, tmp_path, forwards, answered):
    run(tracer, answered, tmp_path, require_correct=True, **SAME)
    forwards.clear()
    assert run(tracer, answered, tmp_path, require_correct=True, **SAME).before == len(answered)
    assert not forwards


def test_a_prompt_with_infinities_is_recorded_and_spares_the_others(tmp_path):
    tracer = tracer_with_text()
    tracer.choose_engine()
    tracer.model.get_input_embeddings().weight.data[tracer.tokenizer.convert_tokens_to_ids("Q")] = float("nan")
    facts = read_facts([*facts_of(3), Fact("bad", "Seattle is Q", "Seattle")])
    outcome = run(tracer, facts, tmp_path, **SAME)
    assert (outcome.traced, outcome.skipped) == (3, 1)
    assert "inf or NaN" in one_of_each(outcome.store)["bad"].reason
    assert run(tracer, facts, tmp_path, **SAME).before == 4


# Damage.


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: flip(path, 40),
        lambda path: flip(path, -50, bit=3),
    ],
    ids=["cut", "empty", "a bit of the head", "a bit of the foot"],
)
def test_a_damaged_part_is_set_aside_and_its_facts_are_computed_again(tracer, tmp_path, undisturbed, damage):
    run(tracer, FACTS, tmp_path, **SAME)
    part = parts_of(tmp_path)[2]
    damage(part)
    left = len(FACTS) - len(Store.read(tmp_path).done)
    outcome = run(tracer, FACTS, tmp_path, **SAME)
    assert outcome.before == len(FACTS) - left < len(FACTS)
    assert one_of_each(outcome.store) == undisturbed
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == [part.name]
    assert outcome.store.damaged == ()


def test_a_part_that_is_gone_is_computed_again(tracer, tmp_path, undisturbed):
    run(tracer, FACTS, tmp_path, **SAME)
    parts_of(tmp_path)[0].unlink()
    assert one_of_each(run(tracer, FACTS, tmp_path, **SAME).store) == undisturbed


def test_two_runs_at_once_in_one_folder_leave_every_fact_once(tracer, tmp_path, undisturbed):
    """As when a job is started again before the last one is quite dead."""

    def another(told):
        if told.done and not others:
            others.append(run(tracer, FACTS, tmp_path, **SAME))

    others = []
    outcome = run(tracer, FACTS, tmp_path, progress=another, **SAME)
    assert others[0].traced == outcome.traced == len(FACTS)
    assert one_of_each(outcome.store) == undisturbed
    assert isinstance(undisturbed["0"].result, fasttrace.TraceResult)


@pytest.mark.parametrize("start", [None, 0], ids=["", "with the subject's place"])
def test_a_start_on_a_folder_reads_each_part_twice(tracer, tmp_path, monkeypatch, start):
    """Once to open the store and compare its facts, and once to count at the end: a part may be damaged meanwhile."""
    facts = read_facts([replace(fact, subject_start=start) for fact in FACTS])
    run(tracer, facts, tmp_path, **SAME)
    parts, read, right = len(list((tmp_path / "parts").iterdir())), [], stores.read_part
    monkeypatch.setattr(stores, "read_part", lambda path, *columns: (read.append(path), right(path, *columns))[1])
    assert run(tracer, facts, tmp_path, **SAME).before == len(FACTS)
    assert parts > 1
    assert {read.count(path) for path in read} == {2}
