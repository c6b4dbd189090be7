"""Packs fit: the model of a pass's memory covers the allocator's peak, and a pass that does not fit is split."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fasttrace
from fasttrace import EngineError
from fasttrace.engines import ENGINES, memory, passes, wavefront
from fasttrace.fusing.choose import fused
from fasttrace.models.anatomy import anatomy_of
from tests.conftest import all_grids, blank_scores, make_job
from tests.helpers import zoo

SHAPES = {
    "gpt2": {"n_embd": 256, "n_inner": None, "n_positions": 64},
    "llama": {"hidden_size": 256, "intermediate_size": 700, "head_dim": 64, "max_position_embeddings": 64},
}


def peak_bytes(run):
    """Most bytes that were allocated at once while `run` ran, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    sizes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([size for _, size in sizes]).max())


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("engine", ["wavefront", "rows"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_bytes_of_a_token_cover_the_allocators_peak_and_are_not_far_above_it(name, engine, fuse):
    anatomy = anatomy_of(zoo.tiny_model(name, **SHAPES[name]))
    job = make_job(24, (1, 3), 4, all_grids(anatomy.streams, 3, 24), d_model=256)
    tokens = job.plan(anatomy.n_layers, ENGINES[engine].layout).peak_tokens
    assert tokens > 4000, "what does not grow with the pack must not matter"
    with fused(anatomy, fuse):
        seen = peak_bytes(lambda: ENGINES[engine](anatomy, job, lambda: None)) / tokens
    assert seen < memory.bytes_per_token(anatomy) < 4 * seen


def out_of_memory_above(limit, engine, packs):
    """An engine on a device that holds `limit` tokens."""
    right = ENGINES[engine]

    def small(anatomy, job, tick):
        tokens = job.plan(anatomy.n_layers, ENGINES[engine].layout).peak_tokens
        packs.append(tokens)
        if tokens > limit:
            tick()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return right(anatomy, job, tick)

    return replace(right, run=small)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["wavefront", "rows"])
def test_a_pass_that_runs_out_of_memory_is_split_and_nothing_is_lost(engine, monkeypatch, caplog):
    tracer = fasttrace.Tracer(zoo.tiny_model("gpt2"))
    request = {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 5, "window": 3, "engine": engine}
    whole = tracer.trace(**request)
    steps, packs = [], []
    monkeypatch.setitem(ENGINES, engine, out_of_memory_above(90, engine, packs))
    split = tracer.trace(**request, progress=lambda done, total: steps.append((done, total)))
    for stream in whole.streams:
        np.testing.assert_allclose(split.grid(stream), whole.grid(stream), rtol=1e-5)
        np.testing.assert_allclose(split.prob_std[stream], whole.prob_std[stream], rtol=1e-3, atol=1e-9)
    assert split.corrupted_prob == pytest.approx(whole.corrupted_prob)
    assert "out of memory with" in caplog.text
    assert packs[0] > 90, "the first pass was too large"
    first_fit = next(number for number, tokens in enumerate(packs) if tokens <= 90)
    assert max(packs[first_fit:]) <= 90, "later passes are made small from the start"
    assert steps[-1][0] == steps[-1][1]
    assert all(done <= total for done, total in steps)


def test_a_single_cell_that_does_not_fit_is_an_error_that_says_what_to_do(monkeypatch):
    tracer = fasttrace.Tracer(zoo.tiny_model("gpt2"))
    tracer.choose_engine("wavefront")
    monkeypatch.setitem(ENGINES, "wavefront", out_of_memory_above(3, "wavefront", []))
    with pytest.raises(EngineError, match=r"out of memory on cpu with one cell and one noise sample, \d+ tokens: free"):
        tracer.trace([5, 6, 7, 8], subject=(1, 3), samples=2, engine="wavefront")


def test_other_errors_of_a_pass_are_not_taken_for_lack_of_memory(monkeypatch):
    tracer = fasttrace.Tracer(zoo.tiny_model("gpt2"))
    tracer.choose_engine("wavefront")

    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setitem(ENGINES, "wavefront", replace(ENGINES["wavefront"], run=broken))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        tracer.trace([5, 6, 7, 8], subject=(1, 3), samples=2, engine="wavefront")


def test_processes_that_share_a_model_do_not_split_on_their_own(monkeypatch):
    """The others would wait for ever for this one's part of a product."""
    anatomy = anatomy_of(zoo.tiny_model("gpt2"))
    anatomy.model._device_mesh = object()
    monkeypatch.setitem(ENGINES, "wavefront", out_of_memory_above(3, "wavefront", []))
    job = make_job(5, (1, 3), 2, all_grids(("block_output",), 1, 5))
    with pytest.raises(torch.OutOfMemoryError):
        passes.run_in_passes(ENGINES["wavefront"], anatomy, job, memory.Budget(1000))


@pytest.mark.parametrize("at_once", [10, 4, 3, 1])
def test_samples_are_dealt_to_as_few_passes_as_the_budget_allows(at_once):
    anatomy, seen = anatomy_of(zoo.tiny_model("gpt2")), []

    def counted(_anatomy, job, _tick):
        seen.append(job.samples)
        return blank_scores(job, 67)

    engine = replace(ENGINES["wavefront"], run=counted)
    cells = all_grids(("block_output",), 1, 6)
    one_sample = make_job(6, (0, 2), 1, cells).plan(anatomy.n_layers, wavefront.LAYOUT).peak_tokens
    scores, _ = passes.run_in_passes(
        engine, anatomy, make_job(6, (0, 2), 10, cells), memory.Budget(at_once * one_sample)
    )
    assert scores.cells.shape == (len(cells), 10)
    assert scores.base.shape == (1, 11)
    assert len(scores.top["corrupted"][0]) == 67
    assert sum(seen) == 10
    assert len(seen) == -(-10 // at_once)
