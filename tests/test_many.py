"""Many prompts give what each gives alone, whatever shares a pass."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from transformers import PhiConfig, PhiForCausalLM

import fasttrace
from fasttrace import NumericsError, PlanError, PromptError, memories
from fasttrace import study as studies
from fasttrace.engines import ENGINES, wavefront
from fasttrace.engines.clean import clean_tops
from fasttrace.experiment.settings import Settings
from fasttrace.facts.dataset import Fact, read_facts
from fasttrace.study import encoded_facts
from tests.conftest import loads_in_blocks, tiny_model
from tests.helpers.tokenizers import byte_level
from tests.helpers.tracers import tracer_with_text

FACTS = [
    Fact("needle", "The Space Needle is in downtown", "The Space Needle", "Seattle"),
    Fact("tower", "In Paris is the Tower", "Paris", "of"),
    Fact("rome", "The Forum is in", "The Forum", "Rome"),
    Fact("rome-2", "The Opera is in", "The Opera", "Milan"),
    Fact("short", "Needle is", "Needle", None),
    Fact("tree", "The Tree is in downtown", "The Tree", "Seattle"),
]
OPTIONS = {"samples": 2, "window": 3, "noise": 1.0}


def study_of(tracer, facts, **options):
    return tracer.study_of(read_facts(facts), Settings(first_target_token=True, **options))


def by_id(records):
    found = {record.fact.id: record for record in records}
    assert len(found) == len(FACTS)
    return found


def assert_same_grids(result, expected, tolerance=1e-5):
    assert result.target_id == expected.target_id
    assert result.tokens == expected.tokens
    for stream in expected.streams:
        np.testing.assert_allclose(result.prob[stream], expected.prob[stream], rtol=tolerance)
        np.testing.assert_allclose(result.prob_std[stream], expected.prob_std[stream], atol=1e-6)
    assert result.clean_prob == pytest.approx(expected.clean_prob, rel=tolerance)
    assert result.corrupted_prob == pytest.approx(expected.corrupted_prob, rel=tolerance)


@pytest.mark.parametrize("engine", ["auto", "fork", "rows"])
def test_many_prompts_give_what_each_gives_alone(family, engine):
    tracer = tracer_with_text(family)
    for record in tracer.trace_many(FACTS, engine=engine, **OPTIONS):
        fact = record.fact
        alone = tracer.trace(fact.prompt, subject=fact.subject, target=fact.target, first_target_token=True, **OPTIONS)
        assert_same_grids(record.result, alone)
        assert record.result.cost == alone.cost or engine != "auto", "another engine may compute more"


def test_the_wavefront_takes_all_of_them_in_one_pass(family, monkeypatch):
    tracer, passes = tracer_with_text(family), []
    tracer.choose_engine()
    right = wavefront._run
    monkeypatch.setattr(wavefront, "_run", lambda a, r, *rest: passes.append(len(r.jobs)) or right(a, r, *rest))
    study, encoded, refused = study_of(tracer, FACTS, **OPTIONS)
    packs = study.packed(encoded)
    passes.clear()
    by_id(study.trace_all(encoded, refused))
    assert passes == [len(pack) for pack in packs] == [len(FACTS)]


@pytest.mark.parametrize("budget", [100, 400, 1000])
def test_every_budget_gives_the_same_grids_and_is_kept(family, budget, monkeypatch):
    tracer, packs = tracer_with_text(family), []
    expected = by_id(tracer.trace_many(FACTS, **OPTIONS))
    right = wavefront.LastBlock
    monkeypatch.setattr(
        wavefront, "LastBlock", lambda a, pack, *rest: packs.append(pack.blocks[-1].n_tokens) or right(a, pack, *rest)
    )
    found = by_id(tracer.trace_many(FACTS, budget=budget, **OPTIONS))
    assert max(packs) <= budget
    for name, record in found.items():
        assert_same_grids(record.result, expected[name].result)


def test_packs_do_not_depend_on_the_order_of_the_facts(family):
    tracer = tracer_with_text(family)
    ids = []
    for facts in (FACTS, FACTS[::-1]):
        study, encoded, _ = study_of(tracer, facts, budget=1000, **OPTIONS)
        ids.append([[each.fact.id for each in pack] for pack in study.packed(encoded)])
    assert ids[0] == ids[1]
    assert len(ids[0]) > 1


def test_memory_that_runs_out_halves_the_budget_and_loses_nothing(family, monkeypatch, caplog):
    tracer, tried = tracer_with_text(family), []
    expected = by_id(tracer.trace_many(FACTS, **OPTIONS))
    right = wavefront._run

    def out_of_memory(anatomy, ready, *rest):
        tokens = sum(len(job.token_ids) for job in ready.jobs)
        tried.append(tokens)
        if tokens > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(anatomy, ready, *rest)

    monkeypatch.setattr(wavefront, "_run", out_of_memory)
    with caplog.at_level(logging.WARNING, "fasttrace"):
        found = by_id(tracer.trace_many(FACTS, **OPTIONS))
    assert "out of memory" in caplog.text
    assert max(tried) > 20
    for name, record in found.items():
        assert_same_grids(record.result, expected[name].result)


def test_a_fact_that_cannot_be_traced_is_kept_with_the_reason(family):
    tracer = tracer_with_text(family)
    bad = Fact("long", "needle " * 600, "needle needle", "x")
    records = list(tracer.trace_many([*FACTS, Fact("absent", "The Needle", "The Needle", "")], **OPTIONS))
    assert len(records) == len(FACTS)  # a malformed row is told by the data set
    _, skipped = encoded_facts([bad], tracer._encode_fact, strict=False)
    assert skipped[0].result is None
    assert "positions" in skipped[0].reason or "occurs" in skipped[0].reason
    with pytest.raises(PromptError, match="'long'"):
        encoded_facts([bad], tracer._encode_fact, strict=True)


WORDS = ["The Space Needle", " is", " fast", " faster", " a", " actor", "actor", " New", " York", " Seattle", "Seattle"]


def says(answer):
    """A model that goes on with a token, whatever the prompt."""
    tokenizer = byte_level(words=WORDS)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()
    (token,) = tokenizer(answer)["input_ids"]
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[token] = 20.0
    return fasttrace.Tracer(model, tokenizer), token


def only(tracer, target, **options):
    fact = {"prompt": "The Space Needle is", "subject": "The Space Needle", "target": target}
    (record,) = tracer.trace_many([fact], samples=1, window=1, noise=1.0, **options)
    return record


@pytest.mark.parametrize(
    ("answer", "said", "known", "to_rome"),
    [
        ("faster", " fast", False, False),
        ("actor", " a", False, False),
        ("actor", "actor", False, True),
        ("actor", " actor", True, True),
        (" actor", " actor", True, True),
        ("New York", " New", True, False),
        ("Seattle!", " Seattle", True, False),
    ],
)
def test_known_is_what_goes_on_with_the_answers_own_first_token_or_by_romes_rule_with_the_whole(
    answer, said, known, to_rome
):
    tracer, token = says(said)
    for compat, expected in ((None, known), ("rome", to_rome)):
        record = only(tracer, answer, require_correct=True, compat=compat)
        assert record.correct is expected
        assert (record.result is not None) is expected
        assert only(tracer, answer, compat=compat).correct is expected
        if expected:
            assert record.result.target_id == token
            assert "ROME's rule" in record.result.metadata["target_rule"] or compat is None
        else:
            assert record.reason.startswith(f"the model goes on with {said!r}, not with {answer!r}")


def test_the_rule_for_what_is_known_is_a_part_of_what_a_run_is():
    tracer, _ = says(" fast")
    facts = [{"prompt": "The Space Needle is", "subject": "The Space Needle", "target": "faster"}]
    asked = [(correct, compat) for correct in (False, True) for compat in (None, "rome")]
    rules = {study_of(tracer, facts, require_correct=c, compat=r, noise=1.0)[0].target_rule for c, r in asked}
    assert len(rules) == 4
    with pytest.raises(PlanError, match=r"compat is 'Rome': give \"rome\", or None"):
        study_of(tracer, facts, compat="Rome")


def test_a_fact_without_an_answer_is_not_known_and_a_set_without_answers_is_refused(family):
    tracer = tracer_with_text(family)
    records = by_id(tracer.trace_many(FACTS, require_correct=True, **OPTIONS))
    assert (records["short"].result, records["short"].correct) == (None, None)
    assert "no expected answer" in records["short"].reason
    rows = [{"prompt": "The Forum is in", "subject": "The Forum", "zielwort": "Rome"}]
    with pytest.raises(PromptError, match=r"none of the 1 in list has an answer: its columns are .*zielwort; rename"):
        tracer.trace_many(rows, require_correct=True)


def test_a_templates_place_and_the_notes_of_a_row_reach_the_result(family):
    tracer = tracer_with_text(family)
    rewrite = {"prompt": "The Forum of {} is", "subject": "The Forum", "target_true": {"str": "Rome"}}
    noted = {"prompt": "The Zoe\u0308 is in", "subject": "Zo\u00eb", "answers": ["Rome", "Milan"]}
    template, other = tracer.trace_many([{"requested_rewrite": rewrite}, noted], **OPTIONS)
    if template.fact.subject != "The Forum":
        template, other = other, template
    begin, end = template.result.span
    assert "".join(template.result.tokens[begin:end]).strip() == "The Forum"
    assert begin > 3
    notes = other.result.metadata["notes"]
    assert "answers has 2 answers" in notes[0]
    assert "in another Unicode form" in notes[1]


def test_noise_is_measured_on_the_subjects_of_all_facts(family):
    tracer = tracer_with_text(family)
    sigmas = {record.result.metadata["sigma"] for record in tracer.trace_many(FACTS, samples=1, window=3)}
    assert len(sigmas) == 1
    alone = next(iter(tracer.trace_many(FACTS[:1], samples=1, window=3))).result.metadata["sigma"]
    assert sigmas != {alone}


def test_infinities_in_one_prompt_spare_the_others(family):
    tracer = tracer_with_text(family)
    weight = tracer.model.get_input_embeddings().weight.data
    of_others = {i for fact in FACTS if fact.id != "rome" for i in tracer.tokenizer(fact.prompt).input_ids}
    token = next(i for i in tracer.tokenizer("Forum").input_ids if i not in of_others)
    tracer.choose_engine()
    saved = weight[token].clone()
    try:
        weight[token] = float("nan")
        records = by_id(tracer.trace_many(FACTS, **OPTIONS))
        with pytest.raises(NumericsError):
            list(tracer.trace_many(FACTS, strict=True, **OPTIONS))
    finally:
        weight[token] = saved
    assert "inf or NaN" in records["rome"].reason
    assert all(record.result is not None for name, record in records.items() if name != "rome")


def test_a_family_that_is_wrong_with_company_is_traced_alone(family, monkeypatch, caplog):
    tracer = tracer_with_text(family)
    right = wavefront.run_jobs

    def wrong(anatomy, jobs, *rest):
        scores = right(anatomy, jobs, *rest)
        if len(jobs) > 1:
            scores[1].cells[:] *= 1.1
        return scores

    memories.clear("models")
    monkeypatch.setitem(ENGINES, "wavefront", replace(ENGINES["wavefront"], run_jobs=wrong))
    with caplog.at_level(logging.WARNING, "fasttrace"):
        study, encoded, _ = study_of(tracer, FACTS, **OPTIONS)
        assert all(len(pack) == 1 for pack in study.packed(encoded))
    assert "one prompt at a time" in caplog.text


def test_the_next_pack_is_planned_while_one_is_computed(family, monkeypatch):
    tracer, events = tracer_with_text(family), []
    monkeypatch.setattr(studies, "MOST_PROMPTS", 1)
    study, encoded, _ = study_of(tracer, FACTS, **OPTIONS)
    asked = iter(study.packed(encoded))

    def packs():
        for pack in asked:
            events.append("asked")
            yield pack

    for _ in study.run(packs()):
        events.append("done")
    assert events[:3] == ["asked", "asked", "done"]
    assert events.count("done") == len(FACTS)


def test_a_set_without_facts_is_refused(family):
    with pytest.raises(PromptError, match="no facts"):
        tracer_with_text(family).trace_many([])


def test_the_clean_top_token_is_found_for_prompts_of_any_length(family):
    tracer = tracer_with_text(family)
    study, encoded, _ = study_of(tracer, FACTS, **OPTIONS)
    tops = clean_tops(study.anatomy, [each.prompt.token_ids for each in encoded])
    for each, top in zip(encoded, tops, strict=True):
        assert top == tracer.trace(each.fact.prompt, subject=each.fact.subject, samples=1, noise=1.0).top["clean"][0][0]


def test_the_blocks_of_an_offloaded_model_come_once_for_all_prompts(family, loads):
    in_memory = by_id(tracer_with_text(family).trace_many(FACTS, **OPTIONS))
    tokenizer = byte_level()
    model = cpu_offload(tiny_model(family, vocab_size=len(tokenizer)), torch.device("cpu"))
    tracer = fasttrace.Tracer(model, tokenizer)
    study, encoded, refused = study_of(tracer, FACTS, **OPTIONS)
    study.packed(encoded)
    loads.clear()
    found = by_id(study.trace_all(encoded, refused))
    assert set(loads_in_blocks(tracer.anatomy, loads).values()) == {1}
    for name, record in found.items():
        assert_same_grids(record.result, in_memory[name].result)


def test_records_are_given_as_soon_as_they_are_known(family, monkeypatch):
    monkeypatch.setattr(studies, "MOST_PROMPTS", 1)
    records = tracer_with_text(family).trace_many(FACTS, **OPTIONS)
    assert isinstance(next(records).result, fasttrace.TraceResult)
    records.close()
