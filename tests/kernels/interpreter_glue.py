"""The token-wise kernels, statement by statement on the CPU; needs `TRITON_INTERPRET=1`.

Inputs lie in memory that is otherwise NaN, and so do outputs before they are written: what is read or written beside
them shows. Sizes are such that no case has many more than 30 programs, which take milliseconds each.
"""

import math
import mmap
from contextlib import contextmanager

import pytest
import torch
from fasttrace_kernels import reference
from fasttrace_kernels.rms_norm import rms_norm
from fasttrace_kernels.rotary import rotary
from fasttrace_kernels.swiglu import swiglu
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
RIM = 64
NORESERVE = 0x4000  # mmap.MAP_NORESERVE from Python 3.13 on


def poison(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else -(1 << 30)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Random numbers as a view whose surroundings, columns included, are NaN."""
    around = torch.full((3, *shape[:-1], shape[-1] + 2 * RIM), math.nan, dtype=dtype)
    view = around[1, ..., RIM:-RIM]
    view.copy_(scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return view


class PoisonedMemory(TorchDispatchMode):
    """While it is open, new tensors are poison inside a rim of poison."""

    def __init__(self):
        super().__init__()
        self.buffers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func not in (aten.empty.memory_format, aten.new_empty.default):
            return func(*args, **(kwargs or {}))
        like, shape = args if len(args) == 2 else (None, args[0])
        dtype = (kwargs or {}).get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
        if not math.prod(shape) or dtype == torch.uint8:  # the interpreter's own
            return func(*args, **(kwargs or {}))
        buffer = torch.full((math.prod(shape) + 2 * RIM,), poison(dtype), dtype=dtype)
        self.buffers.append(buffer)
        return buffer[RIM : len(buffer) - RIM].view(shape)


@contextmanager
def guarded():
    with PoisonedMemory() as memory:
        yield
    for buffer in memory.buffers:
        rim = torch.cat((buffer[:RIM], buffer[-RIM:]))
        assert (rim.isnan() if rim.is_floating_point() else rim == poison(rim.dtype)).all()


def far_apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows 2^30 numbers apart, in address space of which only the written pages exist."""
    size, flags = 1 << 30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    space = torch.frombuffer(mmap.mmap(-1, len(rows) * size * rows.element_size(), flags=flags), dtype=rows.dtype)
    return space.view(len(rows), size)[:, : rows.shape[1]].copy_(rows)


def by_triton(function, *args, **options):
    with guarded():
        return function(*args, **options, backend="triton")


def test_memory_is_poisoned_and_guarded():
    with guarded():
        assert torch.empty(3).zero_().new_empty(3).isnan().all()
    with pytest.raises(AssertionError), guarded():
        torch.empty(3).as_strided((4,), (1,)).zero_()


def assert_as_torch(found: torch.Tensor, expected: torch.Tensor, truth: torch.Tensor, share: float = 0.01) -> None:
    """The same rounding: in half precision only numbers that are near a tie in float32 may differ, by one step."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    eps = torch.finfo(found.dtype).eps
    difference = (found.double() - expected.double()).abs()
    if found.dtype in HALF:
        assert (difference <= 2 * eps * expected.double().abs() + 1e-6).all()
        assert (difference > 1e-6).double().mean() <= share
    allowed = 2 * (expected.double() - truth).abs().amax() + 4 * torch.finfo(torch.float32).eps * truth.abs().amax()
    assert (found.double() - truth).abs().amax() <= allowed


class TestRmsNorm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("gemma", [False, True])
    @pytest.mark.parametrize(
        ("rows", "d"), [(37, 63), (17, 128), (19, 255), (9, 576), (3, 1123), (2, 4096), (1, 20000)]
    )
    def test_rounds_as_torch_does(self, dtype, gemma, rows, d):
        x, weight = random(rows, d, dtype=dtype, scale=3), random(d, dtype=dtype, seed=1)
        options = {"offset": 1.0, "round_before_weight": False} if gemma else {}
        found = by_triton(rms_norm, x, weight, 1e-5, **options)
        truth = reference.rms_norm(x, weight, 1e-5, offset=float(gemma))
        assert_as_torch(found, rms_norm(x, weight, 1e-5, **options), truth)

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("first", [False, True])
    def test_takes_a_weight_of_another_dtype(self, dtype, first):
        x, weight = random(9, 255, dtype=dtype), random(255, seed=1)
        found = by_triton(rms_norm, x, weight, 1e-6, round_before_weight=first)
        truth = reference.rms_norm(x, weight, 1e-6)
        assert_as_torch(found, rms_norm(x, weight, 1e-6, round_before_weight=first), truth)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_takes_no_weight_and_many_axes(self, dtype):
        x = torch.randn(2, 3, 5, 63).to(dtype)
        found = by_triton(rms_norm, x, None, 1e-6)
        assert_as_torch(found, rms_norm(x, None, 1e-6), reference.rms_norm(x, None, 1e-6))

    def test_of_no_rows_is_no_rows(self):
        assert by_triton(rms_norm, torch.empty(3, 0, 5), torch.ones(5), 1e-6).shape == (3, 0, 5)

    def test_a_row_that_is_not_finite_stays_alone(self):
        x = random(5, 63)
        x[1, 4], x[3] = math.inf, 0
        found = by_triton(rms_norm, x, random(63, seed=1), 1e-6)
        assert found.isfinite().all(-1).tolist() == [True, False, True, True, True]


class TestSwiglu:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    @pytest.mark.parametrize(("rows", "n"), [(13, 63), (7, 255), (5, 1024), (3, 2123)])
    def test_rounds_as_torch_does(self, dtype, activation, rows, n):
        gate, up = random(rows, n, dtype=dtype, scale=3), random(rows, n, dtype=dtype, seed=1)
        found = by_triton(swiglu, gate, up, activation)
        share = 0.01 if activation == "silu" else 0.05  # torch's own loses digits below -3
        assert_as_torch(found, swiglu(gate, up, activation), reference.swiglu(gate, up, activation), share)

    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    def test_far_from_zero_it_is_the_identity_or_nothing(self, activation):
        gate = torch.tensor([[-1e30, -1e4, -200.0, 200.0, 1e4, 1e30, math.nan]])
        found = by_triton(swiglu, gate, torch.ones_like(gate), activation)
        torch.testing.assert_close(found, torch.relu(gate), equal_nan=True)

    def test_of_nothing_is_nothing(self):
        assert by_triton(swiglu, torch.empty(3, 0), torch.empty(3, 0)).shape == (3, 0)
        assert by_triton(swiglu, torch.empty(0, 3), torch.empty(0, 3)).shape == (0, 3)


def heads(n_heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int, batch: int = 1) -> torch.Tensor:
    return random(batch, tokens, n_heads * dim, dtype=dtype, seed=seed).unflatten(2, (n_heads, dim)).transpose(1, 2)


class TestRotary:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("n_heads", "key_heads", "dim", "rotated"),
        [
            (4, 4, 16, 16),
            (9, 3, 64, 64),
            (5, 1, 6, 6),
            (14, 2, 80, 80),
            (32, 8, 128, 128),
            (8, 8, 96, 24),
            (3, 2, 32, 30),
        ],
    )
    def test_is_torchs_bit_for_bit(self, dtype, n_heads, key_heads, dim, rotated):
        q, k = heads(n_heads, 7, dim, dtype, 0), heads(key_heads, 7, dim, dtype, 1)
        cos, sin = random(1, 7, rotated, dtype=dtype, seed=2), random(1, 7, rotated, dtype=dtype, seed=3)
        for found, expected in zip(by_triton(rotary, q, k, cos, sin), rotary(q, k, cos, sin), strict=True):
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("shared", [False, True])
    def test_takes_a_batch_and_any_strides(self, shared):
        q, k = random(3, 4, 5, 16), heads(2, 5, 16, torch.float32, 1, batch=3)
        cos, sin = random(1 if shared else 3, 5, 16, seed=2), random(1 if shared else 3, 5, 16, seed=3)
        found = by_triton(rotary, q, k, cos, sin)
        assert all(map(torch.equal, found, rotary(q, k, cos, sin)))
        assert found[0].transpose(1, 2).is_contiguous()

    def test_of_no_tokens_is_nothing(self):
        empty, angles = torch.empty(1, 4, 0, 8), torch.empty(1, 0, 8)
        assert [x.shape for x in by_triton(rotary, empty, empty[:, :2], angles, angles)] == [(1, 4, 0, 8), (1, 2, 0, 8)]


class TestOffsetsBeyond32Bits:
    """Rows that lie 2^30 numbers apart, from the third one on beyond what 32 bits can count."""

    def test_of_norm_and_product(self):
        x, near = far_apart(random(5, 63).half()), random(5, 63).half()
        assert torch.equal(by_triton(rms_norm, x, near[0], 1e-6), by_triton(rms_norm, near, near[0], 1e-6))
        assert torch.equal(by_triton(swiglu, x, near), by_triton(swiglu, near, near))
        assert torch.equal(by_triton(swiglu, near, x), by_triton(swiglu, near, near))

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_of_rotation(self, axis):
        near = random(5, 16).half()
        x = far_apart(near)[:, None, None].transpose(0, axis)
        expected = near[:, None, None].transpose(0, axis)
        angles = random(x.shape[0], x.shape[2], 16, seed=1).half()
        assert all(
            map(torch.equal, by_triton(rotary, x, x, angles, angles), rotary(expected, expected, angles, angles))
        )

    def test_of_angles(self):
        near, q = random(5, 16).half(), random(1, 2, 5, 16, seed=1).half()
        angles = far_apart(near)[None]
        assert all(map(torch.equal, by_triton(rotary, q, q, angles, angles), rotary(q, q, near[None], near[None])))
