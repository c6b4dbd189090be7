"""Every engine gives the reference's numbers, on every family, for every sweep."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrace import memories
from fasttrace.engines import ENGINES, readout
from fasttrace.engines.job import pack_of_jobs
from fasttrace.errors import EngineError, NumericsError
from fasttrace.experiment.cells import SITES, STREAMS, Edit
from fasttrace.models.hooks import output_hook
from fasttrace.planning.on_device import Writes
from tests.conftest import FAMILIES, N_LAYERS, all_grids, make_job, relative_error, tiny_anatomy, tiny_model

FAST_ENGINES = ("wavefront", "rows")


def run(engine, family, job, dtype=torch.float32):
    return ENGINES[engine](tiny_anatomy(family, dtype), job, lambda: None)


def assert_all_equal(family, job, tolerance=1e-5, dtype=torch.float32):
    expected = run("reference", family, job, dtype)
    for engine in FAST_ENGINES:
        scores = run(engine, family, job, dtype)
        assert scores.target == expected.target
        assert relative_error(scores, expected) < tolerance, engine
    return expected


@pytest.mark.parametrize("span", [(0, 2), (2, 5), (5, 7)], ids=["start", "middle", "end"])
@pytest.mark.parametrize("window", [1, 3, 10])
@pytest.mark.parametrize("samples", [1, 3])
def test_all_three_streams_equal_the_reference(family, samples, window, span):
    job = make_job(7, span, samples, all_grids(STREAMS, window, 7))
    expected = assert_all_equal(family, job)
    assert expected.cells.std() > 1e-3, "the grids must vary, or the comparison says nothing"


@pytest.mark.parametrize("n_positions", range(1, 13))
def test_every_prompt_length_from_1_to_12_equals_the_reference(family, n_positions):
    begin = n_positions // 3
    job = make_job(n_positions, (begin, min(n_positions, begin + 2)), 1, all_grids(STREAMS, 3, n_positions))
    assert_all_equal(family, job)


@pytest.mark.parametrize("site", SITES)
def test_every_site_equals_the_reference(family, site):
    assert_all_equal(family, make_job(6, (1, 3), 2, all_grids((site,), 2, 6)))


def test_float64_grids_agree_to_rounding(family):
    job = make_job(7, (1, 4), 2, all_grids(STREAMS, 3, 7))
    # the softmax of the readout is float32 by design: one part in 2**23
    assert_all_equal(family, job, tolerance=1e-6, dtype=torch.float64)


@st.composite
def edits(draw, n_positions):
    return Edit(
        draw(st.sampled_from(SITES)),
        draw(st.integers(0, N_LAYERS - 1)),
        draw(st.integers(0, n_positions - 1)),
        "clean",
    )


def slot(edit):
    """What an edit overwrites; two edits of one cell may not disagree about it."""
    kind = {"block_input": 0, "block_output": 0, "attention_output": 1}.get(edit.site, 2)
    return edit.layer + (edit.site == "block_output"), kind, edit.position


@st.composite
def sweeps(draw):
    n_positions = draw(st.integers(1, 9))
    begin = draw(st.integers(0, n_positions - 1))
    end = draw(st.integers(begin + 1, n_positions))
    cells = []
    for cell in draw(st.lists(st.lists(edits(n_positions), max_size=5), max_size=6)):
        source = {slot(edit): draw(st.sampled_from(["clean", "corrupted"])) for edit in cell}
        cells.append(tuple(edit._replace(source=source[slot(edit)]) for edit in cell))
    return make_job(n_positions, (begin, end), draw(st.sampled_from([1, 3])), tuple(cells))


@settings(max_examples=60, deadline=None)
@given(job=sweeps(), family=st.sampled_from(FAMILIES))
def test_any_set_of_edits_equals_the_reference(job, family):
    assert_all_equal(family, job)


def test_a_target_that_is_given_is_scored(family):
    job = make_job(5, (0, 2), 2, all_grids(("block_output",), 1, 5), target=11)
    assert assert_all_equal(family, job).target == 11


def test_the_clean_top_token_is_the_default_target(family):
    job = make_job(5, (0, 2), 1)
    scores = run("wavefront", family, job)
    assert scores.target == scores.clean.argmax()


def test_more_samples_do_not_change_the_first_ones(family):
    cells = all_grids(("attention_output",), 3, 6)
    one = run("wavefront", family, make_job(6, (1, 3), 1, cells))
    three = run("wavefront", family, make_job(6, (1, 3), 3, cells))
    np.testing.assert_allclose(three.cells[:, :1], one.cells, rtol=1e-5)


@pytest.mark.parametrize("engine", FAST_ENGINES)
def test_a_wrong_index_table_is_noticed(family, engine, monkeypatch):
    """The comparison has teeth: restoring from the neighbouring token moves the grids."""
    from fasttrace.engines import rows, wavefront

    module = {"wavefront": wavefront, "rows": rows}[engine]
    right = module.tables_of

    def shifted(*arguments):
        tables = right(*arguments)
        return replace(tables, blocks=[replace(block, writes=neighbours(block.writes)) for block in tables.blocks])

    def neighbours(writes):
        return {
            site: replace(each, tokens=each.tokens and (each.tokens[0], each.tokens[1] - 1))
            for site, each in writes.items()
        }

    job = make_job(7, (1, 4), 2, all_grids(("attention_output",), 3, 7))
    expected = run("reference", family, job)
    monkeypatch.setattr(module, "tables_of", shifted)
    assert relative_error(run(engine, family, job), expected) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_is_left_as_it_was(family, engine):
    from fasttrace.models.anatomy import anatomy_of

    model = tiny_model(family).train()
    before = (model.config._attn_implementation, [m.training for m in model.modules()])
    seen = []
    with output_hook(model.get_input_embeddings(), lambda hidden: seen.append(hidden.shape)):
        ENGINES[engine](anatomy_of(model), make_job(5, (1, 2), 1, all_grids(STREAMS, 2, 5)), lambda: None)
    assert (model.config._attn_implementation, [m.training for m in model.modules()]) == before
    assert seen, "a hook of the user's ran"
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


@pytest.mark.parametrize("engine", FAST_ENGINES)
def test_an_interrupted_pass_leaves_no_hook_behind(family, engine):
    from fasttrace.models.anatomy import anatomy_of

    model = tiny_model(family)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ENGINES[engine](anatomy_of(model), make_job(5, (1, 2), 1, all_grids(STREAMS, 2, 5)), interrupt)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_of_a_model_give_its_numbers(family, implementation):
    from fasttrace.models.anatomy import anatomy_of

    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    anatomy, job = anatomy_of(model), make_job(6, (1, 3), 2, all_grids(STREAMS, 3, 6))
    expected = ENGINES["reference"](anatomy, job, lambda: None)
    assert relative_error(ENGINES["wavefront"](anatomy, job, lambda: None), expected) < 1e-5
    assert model.config._attn_implementation == implementation


def test_gradients_switched_on_change_nothing(family):
    job = make_job(6, (1, 3), 1, all_grids(STREAMS, 3, 6))
    with torch.enable_grad():
        on = run("wavefront", family, job)
    with torch.no_grad():
        off = run("wavefront", family, job)
    np.testing.assert_array_equal(on.cells, off.cells)


@pytest.mark.parametrize("engine", FAST_ENGINES)
def test_an_overflow_names_its_block(family, engine):
    from fasttrace.models.anatomy import anatomy_of

    model = tiny_model(family)
    anatomy = anatomy_of(model)
    with torch.no_grad():
        next(p for p in anatomy.parts.down[2].parameters() if p.dim() > 1).fill_(float("inf"))
    with pytest.raises(NumericsError, match="block 2 produced inf or NaN in float32"):
        ENGINES[engine](anatomy, make_job(5, (1, 2), 1, all_grids(STREAMS, 2, 5)), lambda: None)


def test_a_float16_overflow_advises_bfloat16():
    from fasttrace.models.anatomy import anatomy_of

    anatomy = anatomy_of(tiny_model("llama", torch.float16))
    with torch.no_grad():
        next(anatomy.parts.down[1].parameters()).fill_(60000.0)
    with pytest.raises(NumericsError, match=r"block 1 .* float16: load the model with dtype='bfloat16'"):
        ENGINES["wavefront"](anatomy, make_job(5, (1, 2), 1), lambda: None)


def test_a_pass_inside_a_pass_is_refused(family):
    anatomy, job = tiny_anatomy(family), make_job(4, (1, 2), 1, all_grids(STREAMS, 2, 4))
    with pytest.raises(EngineError, match="running in this context already"):
        ENGINES["wavefront"](anatomy, job, lambda: ENGINES["wavefront"](anatomy, job, lambda: None))


def test_the_wavefront_calls_each_block_once(family):
    anatomy, job = tiny_anatomy(family), make_job(6, (1, 3), 3, all_grids(STREAMS, 3, 6))
    ticks = []
    ENGINES["wavefront"](anatomy, job, lambda: ticks.append(1))
    assert len(ticks) == N_LAYERS


def test_flops_are_those_that_torch_counts(family):
    from torch.utils.flop_counter import FlopCounterMode

    anatomy, job = tiny_anatomy(family), make_job(7, (1, 3), 2, all_grids(STREAMS, 3, 7))
    with FlopCounterMode(display=False) as counter:
        ENGINES["wavefront"](anatomy, job, lambda: None)
    # attention is counted under the causal mask by us and over whole rectangles by torch
    assert ENGINES["wavefront"].cost_of(anatomy, job).flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_an_attention_of_the_users_own_is_set_back_afterwards(family):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from fasttrace.models.anatomy import anatomy_of

    AttentionInterface.register("users_own", sdpa_attention_forward)
    AttentionMaskInterface.register("users_own", sdpa_mask)
    model = tiny_model(family)
    model.set_attn_implementation("users_own")
    job = make_job(5, (1, 3), 1, all_grids(STREAMS, 3, 5))
    scores = ENGINES["wavefront"](anatomy_of(model), job, lambda: None)
    assert relative_error(scores, run("reference", family, job)) < 1e-5
    assert model.config._attn_implementation == "users_own"


@pytest.mark.parametrize("chunk", [1, 5, 10**6])
def test_chunks_and_slices_of_the_readout_give_the_same_numbers(family, monkeypatch, chunk):
    job = make_job(7, (1, 4), 2, all_grids(STREAMS, 3, 7))
    whole = run("wavefront", family, job)
    monkeypatch.setattr(readout, "CPU_CHUNK", chunk)
    monkeypatch.setattr(readout, "CPU_SLICE", min(chunk, 3))
    assert relative_error(run("wavefront", family, job), whole) < 1e-5


def test_restoring_works_on_outputs_that_are_not_contiguous():
    from fasttrace.engines.blocks import restore

    hidden = torch.arange(24.0).reshape(2, 4, 3).transpose(0, 1)
    expected = hidden.clone()
    expected[2, 1] = expected[0, 0]
    restored = restore(hidden, Writes((torch.tensor([5]), torch.tensor([0])), None, torch.zeros(0)))
    assert torch.equal(restored, expected)


def test_all_tables_of_a_plan_reach_the_device_in_one_copy(monkeypatch):
    from fasttrace.planning import on_device as tables

    anatomy, job = tiny_anatomy("gpt2"), make_job(7, (1, 4), 2, all_grids(STREAMS, 3, 7))
    pack = pack_of_jobs([job], anatomy.n_layers, "suffix")
    copies = []
    right = torch.from_numpy
    monkeypatch.setattr(tables.torch, "from_numpy", lambda array: copies.append(len(array)) or right(array))
    memories.clear("packs")
    found = tables.tables_of(pack, torch.device("cpu"))
    assert tables.tables_of(pack, torch.device("cpu")) is found
    assert len(copies) == 1
    for block, moved in zip(pack.blocks, found.blocks, strict=True):
        np.testing.assert_array_equal(moved.origin, block.origin)
        np.testing.assert_array_equal(moved.position, block.origin % 7)
        assert (moved.source is None) == (block.source is None)
        if block.carried is not None:
            np.testing.assert_array_equal(moved.carried, block.carried)
        if moved.mlp_computed is not None:
            np.testing.assert_array_equal(moved.mlp_computed[0], block.mlp_keep)
            np.testing.assert_array_equal(moved.mlp_computed[1], block.mlp_spread)


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal")
"""Operations whose result the host has to wait for."""


class Watched(TorchDispatchMode):
    """Notes the operations of a pass while `on`."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.on = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.on:
            self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


def operations_inside(engine, family, monkeypatch):
    """Operations between the first block and the readout; before, transformers looks at the tokens for padding."""
    from fasttrace.engines import blocks as tables

    job, right, watched = make_job(7, (1, 4), 2, all_grids(STREAMS, 3, 7)), tables.LastBlock.scores, Watched()

    def switched(to):
        watched.on = to

    monkeypatch.setattr(tables.LastBlock, "scores", lambda *arguments: switched(False) or right(*arguments))
    first = (
        tiny_anatomy(family, torch.float32).blocks[0].register_forward_pre_hook(lambda *_: switched(not watched.names))
    )
    try:
        with watched:
            run(engine, family, job)
    finally:
        first.remove()
    return watched.names


@pytest.mark.parametrize("engine", FAST_ENGINES)
def test_nothing_waits_for_the_device_between_the_first_block_and_the_readout(family, engine, monkeypatch):
    """What would be a synchronisation on a GPU is an operation that gives the host a number."""
    names = operations_inside(engine, family, monkeypatch)
    assert len(names) > 100
    assert not set(names) & set(WAITING)


def test_an_operation_that_waits_is_noticed(family, monkeypatch):
    with output_hook(
        tiny_anatomy(family, torch.float32).blocks[1], lambda hidden: hidden if hidden.sum() > 0 else None
    ):
        assert "_local_scalar_dense" in operations_inside("wavefront", family, monkeypatch)
