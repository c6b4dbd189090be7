import subprocess
import sys

import pytest
import torch
from fasttrace_kernels import reference
from fasttrace_kernels.rms_norm import MAX_COLUMNS, rms_norm
from fasttrace_kernels.rotary import rotary
from fasttrace_kernels.swiglu import swiglu
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_partial_rotary
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
ALL_DTYPES = (*DTYPES, torch.float64)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def assert_rounded(found: torch.Tensor, truth: torch.Tensor, roundings: int) -> None:
    """Each rounding to the dtype of `found` loses half a unit in the last place; the floor is float32's work."""
    allowed = roundings * torch.finfo(found.dtype).eps * truth.abs() + 1e-6
    assert ((found.double() - truth).abs() <= allowed).all()


class TestRmsNorm:
    @pytest.mark.parametrize("dtype", ALL_DTYPES)
    @pytest.mark.parametrize("d", [1, 63, 123, 255, 1024])
    def test_is_llamas_norm_bit_for_bit(self, dtype, d):
        norm = LlamaRMSNorm(d, eps=1e-5).to(dtype)
        norm.weight.data = random(d, dtype=dtype, seed=1)
        x = random(2, 7, d, dtype=dtype, scale=3)
        assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))

    @pytest.mark.parametrize("dtype", ALL_DTYPES)
    @pytest.mark.parametrize("d", [1, 63, 123, 255, 1024])
    def test_is_gemmas_norm_bit_for_bit(self, dtype, d):
        norm = Gemma2RMSNorm(d, eps=1e-6).to(dtype)
        norm.weight.data = random(d, dtype=dtype, seed=1)
        x = random(2, 7, d, dtype=dtype, scale=3)
        assert torch.equal(rms_norm(x, norm.weight, 1e-6, offset=1, round_before_weight=False), norm(x))

    @pytest.mark.parametrize("dtype", HALF)
    def test_the_two_rounding_orders_differ(self, dtype):
        x, weight = random(9, 255, dtype=dtype), random(255, dtype=dtype, seed=1)
        assert not torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6, round_before_weight=False))

    @pytest.mark.parametrize("dtype", HALF)
    def test_takes_a_weight_of_another_dtype_as_the_modules_do(self, dtype):
        x, weight = random(9, 255, dtype=dtype), random(255, seed=1)
        llama, gemma = LlamaRMSNorm(255, 1e-6), Gemma2RMSNorm(255)
        llama.weight.data = gemma.weight.data = weight
        assert rms_norm(x, weight, 1e-6).dtype == torch.float32
        assert torch.equal(rms_norm(x, weight, 1e-6), llama(x))
        assert torch.equal(rms_norm(x, weight, 1e-6, offset=1, round_before_weight=False), gemma(x))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_without_a_weight_it_is_gemma_3ns_unscaled_norm(self, dtype):
        x = random(9, 255, dtype=dtype)
        truth = Gemma3nRMSNorm(255, with_scale=False)(x)
        torch.testing.assert_close(rms_norm(x, None, 1e-6), truth, rtol=2 * torch.finfo(dtype).eps, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("offset", [0.0, 1.0])
    def test_loses_no_more_than_its_roundings(self, dtype, offset):
        x, weight = random(63, 123, dtype=dtype, scale=10), random(123, dtype=dtype, seed=1)
        truth = reference.rms_norm(x, weight, 1e-6, offset=offset)
        assert_rounded(rms_norm(x, weight, 1e-6, offset=offset, round_before_weight=False), truth, 1)
        if not offset:
            assert_rounded(rms_norm(x, weight, 1e-6), truth, 2)

    def test_takes_heads_that_are_a_slice_of_a_fused_projection(self):
        fused, weight = random(5, 3 * 4 * 16), random(16, seed=1)
        keys = fused.view(5, 12, 16)[:, 4:8]
        with pytest.raises(ValueError, match=r"rows of x do not lie at one distance .*x\.contiguous"):
            rms_norm(keys, weight, 1e-6)
        assert torch.equal(rms_norm(fused[:, 16:32], weight, 1e-6), rms_norm(fused[:, 16:32].clone(), weight, 1e-6))

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
    def test_of_no_rows_is_no_rows(self, shape):
        assert rms_norm(torch.empty(shape), torch.ones(5), 1e-6).shape == shape

    @pytest.mark.parametrize(
        ("x", "weight", "options", "message"),
        [
            (torch.ones(2, 4, dtype=torch.int32), None, {}, "x is int32, expected float32"),
            (torch.ones(()), None, {}, "x is a scalar"),
            (torch.ones(4, 2).T, None, {}, "last axis of x has stride 2"),
            (torch.ones(2, 0), None, {}, "rows of 0 numbers"),
            (torch.ones(1, 1).expand(1, MAX_COLUMNS + 1).contiguous(), None, {}, f"{MAX_COLUMNS + 1} numbers"),
            (torch.ones(2, 4), torch.ones(5), {}, r"weight has shape \(5,\), expected \(4,\)"),
            (torch.ones(2, 4), torch.ones(8)[::2], {}, "last axis of weight has stride 2"),
            (torch.ones(2, 4), torch.ones(4, dtype=torch.long), {}, "weight is int64"),
            (torch.ones(2, 4), torch.ones(4, device="meta"), {}, "weight is on meta and x on cpu"),
            (torch.ones(2, 4), torch.ones(4), {"offset": 1.0}, "offset of 1.0 needs"),
            (torch.ones(2, 4), None, {"offset": 1.0, "round_before_weight": False}, "offset of 1.0 needs a weight"),
            (torch.ones(2, 4), None, {"backend": "cuda"}, "backend 'cuda': pass 'auto'"),
        ],
    )
    def test_says_what_does_not_fit(self, x, weight, options, message):
        with pytest.raises(ValueError, match=message):
            rms_norm(x, weight, 1e-6, **options)


class TestSwiglu:
    @pytest.mark.parametrize("dtype", ALL_DTYPES)
    @pytest.mark.parametrize(("activation", "name"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
    def test_is_the_modules_product_bit_for_bit(self, dtype, activation, name):
        gate, up = random(2, 9, 255, dtype=dtype, scale=4), random(2, 9, 255, dtype=dtype, seed=1)
        assert torch.equal(swiglu(gate, up, activation), ACT2FN[name](gate) * up)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_stands_in_for_the_middle_of_llamas_mlp(self, dtype):
        mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=63)).to(dtype)
        x = random(1, 9, 32, dtype=dtype)
        assert torch.equal(mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x))), mlp(x))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    def test_loses_no_more_than_its_roundings(self, dtype, activation):
        gate, up = random(63, 123, dtype=dtype, scale=4), random(63, 123, dtype=dtype, seed=1)
        assert_rounded(swiglu(gate, up, activation), reference.swiglu(gate, up, activation), 2)

    def test_takes_the_halves_of_a_fused_projection(self):
        gate, up = random(3, 5, 2 * 63).chunk(2, -1)
        assert torch.equal(swiglu(gate, up), ACT2FN["silu"](gate) * up)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)])
    def test_of_nothing_is_nothing(self, shape):
        assert swiglu(torch.empty(shape), torch.empty(shape)).shape == shape

    @pytest.mark.parametrize(
        ("gate", "up", "activation", "message"),
        [
            (torch.ones(2, 4), torch.ones(2, 4), "relu", "activation is 'relu', expected one of silu, gelu_tanh"),
            (torch.ones(2, 4), torch.ones(2, 4).half(), "silu", "up is float16, expected float32"),
            (torch.ones(2, 4), torch.ones(4), "silu", r"up has shape \(4,\)"),
            (torch.ones(2, 4), torch.ones(4, 2).T, "silu", "last axis of up has stride 2"),
            (torch.ones(2, 3, 4)[:, :2], torch.ones(2, 2, 4), "silu", "rows of gate do not lie"),
            (torch.ones(2, 4), torch.ones(2, 4, device="meta"), "silu", "up is on meta and gate on cpu"),
        ],
    )
    def test_says_what_does_not_fit(self, gate, up, activation, message):
        with pytest.raises(ValueError, match=message):
            swiglu(gate, up, activation)


def heads(n_heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int, batch: int = 1) -> torch.Tensor:
    """A view as models pass it: heads of a token side by side."""
    return (
        random(batch, tokens, n_heads * dim, dtype=dtype, seed=seed).view(batch, tokens, n_heads, dim).transpose(1, 2)
    )


class TestRotary:
    @pytest.mark.parametrize("dtype", ALL_DTYPES)
    @pytest.mark.parametrize(("n_heads", "key_heads", "dim"), [(4, 4, 16), (9, 3, 64), (5, 1, 6), (14, 2, 80)])
    def test_is_llamas_rotation_bit_for_bit(self, dtype, n_heads, key_heads, dim):
        config = LlamaConfig(hidden_size=n_heads * dim, num_attention_heads=n_heads, head_dim=dim)
        q, k = heads(n_heads, 23, dim, dtype, 0), heads(key_heads, 23, dim, dtype, 1)
        cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(100, 123)[None])
        for found, expected in zip(rotary(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("dtype", ALL_DTYPES)
    @pytest.mark.parametrize("rotated", [2, 14, 30, 32])
    def test_is_gpt_neoxs_partial_rotation_bit_for_bit(self, dtype, rotated):
        q, k = heads(4, 13, 32, dtype, 0), heads(2, 13, 32, dtype, 1)
        cos, sin = random(1, 13, rotated, dtype=dtype, seed=2), random(1, 13, rotated, dtype=dtype, seed=3)
        for found, expected in zip(rotary(q, k, cos, sin), apply_partial_rotary(q, k, cos, sin), strict=True):
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_loses_no_more_than_its_roundings(self, dtype):
        q, k = heads(4, 13, 32, dtype, 0), heads(2, 13, 32, dtype, 1)
        cos, sin = random(1, 13, 32, dtype=dtype, seed=2), random(1, 13, 32, dtype=dtype, seed=3)
        for x, found, truth in zip((q, k), rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin), strict=True):
            size = x.double().abs().amax() * max(cos.abs().amax(), sin.abs().amax())
            assert (found - truth).abs().amax() <= 2 * torch.finfo(dtype).eps * size

    def test_angles_are_shared_by_a_batch_or_its_own(self):
        q, k = heads(4, 5, 8, torch.float32, 0, batch=3), heads(2, 5, 8, torch.float32, 1, batch=3)
        cos, sin = random(3, 5, 8, seed=2), random(3, 5, 8, seed=3)
        for shared in (False, True):
            tables = (cos[:1], sin[:1]) if shared else (cos, sin)
            expected = apply_rotary_pos_emb(q, k, *tables)
            assert all(map(torch.equal, rotary(q, k, *tables), expected))

    @pytest.mark.parametrize(("n_heads", "tokens"), [(4, 0), (0, 3)])
    def test_of_nothing_is_nothing(self, n_heads, tokens):
        q, k, angles = torch.ones(1, n_heads, tokens, 8), torch.ones(1, 2, tokens, 8), torch.ones(1, tokens, 8)
        assert [x.shape for x in rotary(q, k, angles, angles)] == [q.shape, k.shape]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"q": torch.ones(4, 3, 8)}, r"q \(4, 3, 8\), .* expected q and k \[batch"),
            ({"k": torch.ones(1, 2, 4, 8)}, r"k has shape \(1, 2, 4, 8\), expected \(1, 2, 3, 8\)"),
            ({"cos": torch.ones(1, 3, 7)}, "cos has 7 angles, expected an even number from 2 to d_head = 8"),
            ({"cos": torch.ones(1, 3, 10)}, "cos has 10 angles"),
            ({"cos": torch.ones(2, 3, 8)}, r"cos has shape \(2, 3, 8\)"),
            ({"sin": torch.ones(1, 3, 6)}, r"sin has shape \(1, 3, 6\)"),
            ({"sin": torch.ones(1, 3, 8).half()}, "sin is float16, expected float32"),
            ({"q": torch.ones(1, 4, 8, 3).transpose(2, 3)}, "last axis of q has stride 3"),
            ({"k": torch.ones(1, 2, 3, 8, device="meta")}, "k is on meta and q on cpu"),
        ],
    )
    def test_says_what_does_not_fit(self, changes, message):
        arguments = {"q": torch.ones(1, 4, 3, 8), "k": torch.ones(1, 2, 3, 8)}
        arguments |= {"cos": torch.ones(1, 3, 8), "sin": torch.ones(1, 3, 8)} | changes
        with pytest.raises(ValueError, match=message):
            rotary(**arguments)


CALLS = {
    "rms_norm": lambda x, **options: rms_norm(x, None, 1e-6, **options),
    "swiglu": lambda x, **options: swiglu(x, x, **options),
    "rotary": lambda x, **options: rotary(x[None, None], x[None, None], x[None], x[None], **options),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_that_is_asked_for_runs_or_raises(name):
    with pytest.raises(RuntimeError, match="pass backend='torch'"):
        CALLS[name](torch.ones(4, 4), backend="triton")
    with pytest.raises(ValueError, match="takes float32, float16, bfloat16, not float64"):
        CALLS[name](torch.ones(4, 4).double(), backend="triton")


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_refuses_to_lose_a_gradient(name):
    with pytest.raises(ValueError, match="no backward"):
        CALLS[name](torch.ones(4, 4, requires_grad=True), backend="triton")
    result = CALLS[name](torch.ones(4, 4, requires_grad=True))
    assert (result[0] if name == "rotary" else result).requires_grad


@pytest.mark.slow
def test_modules_import_without_triton():
    names = ", ".join(f"fasttrace_kernels.{name}" for name in CALLS)
    code = f"import sys; sys.modules['triton'] = None; sys.path[:0] = {sys.path!r}; import {names}"
    subprocess.run([sys.executable, "-c", code], check=True)
