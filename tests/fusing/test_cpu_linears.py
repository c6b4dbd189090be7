"""Products through oneDNN give MKL's numbers, and leave the model as it was."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from fasttrace import EngineError, PlanError, Tracer, memories
from fasttrace.engines import ENGINES, reference
from fasttrace.experiment.cells import STREAMS
from fasttrace.facts.dataset import read_facts
from fasttrace.fusing import choose as ops
from fasttrace.fusing import cpu_linears, measure
from fasttrace.fusing.choose import fused
from fasttrace.fusing.cpu_linears import (
    BLOCK_PROBE,
    HEAD_PROBE,
    TURNED_PROBE,
    Probe,
    fast_linears,
    gelu_in_product,
    onednn_does_bfloat16,
    onednn_is_faster,
    product_case,
)
from fasttrace.models.anatomy import anatomy_of
from fasttrace.models.hooks import output_hook
from fasttrace.runs.processes import Ranks
from fasttrace.runs.run import run
from tests.conftest import all_grids, make_job, relative_error, tiny_model
from tests.helpers.run_facts import OPTIONS, facts_of
from tests.helpers.tracers import tracer_with_text

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
    monkeypatch.setattr(ops, "CPU_WIDTH", 1)
    return seen


@pytest.fixture(autouse=True)
def unmeasured():
    """Nothing has been measured yet."""
    memories.clear("measurements")
    yield
    memories.clear("measurements")


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
def test_what_is_not_a_plain_linear_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64), Scaled(4, 4), nn.Linear(4, 4)])
    model[3].forward = lambda hidden: hidden  # somebody else's
    with fast_linears(model):
        assert ["forward" in vars(module) for module in model] == [True, False, False, True]
        assert torch.equal(model[3](torch.ones(4)), torch.ones(4))


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", [nn.Linear(32, 48), Conv1D(48, 32)], ids=["Linear", "Conv1D"])
def test_products_are_the_modules_own_for_views_too(linear, dtype):
    if dtype == torch.bfloat16 and not onednn_does_bfloat16():
        pytest.skip("oneDNN computes no bfloat16 on this CPU")
    module = copy.deepcopy(linear).to(dtype)
    hidden = torch.randn(3, 9, 32, dtype=dtype)[:, 4:]
    with torch.no_grad():
        expected = module(hidden.contiguous())
        with fast_linears([module]):
            assert "forward" in vars(module)
            found = module(hidden)
    assert found.dtype == dtype
    assert torch.linalg.norm((found - expected).float()) <= 1e-2 * torch.linalg.norm(expected.float())


@needs_onednn
@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_goes_to_onednn_where_it_computes_that(family, monkeypatch, supported):
    monkeypatch.setattr(ops, "onednn_does_bfloat16", lambda: supported)
    monkeypatch.setattr(ops, "onednn_is_faster", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(ops, "CPU_WIDTH", 1)
    model = tiny_model(family).bfloat16()
    with fused(anatomy_of(model)):
        linears = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
        assert all(("forward" in vars(module)) == supported for module in linears)


@needs_onednn
def test_weights_are_measured_as_they_lie(monkeypatch):
    strides = []
    right = cpu_linears.onednn_linear
    monkeypatch.setattr(cpu_linears, "onednn_linear", lambda *args: strides.append(args[1].stride()) or right(*args))
    for probe in (Probe(16, 32, 64), Probe(16, 32, 64, turned=True)):
        onednn_is_faster(94, probe)
    assert set(strides) == {(32, 1), (1, 64)}


@needs_onednn
def test_the_faster_library_is_taken_and_only_if_it_is_as_exact(monkeypatch):
    probe = Probe(16, 32, 64)
    right = cpu_linears.onednn_linear
    times = {right: 1.0, nn.functional.linear: 2.0}
    monkeypatch.setattr(measure, "_seconds", lambda linear, _: times[linear])
    assert onednn_is_faster(91, probe)
    times[right] = 1.95
    assert not onednn_is_faster(92, probe)
    times[right] = 1.0
    rounded = lambda hidden, weight: right(hidden.bfloat16().float(), weight)  # noqa: E731
    times[rounded] = 1.0
    monkeypatch.setattr(cpu_linears, "onednn_linear", rounded)
    assert not onednn_is_faster(93, probe)


@needs_onednn
@pytest.mark.parametrize("faster_in", ["blocks", "head"])
def test_blocks_and_head_are_decided_on_by_themselves(family, calls, monkeypatch, faster_in):
    monkeypatch.setattr(ops, "onednn_is_faster", lambda _, probe: (probe == HEAD_PROBE) == (faster_in == "head"))
    anatomy = anatomy_of(tiny_model(family))
    with fused(anatomy):
        ENGINES["wavefront"](anatomy, make_job(5, (1, 3), 1, all_grids(STREAMS, 3, 5)), lambda: None)
    head = anatomy.model.get_output_embeddings().weight.shape
    assert calls
    assert all((shape == head) == (faster_in == "head") for shape in calls)


@needs_onednn
def test_gpt2s_turned_weights_are_decided_on_by_themselves(monkeypatch):
    monkeypatch.setattr(ops, "onednn_is_faster", lambda _, probe: probe == TURNED_PROBE)
    monkeypatch.setattr(ops, "CPU_WIDTH", 1)
    model = tiny_model("gpt2")
    with fused(anatomy_of(model)):
        assert "forward" not in vars(model.get_output_embeddings())
        assert all("forward" in vars(module) for module in model.modules() if isinstance(module, Conv1D))


@needs_onednn
def test_a_product_is_measured_once(monkeypatch):
    measured = []
    monkeypatch.setattr(cpu_linears, "_gain", lambda probe: measured.append(probe) or 2.0)
    for _ in range(2):
        assert onednn_is_faster(2, HEAD_PROBE)
        assert onednn_is_faster(2, TURNED_PROBE)
    assert measured == [HEAD_PROBE, TURNED_PROBE]
    assert onednn_is_faster(3, HEAD_PROBE)
    assert len(measured) == 3, "other numbers of threads are measured by themselves"


@needs_onednn
def test_a_run_settles_before_it_computes(tmp_path, wide):
    class Other(Ranks):
        """Another process found MKL faster."""

        def all(self, work):
            found = super().all(work)
            return [*found, dict.fromkeys(found[0], False)] if work is measure.choices else found

    run(tracer_with_text(), read_facts(facts_of(3)), tmp_path / "store", ranks=Other(), **OPTIONS)
    assert wide
    assert set(measure.choices().values()) == {False}


class Perceptron(nn.Module):
    """An MLP whose forward is given."""

    def __init__(self, forward, gelu=NewGELUActivation, linear=nn.Linear):
        super().__init__()
        self.up, self.down = (linear(*sizes) for sizes in ((16, 64), (64, 16)))
        self.act, self.computed = gelu(), forward

    def forward(self, hidden):
        return self.computed(self, hidden)


def usual(mlp, hidden):
    return mlp.down(mlp.act(mlp.up(hidden)))


def conv1d(inputs, outputs):
    return Conv1D(outputs, inputs)


def joined_and_apart(mlp, hidden):
    """(whether the GELU is in the product, with it, without it)."""
    with torch.no_grad():
        apart = mlp(hidden)
        with gelu_in_product(mlp, mlp.down, set(mlp.modules())):
            return "forward" in vars(mlp.act), mlp(hidden), apart


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("linear", [nn.Linear, conv1d])
@pytest.mark.parametrize("gelu", cpu_linears.GELUS)
def test_a_gelu_in_the_product_before_it_is_that_gelu(gelu, linear, dtype):
    if dtype == torch.bfloat16 and not onednn_does_bfloat16():
        pytest.skip("oneDNN computes no bfloat16 on this CPU")
    mlp = Perceptron(usual, gelu, linear).to(dtype)
    nn.init.normal_(mlp.up.weight)
    is_joined, found, expected = joined_and_apart(mlp, torch.randn(1, 9, 16).to(dtype))
    assert is_joined
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not any("forward" in vars(module) for module in mlp.modules())


@needs_onednn
@pytest.mark.parametrize(
    "forward",
    [
        lambda mlp, hidden: mlp.down(mlp.up(mlp.act(hidden))),
        lambda mlp, hidden: mlp.down(mlp.act(mlp.up(hidden)) + mlp.up(hidden)),
        lambda mlp, hidden: mlp.down(mlp.act(1.01 * mlp.up(hidden))),
    ],
    ids=["before the product", "beside it", "scaled"],
)
@pytest.mark.parametrize("down", ["random", "zero"])
def test_an_mlp_of_another_kind_is_left_alone(forward, down):
    mlp = Perceptron(forward)
    if down == "zero":
        nn.init.zeros_(mlp.down.weight)
    is_joined, found, expected = joined_and_apart(mlp, torch.randn(1, 9, 16))
    assert not is_joined
    assert torch.equal(found, expected)


@needs_onednn
def test_an_mlp_that_cannot_be_tried_is_left_alone():
    def forward(mlp, hidden):
        if hidden.shape[1] == 4:
            raise TypeError("takes a layer index")
        return usual(mlp, hidden)

    assert not joined_and_apart(Perceptron(forward), torch.randn(1, 9, 16))[0]


@needs_onednn
def test_an_mlp_that_has_changed_is_tried_again():
    mlp = Perceptron(usual)
    assert joined_and_apart(mlp, torch.randn(1, 9, 16))[0]
    mlp.act = GELUActivation()
    is_joined, found, expected = joined_and_apart(mlp, torch.randn(1, 9, 16))
    assert is_joined
    torch.testing.assert_close(found, expected)


@needs_onednn
@pytest.mark.parametrize("part", ["up", "act", "down"])
def test_hooks_of_others_see_what_they_saw_and_nothing_else(part):
    mlp, seen = Perceptron(usual), []
    hidden = torch.randn(1, 9, 16)
    with output_hook(getattr(mlp, part), lambda output: seen.append(output)):
        is_joined, _, _ = joined_and_apart(mlp, hidden)
    assert not is_joined
    assert len(seen) == 2
    torch.testing.assert_close(*seen)


@needs_onednn
def test_a_gelu_that_mlps_share_stays_a_gelu(calls):
    model = tiny_model("gpt2")
    anatomy = anatomy_of(model)
    for mlp in anatomy.parts.mlp:
        mlp.act = anatomy.parts.mlp[0].act
    job = make_job(7, (1, 4), 2, all_grids(STREAMS, 3, 7))
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    with fused(anatomy):
        scores = ENGINES["wavefront"](anatomy, job, lambda: None)
    assert relative_error(scores, expected) < 1e-5


@needs_onednn
def test_a_linear_of_a_class_of_its_own_computes_what_it_computes(calls):
    class Adapted(Conv1D):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model = tiny_model("gpt2")
    model.transformer.h[1].mlp.c_fc.__class__ = Adapted
    anatomy = anatomy_of(model)
    job = make_job(7, (1, 4), 2, all_grids(STREAMS, 3, 7))
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    with fused(anatomy):
        scores = ENGINES["wavefront"](anatomy, job, lambda: None)
    assert relative_error(scores, expected) < 1e-5


@needs_onednn
def test_gpt2s_gelu_is_computed_in_the_product(calls):
    model = tiny_model("gpt2")
    with fused(anatomy_of(model)):
        mlp = anatomy_of(model).parts.mlp[0]
        values = torch.linspace(-3, 3, 7)
        assert torch.equal(mlp.act(values), values)
        assert "forward" in vars(mlp.c_fc)


def test_narrow_models_are_not_measured(family, monkeypatch):
    monkeypatch.setattr(ops, "onednn_is_faster", lambda *_: pytest.fail("measured"))
    with fused(anatomy_of(tiny_model(family))):
        pass


@pytest.fixture
def wide(monkeypatch):
    """Tiny models are as good as wide ones, and products are not measured."""
    monkeypatch.setattr(ops, "CPU_WIDTH", 1)
    monkeypatch.delenv(cpu_linears.VARIABLE, raising=False)
    measured = []
    monkeypatch.setattr(cpu_linears, "_gain", lambda probe: measured.append(probe) or 2.0)
    return measured


REQUEST = {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 1, "window": 3}


@pytest.mark.slow
@needs_onednn
@pytest.mark.parametrize("choice", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_results_name_the_libraries_that_multiplied(name, choice, wide):
    probe = TURNED_PROBE if name == "gpt2" else BLOCK_PROBE
    measure._CHOSEN.update({product_case(1, probe): choice, product_case(1, HEAD_PROBE): not choice})
    blocks, head = ("onednn", "mkl") if choice else ("mkl", "onednn")
    result = Tracer(tiny_model(name)).trace(**REQUEST)
    assert result.metadata["cpu_matmul"] == {"blocks": blocks, "head": head}
    for options in ({"engine": "reference"}, {"engine": "rows"}):
        found = Tracer(tiny_model(name)).trace(**REQUEST, **options).metadata["cpu_matmul"]
        plain = {"blocks": "mkl", "head": "mkl"}
        assert found == (plain if options["engine"] == "reference" else result.metadata["cpu_matmul"])
    unfused = Tracer(tiny_model(name), fuse=False).trace(**REQUEST)
    assert unfused.metadata["cpu_matmul"] == {"blocks": "mkl", "head": "mkl"}


@needs_onednn
@pytest.mark.parametrize("library", ["mkl", "onednn"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_library_that_is_named_multiplies_and_nothing_is_measured(library, by, wide, calls, monkeypatch):
    monkeypatch.setattr(ops, "CPU_WIDTH", 10**6)
    monkeypatch.setenv(cpu_linears.VARIABLE, library if by == "environment" else "")
    options = {"cpu_matmul": library} if by == "argument" else {}
    result = Tracer(tiny_model("llama"), **options).trace(**REQUEST)
    assert result.metadata["cpu_matmul"] == {"blocks": library, "head": library}
    assert bool(calls) == (library == "onednn")
    assert not wide


@needs_onednn
def test_the_argument_wins_over_the_environment(wide, monkeypatch):
    monkeypatch.setenv(cpu_linears.VARIABLE, "onednn")
    result = Tracer(tiny_model("llama"), cpu_matmul="mkl").trace(**REQUEST)
    assert result.metadata["cpu_matmul"] == {"blocks": "mkl", "head": "mkl"}


def test_an_unknown_library_is_an_error_before_anything_is_loaded(monkeypatch):
    with pytest.raises(PlanError, match="cpu_matmul is 'blis': give one of auto, mkl, onednn"):
        Tracer.from_pretrained("nowhere/at-all", cpu_matmul="blis")
    with pytest.raises(PlanError, match="cpu_matmul is 'MKL'"):
        Tracer(tiny_model("llama"), cpu_matmul="MKL")
    monkeypatch.setenv(cpu_linears.VARIABLE, "blis")
    with pytest.raises(PlanError, match="FASTTRACE_CPU_MATMUL is 'blis': give one of auto, mkl, onednn"):
        Tracer(tiny_model("llama"))


@pytest.mark.parametrize(
    ("library", "options", "dtype", "message"),
    [
        ("onednn", {"fuse": False}, torch.float32, "which takes fused operations"),
        ("onednn", {}, torch.float64, "oneDNN computes no float64 on this CPU"),
    ],
)
def test_a_library_that_cannot_multiply_is_an_error(library, options, dtype, message):
    with pytest.raises(EngineError, match=f"cpu_matmul is '{library}', .*{message}"):
        Tracer(tiny_model("llama", dtype), cpu_matmul=library, **options).trace(**REQUEST)


def test_a_library_that_this_torch_lacks_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with pytest.raises(EngineError, match="cpu_matmul is 'mkl', and torch computes float32 by blas here"):
        Tracer(tiny_model("llama"), cpu_matmul="mkl").trace(**REQUEST)
    monkeypatch.setattr(cpu_linears, "_has_onednn", lambda: False)
    with pytest.raises(EngineError, match="cpu_matmul is 'onednn', and this build of torch has no oneDNN"):
        Tracer(tiny_model("llama"), cpu_matmul="onednn").trace(**REQUEST)


@needs_onednn
def test_bfloat16_products_are_onednns_and_the_result_says_so():
    if not onednn_does_bfloat16():
        pytest.skip("oneDNN computes no bfloat16 on this CPU")
    model = tiny_model("llama", torch.bfloat16)
    assert Tracer(model).trace(**REQUEST).metadata["cpu_matmul"] == {"blocks": "onednn", "head": "onednn"}
    with pytest.raises(EngineError, match="cpu_matmul is 'mkl', and torch computes bfloat16 by onednn here"):
        Tracer(model, cpu_matmul="mkl").trace(**REQUEST)
