"""The self-check finds engines that are wrong, and says so."""

import logging
from dataclasses import replace

import pytest
import torch

from fasttrace import memories
from fasttrace.engines import ENGINES
from fasttrace.engines import self_check as select
from fasttrace.engines.state import state_of
from fasttrace.errors import EngineError
from fasttrace.models.anatomy import anatomy_of
from tests.conftest import tiny_model


def test_a_sound_model_gets_the_wavefront(family):
    choice = select.choose(anatomy_of(tiny_model(family)))
    assert choice.name == "wavefront"
    assert choice.self_check_error < 1e-4


def test_the_check_runs_once_per_model(family, monkeypatch):
    anatomy = anatomy_of(tiny_model(family))
    first = select.choose(anatomy)
    for name in ENGINES:
        monkeypatch.setitem(ENGINES, name, replace(ENGINES[name], run=lambda *_: pytest.fail("checked twice")))
    assert select.choose(anatomy) == first


def checks_of(anatomy):
    return select._checks_of(anatomy, True, state_of(anatomy.model))


def wrong(run, amount):
    """An engine whose cells are off."""

    def off(anatomy, job, tick):
        scores = run(anatomy, job, tick)
        scores.cells[0] *= amount
        return scores

    return off


def test_wrong_packed_engines_step_down_to_rows_with_the_number(family, monkeypatch, caplog):
    for name in ("wavefront", "fork"):
        monkeypatch.setitem(ENGINES, name, replace(ENGINES[name], run=wrong(ENGINES[name], 1.01)))
    with caplog.at_level(logging.WARNING, logger="fasttrace"):
        choice = select.choose(anatomy_of(tiny_model(family)))
    assert choice.name == "rows"
    assert "wavefront differs from plain forward passes by 1.0e-02" in choice.reason
    assert "stepping down" in caplog.text


def test_a_wavefront_that_crashes_steps_down_to_fork(family, monkeypatch):
    def crash(anatomy, job, tick):
        raise RuntimeError("shape mismatch")

    monkeypatch.setitem(ENGINES, "wavefront", replace(ENGINES["wavefront"], run=crash))
    choice = select.choose(anatomy_of(tiny_model(family)))
    assert choice.name == "fork"
    assert "RuntimeError: shape mismatch" in choice.reason


def test_no_engine_is_better_than_a_wrong_one(family, monkeypatch):
    for name in ENGINES:
        monkeypatch.setitem(ENGINES, name, replace(ENGINES[name], run=wrong(ENGINES[name], 1.5)))
    with pytest.raises(EngineError, match=r"no engine is right .*wavefront differs.*by 4.1e-01.*reference differs"):
        select.choose(anatomy_of(tiny_model(family)))


def test_a_model_whose_attention_ignores_the_interface_is_caught(monkeypatch):
    """Ordinary attention over the pack as if it were one prompt: the silent failure that the check is for."""
    from fasttrace.engines import attention_ragged as attention

    def plain(module, query, key, value, attention_mask, **kwargs):
        attention._running().calls += 1
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return output.transpose(1, 2), None

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, plain)
    choice = select.choose(anatomy_of(tiny_model("gpt2")))
    assert choice.name == "fork"
    assert "wavefront differs from plain forward passes" in choice.reason


def test_a_named_engine_is_checked_too_and_runs_or_raises(family, monkeypatch):
    anatomy = anatomy_of(tiny_model(family))
    choice = select.choose(anatomy, "rows")
    assert (choice.name, choice.reason) == ("rows", "asked for by name; rows passed the self-check")
    assert choice.self_check_error < 1e-4
    monkeypatch.setitem(ENGINES, "fork", replace(ENGINES["fork"], run=wrong(ENGINES["fork"], 1.5)))
    with pytest.raises(EngineError, match=r"engine 'fork' differs from plain .* by 4.1e-01 .*; use engine='auto'"):
        select.choose(anatomy, "fork")


def test_the_reference_needs_no_check(family, monkeypatch):
    monkeypatch.setattr(select, "_checks_of", lambda *_: pytest.fail("checked"))
    choice = select.choose(anatomy_of(tiny_model(family)), "reference")
    assert (choice.name, choice.reason, choice.self_check_error) == ("reference", "asked for by name", None)


def test_a_step_down_is_told_once(family, monkeypatch, caplog):
    monkeypatch.setitem(ENGINES, "wavefront", replace(ENGINES["wavefront"], run=wrong(ENGINES["wavefront"], 1.5)))
    anatomy = anatomy_of(tiny_model(family))
    first = select.choose(anatomy)
    assert "stepping down" in caplog.text
    caplog.clear()
    assert select.choose(anatomy) == first
    assert not caplog.text


@pytest.mark.parametrize(("moved", "passes"), [(0.2, True), (0.5, True), (0.7, False)])
def test_half_precision_may_move_as_far_as_another_rounding_of_the_noise_carries(moved, passes, monkeypatch):
    """A rounding that moves plain passes by 0.3 lets 0.6 pass; one that moves them by nothing, HALF_TOLERANCE."""
    anatomy = anatomy_of(tiny_model("llama", torch.bfloat16))
    distances = iter([0.3, moved])
    monkeypatch.setattr(select, "_distance", lambda *_: next(distances))
    checks = checks_of(anatomy)
    assert checks.tolerance == pytest.approx(0.6)
    assert (select._check(anatomy, checks, "rows", True)[0] is None) == passes


def test_float32_has_a_tolerance_of_its_own(family):
    checks = checks_of(anatomy_of(tiny_model(family)))
    assert checks.tolerance == select.TOLERANCE[torch.float32]


def out_of_memory(times, run):
    """A function that runs out of memory the first times."""
    left = [times]

    def small(*args, **options):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(*args, **options)

    return small


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_memory_that_runs_out_in_a_check_is_an_error_and_no_verdict(family, monkeypatch, error):
    def small(*_):
        raise error

    anatomy = anatomy_of(tiny_model(family))
    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "wavefront", replace(ENGINES["wavefront"], run=small))
        for engine in ("auto", "wavefront"):
            with pytest.raises(EngineError, match=r"out of memory on cpu during the self-check, .* free memory"):
                select.choose(anatomy, engine)
    assert select.choose(anatomy).name == "wavefront"


@pytest.mark.slow
def test_plain_passes_that_do_not_fit_are_made_smaller(family, monkeypatch):
    anatomy = anatomy_of(tiny_model(family))
    right = select.reference.run
    expected = select.choose(anatomy)
    memories.clear("models")
    monkeypatch.setattr(select.reference, "run", out_of_memory(3, right))
    assert select.choose(anatomy) == expected
    memories.clear("models")
    monkeypatch.setattr(select.reference, "run", out_of_memory(100, right))
    with pytest.raises(EngineError, match="out of memory on cpu during the self-check"):
        select.choose(anatomy)


@pytest.mark.parametrize("error", [AssertionError, NotImplementedError, ZeroDivisionError, StopIteration, OSError])
def test_an_engine_that_raises_anything_steps_down(family, monkeypatch, error):
    def crash(*_):
        raise error("at two rows")

    monkeypatch.setitem(ENGINES, "wavefront", replace(ENGINES["wavefront"], run=crash))
    choice = select.choose(anatomy_of(tiny_model(family)))
    assert choice.name == "fork"
    assert f"{error.__name__}: at two rows" in choice.reason


def test_an_interrupted_check_is_made_again(family, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    anatomy = anatomy_of(tiny_model(family))
    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "wavefront", replace(ENGINES["wavefront"], run=interrupted))
        with pytest.raises(KeyboardInterrupt):
            select.choose(anatomy)
    assert select.choose(anatomy).name == "wavefront"
