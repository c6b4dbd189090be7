"""Norms, gated MLPs and rotary embeddings by kernels: the same grids, only where they are faster, and gone afterwards.

The kernels' torch paths stand in for them on the CPU.
"""

import copy
import gc
import logging
import sys
import time
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from fasttrace import memories
from fasttrace.api import Tracer
from fasttrace.engines import ENGINES
from fasttrace.facts.dataset import read_facts
from fasttrace.fusing import choose as ops
from fasttrace.fusing import glue as kernel_glue
from fasttrace.fusing import measure
from fasttrace.fusing import rotary as kernel_rotary
from fasttrace.fusing.choose import fused
from fasttrace.fusing.measure import case_of, gain_of, is_taken
from fasttrace.models.anatomy import anatomy_of
from fasttrace.models.hooks import evaluating, input_hook, output_hook
from fasttrace.runs.processes import Ranks
from fasttrace.runs.run import run
from tests.conftest import all_grids, make_job
from tests.helpers import zoo
from tests.helpers.families import best_engine
from tests.helpers.run_facts import OPTIONS, facts_of
from tests.helpers.tracers import tracer_with_text

GATES, TURNS = {"swiglu(silu)": 4}, {"rotary": 4}
LLAMA = {"rms_norm": 9, **GATES, **TURNS}
GEMMA = {"rms_norm(offset=1)": 9, "swiglu(gelu_tanh)": 4, **TURNS}
CALLS = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "phi3", "granite"], LLAMA),
    **dict.fromkeys(["qwen3", "olmo2", "olmo3"], LLAMA | {"rms_norm": 17}),
    "smollm3": LLAMA | {"rotary": 3},
    "mixtral": {"rms_norm": 9, "rotary": 4},
    "qwen3_moe": {"rms_norm": 17, "rotary": 4},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"rms_norm(offset=1)": 17},
    "gemma3_text": GEMMA | {"rms_norm(offset=1)": 25},
    "gemma3n_text": {"rms_norm": 40, "swiglu(gelu_tanh)": 4},
    "glm4": {"rms_norm": 17, "swiglu(silu)": 4},
    "deepseek_v3": {"rms_norm": 17, "swiglu(silu)": 1},
    "gpt_oss": {"rms_norm": 9},
    "mamba": {"rms_norm": 5},
    "stablelm": GATES | TURNS,
    **dict.fromkeys(["cohere", "cohere2"], GATES),
    **dict.fromkeys(["gpt_neox", "falcon", "phi", "starcoder2", "nemotron"], TURNS),
}
"""Family -> calls of kernels in a forward pass through four blocks; the other families have none."""

IDS = torch.arange(1, 9)[None]


@pytest.fixture(autouse=True)
def anew():
    """Nothing has been found out yet, and what is found out here is forgotten."""
    memories.clear()
    yield
    memories.clear()


@pytest.fixture
def calls(monkeypatch):
    """Kernels' torch paths are taken on the CPU; counts their calls."""
    seen = Counter()

    def counted(module, name, kind):
        right = getattr(module, name)

        def kernel(*args, **options):
            seen[kind(*args, **options)] += options.get("backend") != "torch"
            return right(*args, **options)

        monkeypatch.setattr(module, name, kernel)

    def kind_of_norm(x, weight, eps, *, offset, round_before_weight, backend=None):
        return "rms_norm" if round_before_weight else f"rms_norm(offset={offset:g})"

    counted(kernel_glue, "rms_norm", kind_of_norm)
    counted(kernel_glue, "swiglu", lambda gate, up, activation, backend=None: f"swiglu({activation})")
    counted(kernel_rotary, "rotary", lambda *_, backend=None: "rotary")
    monkeypatch.setattr(ops, "GLUE_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(ops, "find_spec", lambda name: "as if it were there" if name == "triton" else None)
    monkeypatch.setattr(measure, "speedup", lambda *_: 2.0)
    return seen


def logits_of(model):
    with evaluating(model):
        return model(IDS, use_cache=False).logits


def fused_logits(anatomy):
    with fused(anatomy):
        return logits_of(anatomy.model)


def replaced_in(model):
    """Names of modules with a forward of their own."""
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def rotary_of(anatomy):
    return sys.modules[type(anatomy.parts.mixers[0]).__module__].apply_rotary_pos_emb


@pytest.mark.parametrize("name", zoo.LISTED)
def test_grids_with_kernels_are_those_without(name, calls):
    anatomy = anatomy_of(zoo.tiny_model(name))
    job, engine = make_job(cells=all_grids(anatomy.streams, 3, 7)), ENGINES[best_engine(name)]
    with fused(anatomy, fuse=False):
        plain = engine(anatomy, job, lambda: None)
    assert not +calls
    with fused(anatomy):
        scores = engine(anatomy, job, lambda: None)
    assert np.abs(scores.cells - plain.cells).max() < 1e-5 * np.ptp(plain.cells)
    calls.clear()
    fused_logits(anatomy)
    assert +calls == CALLS.get(name, {})


def test_the_comparison_of_grids_sees_a_wrong_kernel(calls, monkeypatch):
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    plain = logits_of(anatomy.model)
    fused_logits(anatomy)
    right = kernel_glue.rms_norm
    monkeypatch.setattr(kernel_glue, "rms_norm", lambda *args, **options: 1.01 * right(*args, **options))
    assert (fused_logits(anatomy) - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "convention"),
    [(LlamaRMSNorm, (0, True)), (Gemma2RMSNorm, (1, False)), (Gemma3nRMSNorm, (0, False)), (Olmo2RMSNorm, (0, False))],
)
@pytest.mark.parametrize("width", [16, 1024])
def test_conventions_are_told_apart_whatever_the_weights_are(kind, convention, width, dtype):
    norm = kind(width, eps=1e-6).to(dtype)
    before = norm.weight.clone()
    with torch.no_grad():
        assert kernel_glue._convention_of(norm) == convention
    assert torch.equal(norm.weight, before)


class OtherRMSNorm(nn.Module):
    """Nearly an RMS norm."""

    def __init__(self, forward, width=32, eps=1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps, self.computed = eps, forward

    def forward(self, hidden):
        return self.computed(self, hidden)


def plain_rms_norm(norm, x, eps=1e-6):
    return norm.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize(
    ("forward", "is_taken"),
    [
        (plain_rms_norm, True),
        (lambda norm, x: plain_rms_norm(norm, x) + norm.bias, False),
        (lambda norm, x: plain_rms_norm(norm, x, eps=1e-5), False),
        (lambda norm, x: plain_rms_norm(norm, x - x.mean(-1, keepdim=True)), False),
        (lambda norm, x: 1.02 * plain_rms_norm(norm, x), False),
        (lambda norm, x: plain_rms_norm(norm, x).double(), False),
        (lambda norm, x: plain_rms_norm(norm, x)[0], False),
    ],
    ids=["it is one", "a bias", "another eps", "centered", "scaled", "another dtype", "another shape"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_nearly_an_rms_norm_is_left_alone(forward, is_taken, dtype, calls):
    model = zoo.tiny_model("llama", dtype)
    anatomy, model.model.norm = anatomy_of(model), OtherRMSNorm(forward).to(dtype)
    with fused(anatomy):
        assert ("forward" in vars(model.model.norm)) == is_taken
        assert "forward" in vars(anatomy.blocks[0].input_layernorm)


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        ("silu", "swiglu(silu)"),
        ("gelu_pytorch_tanh", "swiglu(gelu_tanh)"),
        ("gelu_python_tanh", "swiglu(gelu_tanh)"),
        ("gelu_new", "swiglu(gelu_tanh)"),
        ("gelu", None),
        ("quick_gelu", None),
        ("relu", None),
    ],
)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_gate_is_the_kernels_if_its_activation_is(name, activation, kind, calls):
    anatomy = anatomy_of(zoo.tiny_model(name, hidden_act=activation))
    plain = logits_of(anatomy.model)
    torch.testing.assert_close(fused_logits(anatomy), plain, rtol=1e-4, atol=1e-5)
    assert {each for each in +calls if each.startswith("swiglu")} == ({kind} if kind else set())


def test_an_mlp_with_more_than_a_gate_is_left_alone(calls):
    anatomy = anatomy_of(zoo.tiny_model("gemma3n_text", activation_sparsity_pattern=[0.9, 0.0, 0.9, 0.0]))
    with fused(anatomy):
        assert ["forward" in vars(mlp) for mlp in anatomy.parts.mlp] == [True] * 4, "in chunks on a CPU"
    with kernel_glue.fused_glue(anatomy):
        assert ["forward" in vars(mlp) for mlp in anatomy.parts.mlp] == [False, True, False, True]


def test_half_precision_rounds_as_the_model_does(calls):
    for name in ("llama", "gemma3_text", "gemma3n_text", "olmo2", "phi3"):
        anatomy = anatomy_of(zoo.tiny_model(name, torch.bfloat16))
        plain = logits_of(anatomy.model)
        assert torch.equal(fused_logits(anatomy), plain)
    norms = {"rms_norm", "rms_norm(offset=0)", "rms_norm(offset=1)"}
    assert set(+calls) == norms | {"swiglu(silu)", "swiglu(gelu_tanh)", "rotary"}


def test_everything_is_put_back_when_a_forward_raises(calls):
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    own = rotary_of(anatomy)

    def fail(_):
        assert replaced_in(anatomy.model) > {"model.norm", "model.layers.0.mlp", "model.layers.3.input_layernorm"}
        assert rotary_of(anatomy) is not own
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="middle"), output_hook(anatomy.blocks[2], fail):
        fused_logits(anatomy)
    assert not replaced_in(anatomy.model)
    assert rotary_of(anatomy) is own


def test_what_was_found_out_keeps_no_model_alive(calls):
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    fused_logits(anatomy)
    model = weakref.ref(anatomy.model)
    del anatomy
    gc.collect()
    assert model() is None


def test_only_dense_models_on_devices_with_triton_are_changed(calls, monkeypatch):
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    own = rotary_of(anatomy)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "find_spec", lambda _: None)
        fused_logits(anatomy)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "GLUE_DEVICES", ("cuda",))
        fused_logits(anatomy)
    with monkeypatch.context() as patch:
        patch.setattr(anatomy.model, "quantization_method", "of some kind", raising=False)
        fused_logits(anatomy)
    with fused(anatomy, fuse=False):
        assert rotary_of(anatomy) is own
        assert not replaced_in(anatomy.model)
    assert not measure.choices()
    fused_logits(anatomy_of(zoo.tiny_model("llama", torch.float64)))
    assert not +calls


def test_modules_with_a_forward_or_listeners_of_somebody_are_left_alone(calls):
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    first, second, *_ = anatomy.blocks
    norm, mlp = first.input_layernorm, first.mlp
    norm.forward, mlp.forward = copy.copy(norm.forward), copy.copy(mlp.forward)
    seen = []
    with output_hook(second.mlp.act_fn, lambda hidden: seen.append(hidden.shape)):
        fused_logits(anatomy)
    assert seen == [(1, 8, 48)]
    calls.clear()
    fused_logits(anatomy)
    assert +calls == {"rms_norm": 8, "swiglu(silu)": 3, "rotary": 4}
    assert replaced_in(anatomy.model) == {"model.layers.0.input_layernorm", "model.layers.0.mlp"}


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_hooks_of_others_see_what_they_saw(name, calls):
    anatomy = anatomy_of(zoo.tiny_model(name))
    mlp = anatomy.parts.mlp[1]
    gate = getattr(mlp, "gate_proj", None) or mlp.gate_up_proj
    seen = []

    def look():
        with (
            output_hook(gate, lambda hidden: seen.append(hidden)),
            input_hook(mlp.down_proj, lambda args, _: seen.append(args[0])),
            output_hook(anatomy.blocks[1].input_layernorm, lambda hidden: seen.append(hidden)),
        ):
            logits_of(anatomy.model)

    look()
    with fused(anatomy):
        look()
    assert len(seen) == 6
    for plain, by_kernel in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(by_kernel, plain)


@pytest.mark.parametrize(
    ("module", "kernel"), [(kernel_glue, "rms_norm"), (kernel_glue, "swiglu"), (kernel_rotary, "rotary")]
)
def test_a_kernel_that_fails_is_told_once_and_left_out(module, kernel, calls, monkeypatch, caplog):
    right = getattr(module, kernel)

    def failing(*args, **options):
        if options.get("backend") != "torch":
            raise RuntimeError("does not compile\nhere is why")
        return right(*args, **options)

    monkeypatch.setattr(module, kernel, failing)
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    plain = logits_of(anatomy.model)
    caplog.set_level(logging.INFO, "fasttrace")
    for _ in range(2):
        torch.testing.assert_close(fused_logits(anatomy), plain)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert warned[0].startswith(f"kernel {kernel}")
    assert warned[0].endswith("RuntimeError: does not compile")
    assert not any(each.startswith(kernel) for each in +calls)
    assert len(+calls) == 2
    told = [record.getMessage() for record in caplog.records if record.getMessage().endswith(": taken")]
    assert len(told) == 2


def test_a_kernel_with_other_numbers_is_left_out(calls, monkeypatch, caplog):
    right = kernel_glue.swiglu

    def wrong(*args, **options):
        return right(*args, **options) * (1 if options.get("backend") else 1.001)

    monkeypatch.setattr(kernel_glue, "swiglu", wrong)
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    plain = logits_of(anatomy.model)
    torch.testing.assert_close(fused_logits(anatomy), plain)
    assert "results are off by" in caplog.text


def test_a_kernel_that_is_not_clearly_faster_is_left_out(calls, monkeypatch):
    monkeypatch.setattr(measure, "speedup", lambda *_: 1.04)
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    fused_logits(anatomy)
    calls.clear()
    fused_logits(anatomy)
    assert not +calls
    with kernel_glue.fused_glue(anatomy):
        assert not replaced_in(anatomy.model)


def test_a_kernel_is_measured_once_for_a_size(calls, monkeypatch):
    measured = []
    monkeypatch.setattr(measure, "speedup", lambda kernel, own, inputs: measured.append(inputs[0].shape) or 2.0)
    for name in ("llama", "mistral", "qwen3"):
        anatomy = anatomy_of(zoo.tiny_model(name))
        fused_logits(anatomy)
        fused_logits(anatomy)
    tokens = measure.TOKENS
    assert measured == [(tokens, 32), (tokens, 96), (1, 4, tokens, 8), (4 * tokens, 8)]
    fused_logits(anatomy_of(zoo.tiny_model("llama", intermediate_size=40)))
    assert measured[4:] == [(tokens, 80)]


def test_the_faster_of_two_is_told():
    def slow(x):
        time.sleep(2e-3)
        return x

    ones = torch.ones(2)
    assert gain_of(torch.clone, slow, ones) > 1.5
    assert gain_of(slow, torch.clone, ones) < 0.9
    with pytest.raises(ArithmeticError, match="off by"):
        gain_of(torch.clone, lambda x: 2 * x, ones)


def test_processes_settle_on_what_all_take():
    cases = [case_of(kind, (7,), torch.float32, torch.device("cpu")) for kind in "abc"]
    assert all(is_taken(case, lambda: 2.0) for case in cases[:2])
    measure.settle([measure.choices(), {cases[0]: False, cases[2]: False}])
    found = [is_taken(case, lambda: 2.0) for case in cases]
    assert found == [False, False, True], "one was left out there, one was not even compared"


def test_a_run_settles_before_it_computes(tmp_path, calls):
    class Other(Ranks):
        """Another process found no kernel faster."""

        def all(self, work):
            found = super().all(work)
            return [*found, dict.fromkeys(found[0], False)] if work is measure.choices else found

    run(tracer_with_text("llama"), read_facts(facts_of(3)), tmp_path / "store", ranks=Other(), **OPTIONS)
    assert {case.kind for case in measure.choices()} == LLAMA.keys()
    assert not any(measure.choices().values())


def test_heads_before_tokens_are_normed_where_they_lie(calls):
    anatomy = anatomy_of(zoo.tiny_model("qwen3"))
    norm = anatomy.blocks[0].self_attn.q_norm
    heads = torch.randn(1, 5, 12, 8)
    views = [heads.transpose(1, 2), heads[0], heads[:, :, ::3].transpose(1, 2), heads[:, :, :4].transpose(1, 2)]
    expected = [norm(view) for view in views]
    with fused(anatomy), torch.no_grad():
        calls.clear()
        found = [norm(view) for view in views]
        assert norm(views[0].bfloat16()).dtype == torch.promote_types(torch.bfloat16, norm.weight.dtype)
    assert calls["rms_norm"] == 4
    for each, wanted in zip(found, expected, strict=True):
        assert each.stride() == wanted.stride()
        assert torch.equal(each, wanted)


class TestRotary:
    def arguments(self, rotated=8):
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 4, 5, 8), (2, 2, 5, 8), (2, 5, rotated), (2, 5, rotated)
        return [torch.randn(shape, generator=generator) for shape in shapes]

    def test_other_arguments_go_to_the_models_function(self, calls):
        own = rotary_of(anatomy_of(zoo.tiny_model("llama")))
        rotary = kernel_rotary.Rotary(own)
        q, k, cos, sin = self.arguments()
        rotary(q, k, cos, sin)
        calls.clear()
        for args, options in (
            ((q, k, cos, sin, 1), {}),
            ((q, k, cos, sin), {"unsqueeze_dim": 1}),
            ((q.transpose(1, 2), k.transpose(1, 2), cos, sin), {"unsqueeze_dim": 2}),
            ((q, k, cos.double(), sin.double()), {}),
            ((q[0], k[0], cos[:1], sin[:1]), {}),
        ):
            assert all(map(torch.equal, rotary(*args, **options), own(*args, **options)))
        assert not +calls
        assert all(map(torch.equal, rotary(q, k, cos, sin), own(q, k, cos, sin)))
        assert +calls == {"rotary": 1}

    @pytest.mark.parametrize(
        ("name", "is_taken"),
        [("llama", True), ("phi3", True), ("gpt_neox", True), ("cohere", False), ("glm4", False), ("gpt_oss", False)],
    )
    def test_it_is_the_kernels_only_if_it_turns_halves(self, name, is_taken, calls):
        own = rotary_of(anatomy_of(zoo.tiny_model(name)))
        arguments = self.arguments(4 if name in ("gpt_oss", "glm4") else 8)
        kernel_rotary.Rotary(own)(*arguments)
        assert (calls["rotary"] > 0) == is_taken

    def test_two_models_of_a_family_may_end_in_any_order(self, calls):
        for order in (1, -1):
            models = [anatomy_of(zoo.tiny_model("llama")) for _ in range(2)]
            own = rotary_of(models[0])
            contexts = [kernel_rotary.rotary_by_kernel(model) for model in models]
            for context in contexts:
                context.__enter__()
            assert rotary_of(models[0]) is not own
            for context in contexts[::order]:
                context.__exit__(None, None, None)
            assert rotary_of(models[0]) is own

    def test_a_kernel_that_fails_in_a_pass_is_told_once_and_the_function_goes_on(self, calls, monkeypatch, caplog):
        own = rotary_of(anatomy_of(zoo.tiny_model("llama")))
        rotary, arguments = kernel_rotary.Rotary(own), self.arguments()
        rotary(*arguments)
        monkeypatch.setattr(kernel_rotary, "rotary", raising(OutOfResources("out of resource: shared memory")))
        for _ in range(2):
            assert all(map(torch.equal, rotary(*arguments), own(*arguments)))
        assert caplog.text.count("OutOfResources: out of resource: shared memory; the model's own code") == 1


class OutOfResources(Exception):  # noqa: N818 - Triton's own name; it is no RuntimeError
    """What Triton raises for a kernel that does not fit the device."""


def raising(error):
    def failing(*_args, **options):
        if options.get("backend") == "torch":
            return right(*_args, **options)
        raise error

    right = kernel_glue.swiglu
    return failing


@pytest.mark.parametrize("kernel", ["rms_norm", "swiglu"])
def test_a_kernel_that_fails_in_a_pass_leaves_the_numbers_right_and_is_told_once(kernel, calls, monkeypatch, caplog):
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    plain = logits_of(anatomy.model)
    with fused(anatomy):
        logits_of(anatomy.model)  # all is measured and taken
        monkeypatch.setattr(kernel_glue, kernel, raising(OutOfResources("out of resource: shared memory")))
        torch.testing.assert_close(logits_of(anatomy.model), plain)
    torch.testing.assert_close(fused_logits(anatomy), plain)
    assert caplog.text.count("OutOfResources: out of resource: shared memory") == 1


def test_a_kernel_that_runs_out_of_memory_is_not_left_out(calls, monkeypatch):
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    with fused(anatomy):
        monkeypatch.setattr(kernel_glue, "rms_norm", raising(torch.OutOfMemoryError("CUDA out of memory. Tried")))
        with pytest.raises(torch.OutOfMemoryError):
            logits_of(anatomy.model)
    assert all(measure.choices().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to run Triton's kernels on")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_on_a_gpu_grids_with_kernels_are_those_without(name, dtype, monkeypatch):
    monkeypatch.setattr(measure, "CLEARLY", 0.0)
    sizes = {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 8, "intermediate_size": 1536}
    model = zoo.tiny_model(name, dtype, **sizes).cuda()
    options = {"subject": (2, 6), "target": 9, "samples": 4, "noise": 1.0}
    by_kernel, plain = (Tracer(model, fuse=fuse).trace(list(range(1, 25)), **options) for fuse in (True, False))
    taken = {case.kind.partition("(")[0] for case, is_taken in measure.choices().items() if is_taken}
    assert taken == {"rms_norm", "swiglu", "rotary"}
    for stream in plain.streams:
        grids = by_kernel.grid(stream), plain.grid(stream)
        error = np.abs(np.subtract(*map(np.log, grids))).max()
        assert error < (1e-3 if dtype == torch.float32 else 0.1)
