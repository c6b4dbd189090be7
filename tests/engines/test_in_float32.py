"""In half precision an engine that computes another function is told from rounding by a check in float32."""

import numpy as np
import pytest
import torch
from fasttrace_kernels import suffix_attention_cpu
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fasttrace.engines import ENGINES, reference
from fasttrace.engines import attention_ragged as attention
from fasttrace.engines import self_check as select
from fasttrace.engines.in_float32 import _exact_products, can_be_widened, in_float32
from fasttrace.engines.state import state_of
from fasttrace.errors import EngineError
from fasttrace.fusing import choose as ops
from fasttrace.fusing.attention import KernelState
from fasttrace.fusing.choose import fused
from fasttrace.models.anatomy import anatomy_of
from fasttrace.models.hooks import evaluating
from tests.conftest import all_grids, make_job
from tests.helpers import zoo
from tests.helpers.families import MUTATIONS, best_engine, family_model, skip_if_capless

IDS = torch.tensor([[5, 9, 13, 21, 34]])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gemma4_text", "mixtral", "mamba", "bloom", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_gives_the_numbers_of_its_float32_copy(name, dtype):
    model = zoo.tiny_model(name, dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with evaluating(model):
        with in_float32(anatomy_of(model)):
            given = model(input_ids=IDS, use_cache=False).logits
        in_half = model(input_ids=IDS, use_cache=False).logits
        expected = model.float()(input_ids=IDS, use_cache=False).logits
    assert given.dtype == torch.float32
    scale = expected.abs().max()
    # Constants that a model keeps in its own type (Gemma's embedding scale) are widened, not made again.
    assert (given - expected).abs().max() < 1e-5 * scale or name.startswith("gemma")
    assert (in_half - expected).abs().max() > 1e-4 * scale
    assert all(torch.equal(tensor, before[key].float()) for key, tensor in model.state_dict().items() if key in before)


def test_a_weight_of_many_rows_is_widened_piece_by_piece(monkeypatch):
    from fasttrace.engines import in_float32 as module

    model = zoo.tiny_model("llama", torch.bfloat16)
    anatomy = anatomy_of(model)
    with evaluating(model), in_float32(anatomy):
        whole = model(input_ids=IDS, use_cache=False).logits
        monkeypatch.setattr(module, "PIECE", 32 * 7)
        assert torch.allclose(model(input_ids=IDS, use_cache=False).logits, whole, rtol=1e-5, atol=1e-6)


def test_what_rounds_behind_torchs_back_is_noticed_and_not_taken_for_another_function(caplog):
    model = zoo.tiny_model("llama", torch.float16)
    model.model.layers[1].mlp.register_forward_hook(
        lambda _m, _a, output: torch.from_numpy(output.float().numpy().astype("float16"))
    )
    anatomy = anatomy_of(model)
    with (
        evaluating(model),
        in_float32(anatomy),
        pytest.raises(EngineError, match=r"float16 where all is computed in float32"),
    ):
        model(input_ids=IDS, use_cache=False)
    with caplog.at_level("INFO", logger="fasttrace"):
        assert select.choose(anatomy).name == "wavefront"
    assert "wavefront was not checked in float32" in caplog.text


@pytest.mark.parametrize("mutation", [name for name in MUTATIONS if MUTATIONS[name][0] != "bloom"])
def test_breaking_one_thing_fails_the_self_check_in_half_precision_too(mutation, monkeypatch):
    name, mutate = MUTATIONS[mutation]
    skip_if_capless(mutation)
    mutate(monkeypatch)
    choice = select.choose(anatomy_of(family_model(name, torch.bfloat16)))
    assert choice.name != best_engine(name)


def test_a_difference_that_half_precision_would_let_pass_is_refused_with_its_number(monkeypatch):
    """A query scaled by 2 % moves log p by less than rounding may."""
    model = zoo.tiny_model("llama", torch.bfloat16)
    right = attention._arithmetic

    def scaled(module, implementation):
        function = right(module, implementation)
        return lambda module, query, *rest, **kwargs: function(module, query * 1.02, *rest, **kwargs)

    monkeypatch.setattr(attention, "_arithmetic", scaled)
    anatomy = anatomy_of(model)
    checks = select._checks_of(anatomy, True, state_of(model))
    error = select._distance(ENGINES["wavefront"](anatomy, checks.job, lambda: None), checks.expected)
    assert 1e-3 < error < select.HALF_TOLERANCE
    choice = select.choose(anatomy)
    assert choice.name == "fork"
    assert (
        "wavefront does not compute what plain forward passes do: with both in float32 it differs by" in choice.reason
    )


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss", "mamba"])
def test_honest_half_precision_passes(name):
    choice = select.choose(anatomy_of(zoo.tiny_model(name, torch.bfloat16)))
    assert choice.name == best_engine(name)


def test_only_half_precision_with_all_weights_at_hand_is_checked_so():
    assert can_be_widened(anatomy_of(zoo.tiny_model("llama", torch.float16)))
    assert not can_be_widened(anatomy_of(zoo.tiny_model("llama")))


def any_argument(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **_):
    """transformers' sdpa before it refused soft caps."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal)


def gemma2_by_sdpa(dtype, monkeypatch):
    """Gemma 2 as transformers 5.17 runs it: by sdpa, which lets its soft cap go by."""
    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", any_argument)
    model = zoo.tiny_model("gemma2", dtype)
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    model.config._attn_implementation_internal = "sdpa"
    return anatomy_of(model)


@pytest.fixture
def kernel(monkeypatch):
    """The torch path of one call a block, on a CPU and for narrow models too; counts its calls."""
    calls, right = [], KernelState.attend

    def counted(state, *arguments):
        attended = right(state, *arguments)
        calls.append(attended is not None)
        return attended

    monkeypatch.setattr(ops, "CPU_WIDTH", 1)
    monkeypatch.setattr(ops, "compiler_is_there", lambda _: True)
    monkeypatch.setattr(suffix_attention_cpu, "is_installed", lambda: False)
    monkeypatch.setattr(KernelState, "attend", counted)
    return calls


def test_a_soft_cap_that_the_model_lets_go_by_is_not_applied_by_the_kernel(kernel, monkeypatch):
    anatomy = gemma2_by_sdpa(torch.float32, monkeypatch)
    job = make_job(cells=all_grids(anatomy.streams, 3, 7))
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    with fused(anatomy):
        scores = ENGINES["wavefront"](anatomy, job, lambda: None)
    assert kernel == [True] * anatomy.n_layers
    assert np.abs(scores.cells - expected.cells).max() < 1e-5 * np.ptp(expected.cells)


def test_a_kernel_that_applies_it_nevertheless_is_caught_in_half_precision(kernel, monkeypatch):
    monkeypatch.setattr(attention, "_unheeded", lambda _: frozenset())
    choice = select.choose(gemma2_by_sdpa(torch.bfloat16, monkeypatch))
    assert choice.name != "wavefront"
    assert kernel


def test_flash_attention_is_stood_in_for_by_what_knows_the_models_soft_cap(monkeypatch):
    anatomy = gemma2_by_sdpa(torch.float32, monkeypatch)
    anatomy.model.config._attn_implementation_internal = "flex_attention"
    assert attention.safe_implementation(anatomy) == "eager"
    plain = anatomy_of(zoo.tiny_model("llama"))
    plain.model.config._attn_implementation_internal = "flex_attention"
    assert attention.safe_implementation(plain) == "sdpa"


def test_an_open_float32_mode_ends_with_an_error_too():
    anatomy = anatomy_of(zoo.tiny_model("llama", torch.bfloat16))
    with pytest.raises(KeyError), in_float32(anatomy):
        raise KeyError
    narrow = torch.ones(1, 2, dtype=torch.bfloat16)
    assert nn.functional.linear(narrow, narrow).dtype == torch.bfloat16


@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_what_torch_may_round_is_as_it_was_before_the_check(allowed):
    before = torch.get_float32_matmul_precision()
    if allowed != before:
        torch.set_float32_matmul_precision(allowed)
    try:
        kept = _precisions()
        with _exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert _precisions() == kept
    finally:
        if allowed != before:
            torch.set_float32_matmul_precision(before)


def _precisions():
    """All settings of torch that say how products of float32 are rounded."""
    of_library = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    return torch.get_float32_matmul_precision(), of_library, torch.backends.cuda.matmul.allow_tf32
