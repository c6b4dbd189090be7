"""The interpreter's known bugs are there, and mended; the guard sees what it should. Needs `TRITON_INTERPRET=1`."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder

from tests.kernels import shim
from tests.kernels.guard import touching


@triton.jit
def product(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def rounded(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def doubled(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(out + at, value + value)


@triton.jit
def counted(bound, out):
    total = 0
    for i in range(0, tl.load(bound)):
        total += i
    tl.store(out, total)


@triton.jit
def copied(x, out, n, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0), mask=at < n)


def blocks():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2)]


def test_products_of_bfloat16_are_exact():
    a, b = blocks()
    out = torch.full((16, 16), torch.nan)
    product[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float(), atol=1e-5, rtol=1e-5)


def test_without_the_shim_products_of_bfloat16_are_wrong(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_dot", InterpreterBuilder.unmended["create_dot"])
    a, b = blocks()
    out = torch.full((16, 16), torch.nan)
    product[(1,)](a, b, out, 16)
    assert (out - a.float() @ b.float()).abs().max() > 1e3, "Triton mended it; so can the shim forget it"


def test_bfloat16_is_rounded_as_torch_rounds():
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 3.4e38, 1.00390625])
    x = torch.cat((special, torch.randn(1016, generator=torch.Generator().manual_seed(2))))
    out = torch.full((1024,), torch.nan, dtype=torch.bfloat16)
    rounded[(1,)](x, out, 1024)
    assert torch.equal(out.view(torch.int16)[~x.isnan()], x.bfloat16().view(torch.int16)[~x.isnan()])
    assert torch.equal(out.isnan(), x.isnan())


def test_without_the_shim_bfloat16_is_cut_off(monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", InterpreterBuilder.unmended["cast_impl"])
    x = torch.randn(1024, generator=torch.Generator().manual_seed(2))
    out = torch.full((1024,), torch.nan, dtype=torch.bfloat16)
    rounded[(1,)](x, out, 1024)
    assert (out != x.bfloat16()).sum() > 100, "Triton mended it; so can the shim forget it"


def test_bfloat16_becomes_any_other_type():
    x = torch.tensor([1.5, -2.0, 300.0, 0.0] * 4).bfloat16()
    for dtype in (torch.float32, torch.float16, torch.float64, torch.int32):
        out = torch.zeros(16, dtype=dtype)
        rounded[(1,)](x, out, 16)
        assert torch.equal(out, x.to(dtype))


def test_arithmetic_on_bfloat16_is_refused():
    x = torch.ones(16).bfloat16()
    with pytest.raises(InterpreterError, match="convert to float32"):
        doubled[(1,)](x, torch.empty_like(x), 16)


def test_a_loop_bound_from_memory_works():
    out = torch.zeros(1, dtype=torch.int32)
    counted[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert out.item() == 10


def test_the_shim_is_installed_once():
    before = InterpreterBuilder.create_dot
    shim.install()
    assert InterpreterBuilder.create_dot is before


def test_the_guard_accepts_a_copy():
    x, out = torch.ones(16), torch.zeros(16)
    with touching([x], [out]):
        copied[(1,)](x, out, 16, 16)
    assert torch.equal(out, x)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.ones(16)[:15], torch.zeros(16), "1 loads beside"),
        (torch.ones(32)[::2], torch.zeros(16), "8 loads beside"),
        (torch.ones(16), torch.zeros(16)[:15], "1 stores beside"),
    ],
)
def test_the_guard_sees_what_is_touched_beside_the_tensors(x, out, message):
    with pytest.raises((AssertionError, InterpreterError), match=message), touching([x], [out]):
        copied[(1,)](x, out, 16, 16)


@pytest.mark.parametrize(("programs", "n"), [(2, 16), (1, 15)], ids=["twice", "not at all"])
def test_the_guard_sees_what_is_written_twice_or_not_at_all(programs, n):
    x, out = torch.ones(16), torch.zeros(16)
    with pytest.raises(AssertionError, match="stores to 16 elements"), touching([x], [out]):
        copied[(programs,)](x, out, n, 16)
