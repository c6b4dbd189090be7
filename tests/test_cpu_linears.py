"""Products through oneDNN give MKL's numbers, and leave the model as it was."""

import pytest
import torch
from torch import nn

from fasttrace import cpu_linears, ops
from fasttrace.adapters import anatomy_of
from fasttrace.cells import STREAMS
from fasttrace.cpu_linears import fast_linears, onednn_is_faster
from fasttrace.engines import ENGINES, reference
from fasttrace.ops import fused
from tests.conftest import all_grids, make_job, tiny_model
from tests.test_engines import relative_error

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch is built without oneDNN"
)


@pytest.fixture
def calls(monkeypatch):
    """oneDNN is taken, and its calls are counted."""
    seen = []
    right = cpu_linears.onednn_linear
    monkeypatch.setattr(cpu_linears, "onednn_linear", lambda *args: seen.append(args[1].shape) or right(*args))
    monkeypatch.setattr(ops, "onednn_is_faster", lambda *_: True)
    monkeypatch.setattr(ops, "ONEDNN_WIDTH", 1)
    return seen


@needs_onednn
@pytest.mark.parametrize("fuse", [True, False])
def test_grids_are_the_same_through_onednn(family, calls, fuse):
    anatomy = anatomy_of(tiny_model(family))
    job = make_job(7, (1, 4), 2, all_grids(STREAMS, 3, 7))
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    with fused(anatomy, fuse):
        scores = ENGINES["wavefront"](anatomy, job, lambda: None)
    assert relative_error(scores, expected) < 1e-5
    assert bool(calls) == fuse


@needs_onednn
def test_the_model_has_its_own_forward_again_afterwards(family, calls):
    model = tiny_model(family)
    with fused(anatomy_of(model)):
        assert any("forward" in vars(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@needs_onednn
def test_what_is_not_a_plain_float32_linear_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), Scaled(4, 4), nn.Linear(4, 4)])
    model[3].forward = lambda hidden: hidden  # somebody else's
    with fast_linears(model):
        assert ["forward" in vars(module) for module in model] == [True, False, False, True]
        assert torch.equal(model[3](torch.ones(4)), torch.ones(4))


@needs_onednn
def test_few_turned_weights_are_kept_and_the_right_ones():
    turned = cpu_linears._Transposed()
    weights = [torch.randn(3, 5) for _ in range(4)]
    for weight in (weights[0], weights[1], weights[0], weights[2], weights[3], weights[0]):
        assert torch.equal(turned.of(weight), weight.t())
        assert len(turned.kept) <= cpu_linears.KEPT_TRANSPOSED


@needs_onednn
def test_the_faster_library_is_taken_and_only_if_it_is_as_exact(monkeypatch):
    probe = (16, 32, 64)
    right = cpu_linears.onednn_linear
    times = {right: 1.0, nn.functional.linear: 2.0}
    monkeypatch.setattr(cpu_linears, "_seconds", lambda linear, *_: times[linear])
    onednn_is_faster.cache_clear()
    assert onednn_is_faster(91, probe)
    times[right] = 1.9
    assert not onednn_is_faster(92, probe)
    times[right] = 1.0
    rounded = lambda hidden, weight, bias: right(hidden.bfloat16().float(), weight, bias)  # noqa: E731
    monkeypatch.setattr(cpu_linears, "onednn_linear", rounded)
    assert not onednn_is_faster(93, probe)
    onednn_is_faster.cache_clear()


@needs_onednn
@pytest.mark.parametrize("faster_in", ["blocks", "head"])
def test_blocks_and_head_are_decided_on_by_themselves(family, calls, monkeypatch, faster_in):
    probe = {"blocks": cpu_linears.BLOCK_PROBE, "head": cpu_linears.HEAD_PROBE}[faster_in]
    monkeypatch.setattr(ops, "onednn_is_faster", lambda _, measured: measured == probe)
    anatomy = anatomy_of(tiny_model(family))
    with fused(anatomy):
        ENGINES["wavefront"](anatomy, make_job(5, (1, 3), 1, all_grids(STREAMS, 3, 5)), lambda: None)
    head = anatomy.model.get_output_embeddings().weight.shape
    assert calls
    assert all((shape == head) == (faster_in == "head") for shape in calls)


def test_narrow_models_are_not_measured(family, monkeypatch):
    monkeypatch.setattr(ops, "onednn_is_faster", lambda *_: pytest.fail("measured"))
    with fused(anatomy_of(tiny_model(family))):
        pass
