"""Every engine that claims a family gives the reference's grids; broken on purpose, it does not."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from fasttrace.engines import ENGINES, readout, reference, wavefront
from fasttrace.engines import attention_forked as fork
from fasttrace.engines import attention_ragged as attention
from fasttrace.engines import self_check as select
from fasttrace.engines.job import Job
from fasttrace.errors import FasttraceError
from fasttrace.experiment.cells import grid_cells
from fasttrace.experiment.corruption import draw, sigma_of
from fasttrace.models.anatomy import anatomy_of
from tests.helpers import zoo

OWN_ATTENTION = {"bloom", "falcon", "mpt", "xglm", *(name for name in zoo.VARIANTS if name.startswith("falcon"))}
RECURRENT = ("mamba",)
IN_EARLY_5 = zoo.INSTALLED < (5, 17)
if IN_EARLY_5:
    OWN_ATTENTION.add("nemotron")

NOT_IN_FLOAT64 = {
    "xglm": "its attention clamps scores to the smallest float32",
    "gemma2": "its attention takes softmax in float32",
    "deepseek_v3": "its router is in float32, with rounding that depends on the CPU",
    "mamba": "its recurrence is in float32",
    **({"mpt": "its mask is of float32's least number"} if IN_EARLY_5 else {}),
}


def family_model(name, dtype=torch.float32):
    model_type, settings = zoo.VARIANTS.get(name, (name, {}))
    return zoo.tiny_model(model_type, dtype, **settings)


@cache
def case(name, dtype=torch.float32):
    """(anatomy, job of all streams and cells, what plain forward passes give)."""
    anatomy = anatomy_of(family_model(name, dtype))
    ids = torch.randint(1, 60, (7,), generator=torch.Generator().manual_seed(3))
    sigma = sigma_of("s3", anatomy.embedding, [ids.tolist()], anatomy.device)
    cells = tuple(cell for stream in anatomy.streams for cell in grid_cells(stream, 3, anatomy.n_layers, 7))
    noise = draw((2, 4), anatomy.d_model, sigma=sigma, samples=2, seed=1, neutral=anatomy.neutral_token)
    job = Job(ids, noise, cells, None)
    return anatomy, job, reference.run(anatomy, job, lambda: None, rows=len(cells) * 2)


def error_of(engine, name, dtype=torch.float32):
    """Largest difference from plain forward passes, over the spread of their grids."""
    anatomy, job, expected = case(name, dtype)
    scores = ENGINES[engine](anatomy, job, lambda: None)
    pairs = ((scores.cells, expected.cells), (scores.corrupted, expected.corrupted), (scores.clean, expected.clean))
    return max(np.abs(given - wanted).max() for given, wanted in pairs) / np.ptp(expected.cells)


def best_engine(name):
    """What "auto" should find."""
    return "rows" if name in RECURRENT else "fork" if name in OWN_ATTENTION else "wavefront"


@pytest.mark.parametrize("name", [*zoo.LISTED, *zoo.VARIANTS])
def test_engines_equal_plain_forward_passes_and_the_best_one_is_chosen(name):
    anatomy, _, expected = case(name)
    assert np.ptp(expected.cells) > 0.01, "the grids must vary, or the comparison says nothing"
    assert error_of(best_engine(name), name) < 1e-5
    assert error_of("rows", name) < 1e-5
    choice = select.choose(anatomy)
    assert choice.name == best_engine(name)
    assert choice.self_check_error < 1e-4


@pytest.mark.parametrize("name", [name for name in zoo.LISTED if name not in NOT_IN_FLOAT64])
def test_in_float64_the_best_engine_agrees_to_rounding(name):
    assert error_of(best_engine(name), name, torch.float64) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3n_text", "mpt", "mamba", "opt-post-norm"])
def test_plain_passes_of_many_rows_are_those_of_one_row(name):
    anatomy, job, expected = case(name)
    few = Job(job.token_ids, job.corruption, job.cells[::9], job.target)
    one_by_one = reference.run(anatomy, few, lambda: None)
    np.testing.assert_allclose(one_by_one.cells, expected.cells[::9], rtol=1e-4)
    np.testing.assert_allclose(one_by_one.corrupted, expected.corrupted, rtol=1e-4)


def prefix_of_the_clean_row(patch, module=attention):
    right = module.after_prefix

    def wrong(base, own, group):
        return right(base[:1].expand_as(base), own, group)

    patch.setattr(module, "after_prefix", wrong)


def prefix_of_the_clean_row_in_fork(patch):
    prefix_of_the_clean_row(patch, fork)


def no_sliding_window(patch):
    right = attention.PackState.tile_mask

    def wrong(state, mask, group):
        return right(state, torch.ones_like(mask, dtype=torch.bool).tril(), group)

    patch.setattr(attention.PackState, "tile_mask", wrong)


def no_mask(patch):
    right = attention.PackState.tile_mask
    patch.setattr(attention.PackState, "tile_mask", lambda *arguments: torch.ones_like(right(*arguments)))


def without(argument):
    """Attention arithmetic that is not told one thing."""

    def mutate(patch):
        right = attention._arithmetic

        def arithmetic(module, implementation):
            function = right(module, implementation)
            return lambda *args, **kwargs: function(*args, **{k: v for k, v in kwargs.items() if k != argument})

        patch.setattr(attention, "_arithmetic", arithmetic)

    return mutate


def no_sinks(patch):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    patch.setattr(attention, "_arithmetic", lambda *_: sdpa_attention_forward)


def wrong_tables(**changes):
    def mutate(patch):
        right = wavefront.tables_of

        def wrong(*arguments):
            given = right(*arguments)
            blocks = [replace(b, **{name: change(b) for name, change in changes.items()}) for b in given.blocks]
            return replace(given, blocks=blocks)

        patch.setattr(wavefront, "tables_of", wrong)

    return mutate


def earlier(position):
    """Positions of restored rows, one less: the base rows' are right, so that nothing but their relation is wrong."""
    n_base = 3 * (int(position.max()) + 1)
    return torch.cat((position[:n_base], position[n_base:] - 1))


def bare_head(patch):
    """Final norm and head without what the model's forward does after them."""

    def logits(anatomy, states, _):
        model = anatomy.model
        return model.lm_head(model.model.norm(states))

    patch.setattr(readout, "_logits", logits)


MUTATIONS = {
    "prefix keys and values of the clean row": ("llama", prefix_of_the_clean_row),
    "the same in fork": ("bloom", prefix_of_the_clean_row_in_fork),
    "mask dropped": ("llama", no_mask),
    "sliding window dropped": ("mistral", no_sliding_window),
    "sliding window dropped where every other block has one": ("cohere2", no_sliding_window),
    "scores without soft cap": ("gemma2", without("softcap")),
    "scores scaled by the usual factor": ("granite", without("scaling")),
    "sinks dropped": ("gpt_oss", no_sinks),
    "rotary angles of the position before": ("llama", wrong_tables(position=lambda t: earlier(t.position))),
    "position ids of the position before": ("gptj", wrong_tables(position=lambda t: earlier(t.position))),
    "per-layer inputs of the clean row": ("gemma3n_text", wrong_tables(origin=lambda tables: tables.origin % 7)),
    "shared keys and values of restored tokens": ("gemma3n_text", wrong_tables(carried=lambda tables: tables.source)),
    "MLP outputs in the wrong place": (
        "llama",
        wrong_tables(mlp_computed=lambda t: t.mlp_computed and (t.mlp_computed[0], t.mlp_computed[1].roll(1))),
    ),
    "head without its soft cap": ("gemma2", bare_head),
    "head without its scale": ("cohere", bare_head),
    "head without its divisor": ("granite", bare_head),
}


def skip_if_capless(mutation):
    """transformers 5.17 runs Gemma 2 by sdpa, which lets its soft cap go by."""
    if "scores without soft cap" in mutation and family_model("gemma2").config._attn_implementation == "sdpa":
        pytest.skip("this transformers computes the model without a soft cap")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_breaking_one_thing_moves_the_grids_and_fails_the_self_check(mutation, monkeypatch):
    name, mutate = MUTATIONS[mutation]
    skip_if_capless(mutation)
    engine = best_engine(name)
    assert error_of(engine, name) < 1e-5
    mutate(monkeypatch)
    assert error_of(engine, name) > 1e-2
    choice = select.choose(anatomy_of(family_model(name)))
    assert choice.name != engine
    assert f"{engine} differs from plain forward passes by" in choice.reason


def test_rows_that_take_their_neighbors_state_are_noticed_in_a_recurrent_model(monkeypatch):
    from fasttrace.engines import rows

    monkeypatch.setattr(rows._Step, "_grow_hidden", lambda step, hidden: wrong(step, hidden))
    right = rows._Step.__dict__["_grow_hidden"]
    assert right is not None

    def wrong(step, hidden):
        source = step.tables.source
        grown = hidden if source is None else hidden.flatten(0, 1).index_select(0, source).unflatten(0, (-1, 7))
        return grown.roll(1, 0) if len(grown) > len(hidden) else grown

    assert error_of("rows", "mamba") > 1e-2


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi", "mpt"])
def test_as_many_rows_as_heads_do_not_confuse_biases_with_rows(name):
    """With 3 noise samples there are 4 base rows, and the tiny models have 4 heads."""
    anatomy, job, _ = case(name)
    corruption = draw((2, 4), anatomy.d_model, sigma=job.corruption.sigma, samples=3, seed=1)
    job = Job(job.token_ids, corruption, job.cells, None)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    for engine in ("fork", "rows"):
        scores = ENGINES[engine](anatomy, job, lambda: None)
        np.testing.assert_allclose(scores.cells, expected.cells, rtol=1e-4, err_msg=engine)


@pytest.mark.parametrize("name", ["llama", "gptj", "gemma3n_text", "bloom", "mpt", "falcon-alibi", "opt"])
@pytest.mark.parametrize("n_positions", [1, 4])
def test_prompts_as_long_as_there_are_heads_or_of_one_token_are_traced(name, n_positions):
    anatomy, job, _ = case(name)
    cells = tuple(cell for s in anatomy.streams for cell in grid_cells(s, 3, anatomy.n_layers, n_positions))
    corruption = draw((0, 1), anatomy.d_model, sigma=job.corruption.sigma, samples=2, seed=1)
    job = Job(job.token_ids[:n_positions], corruption, cells, None)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    for engine in (best_engine(name), "rows"):
        scores = ENGINES[engine](anatomy, job, lambda: None)
        np.testing.assert_allclose(scores.cells, expected.cells, rtol=2e-4, err_msg=engine)


def test_a_family_whose_attention_cannot_be_forked_says_so():
    anatomy, job, _ = case("mamba")
    with pytest.raises(FasttraceError, match="MambaMixer takes no cache of earlier keys and values; use engine='rows'"):
        ENGINES["fork"](anatomy, job, lambda: None)
    with pytest.raises(FasttraceError, match="0 of 4 blocks attended through the pack; use engine='rows'"):
        ENGINES["wavefront"](anatomy, job, lambda: None)
