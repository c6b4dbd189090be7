"""The second embedded model, which knows its facts: goldens, identities, engines in float64, packing, resuming.

Slow, and skipped where it cannot be fetched. FASTTRACE_FACTS may name ROME's file known_1000.json.
"""

import os

import numpy as np
import pytest
import torch

import fasttrace
from fasttrace.errors import ModelError
from fasttrace.facts.dataset import read_facts
from fasttrace.models.embedded import model_folder
from fasttrace.runs.store import Store

pytestmark = pytest.mark.slow

PROMPT, SPAN, TARGET = "The Eiffel Tower is in the city of", (1, 4), " Paris"
FACTS = [
    {"id": "tower", "prompt": PROMPT, "subject": "The Eiffel Tower", "target": "Paris"},
    {"id": "needle", "prompt": "The Space Needle is in downtown", "subject": "The Space Needle", "target": "Seattle"},
    {"id": "france", "prompt": "The capital of France is the city of", "subject": "France", "target": "Paris"},
]
ENGINES = ("wavefront", "fork", "rows", "reference")


@pytest.fixture(scope="module")
def folder():
    try:
        return model_folder("gemma3-270m")
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tracer(folder):
    return fasttrace.Tracer.from_pretrained(folder, device="cpu", cpu_matmul="mkl")


@pytest.fixture(scope="module")
def traced(tracer):
    return tracer.trace(PROMPT, subject=SPAN, target=TARGET, samples=2, seed=1)


def narrow(tracer, engine):
    """A third of the cells, from one draw of noise, so that float64 takes a minute."""
    options = {"samples": 1, "seed": 1, "streams": ["mlp_activation"], "noise": 3.0909}
    return tracer.trace(PROMPT, subject=SPAN, target=TARGET, engine=engine, **options)


@pytest.fixture(scope="module")
def exact(folder):
    """Plain passes in float64."""
    return narrow(fasttrace.Tracer.from_pretrained(folder, device="cpu", dtype="float64"), "reference")


def error_of(result, exact):
    """The largest relative error of p(clean), p(corrupted) and the cells."""
    pairs = [
        (result.clean_prob, exact.clean_prob),
        (result.corrupted_prob, exact.corrupted_prob),
        (result.grid("mlp_activation"), exact.grid("mlp_activation")),
    ]
    return max(float(np.max(np.abs(found / truth - 1))) for found, truth in pairs)


def test_the_known_numbers_of_the_tower_come_out(traced):
    assert traced.clean_prob == pytest.approx(0.49715, abs=1e-4)
    assert traced.corrupted_prob == pytest.approx(0.00784, abs=1e-5)
    assert traced.metadata["sigma"] == pytest.approx(3.0909, abs=1e-4)
    assert traced.tokens[:4] == ("<bos>", "The", " Eiffel", " Tower")


def test_the_early_site_and_the_late_site_of_the_paper_are_there(traced):
    mlp, attention = (traced.grid(stream, "indirect_effect") for stream in ("mlp_activation", "attention_output"))
    layer, position = np.unravel_index(mlp.argmax(), mlp.shape)
    assert position in range(*SPAN)
    assert layer < 9
    layer, position = np.unravel_index(attention[:, 4:].argmax(), attention[:, 4:].shape)
    assert position == 4  # the last token
    assert layer >= 7


def test_what_changes_nothing_and_what_restores_all_are_exact(traced):
    states = traced.grid("block_output")
    assert states[:, 0] == pytest.approx(traced.corrupted_prob, rel=1e-5)  # before the subject
    assert states[-1, -1] == pytest.approx(traced.clean_prob, rel=1e-5)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_is_as_right_as_plain_passes_in_float32(tracer, exact, engine, fuse, monkeypatch):
    """To 3 x the error that plain float32 passes of this model have against float64, 1.2e-5."""
    monkeypatch.setattr(tracer, "fuse", fuse)
    assert error_of(narrow(tracer, engine), exact) < 3.6e-5


def test_unfused_engines_are_checked_to_1e_5(tracer, monkeypatch):
    monkeypatch.setattr(tracer, "fuse", False)
    assert narrow(tracer, "wavefront").metadata["self_check_error"] <= 1e-5


OPTIONS = {"samples": 1, "streams": ["mlp_activation"], "noise": 3.0}


def test_packed_prompts_have_the_grids_that_each_has_alone(tracer):
    for record in tracer.trace_many(FACTS, **OPTIONS):
        assert record.result is not None, record.reason
        fact = next(fact for fact in FACTS if fact["id"] == record.fact.id)
        alone = tracer.trace(fact["prompt"], subject=fact["subject"], target=record.result.target_id, **OPTIONS)
        np.testing.assert_allclose(record.result.grid("mlp_activation"), alone.grid("mlp_activation"), rtol=2e-4)


def test_an_interrupted_run_goes_on_where_it_was(tracer, tmp_path):
    seen = []

    def stop_after_a_pack(told):
        seen.append(told)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracer.run(FACTS, tmp_path / "cut", progress=stop_after_a_pack, budget=100, **OPTIONS)
    assert 0 < len(Store.read(tmp_path / "cut").done) < len(FACTS)
    tracer.run(FACTS, tmp_path / "cut", budget=100, **OPTIONS)
    tracer.run(FACTS, tmp_path / "whole", budget=100, **OPTIONS)
    cut, whole = (
        {record.fact.id: record.result.grid("mlp_activation") for record in Store.read(tmp_path / name).records()}
        for name in ("cut", "whole")
    )
    assert cut.keys() == whole.keys() == {fact["id"] for fact in FACTS}
    assert all(np.array_equal(cut[name], whole[name]) for name in whole)


@pytest.mark.skipif("FASTTRACE_FACTS" not in os.environ, reason="FASTTRACE_FACTS names no known_1000.json")
def test_of_the_first_sixty_facts_of_rome_it_knows_24(tracer):
    facts = list(read_facts(os.environ["FASTTRACE_FACTS"]))[:60]
    options = {"samples": 1, "streams": ["block_output"], "noise": 3.0, "require_correct": True}
    known = [record for record in tracer.trace_many(facts, **options) if record.result is not None]
    assert len(known) == 24


def test_weights_are_those_of_the_file_in_float32(tracer):
    assert {parameter.dtype for parameter in tracer.model.parameters()} == {torch.float32}
    assert tracer.trace(PROMPT, subject=SPAN, samples=1, streams=["block_output"]).metadata["quantization"] == (
        "Q4_K_M weights, computed in float32"
    )
