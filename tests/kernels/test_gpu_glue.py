"""The kernels on a GPU against torch on the same GPU, at the sizes of models; skipped where there is none."""

import pytest
import torch
from fasttrace_kernels.rms_norm import rms_norm
from fasttrace_kernels.rotary import rotary
from fasttrace_kernels.swiglu import swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to run Triton's kernels on"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).cuda()


def assert_as_torch(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Two steps of the dtype at most, and only where numbers are near a tie."""
    difference, eps = (found.double() - expected.double()).abs(), torch.finfo(found.dtype).eps
    assert found.dtype == expected.dtype
    assert (difference <= (16 if found.dtype == torch.float32 else 2) * eps * expected.double().abs() + 1e-6).all()
    assert found.dtype == torch.float32 or (difference > 1e-6).double().mean() <= 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(("rows", "d"), [(4046, 576), (4046, 4096), (64745, 128), (123, 16384), (63, 255), (1, 50000)])
def test_norms_round_as_torch_does(dtype, gemma, rows, d):
    x, weight = random(rows, d, dtype=dtype, scale=3), random(d, dtype=dtype, seed=1)
    options = {"offset": 1.0, "round_before_weight": False} if gemma else {}
    found = rms_norm(x, weight, 1e-6, **options)
    assert_as_torch(found, rms_norm(x, weight, 1e-6, **options, backend="torch"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "n"), [(4046, 1536), (1010, 14336), (63, 255)])
def test_gated_products_round_as_torch_does(dtype, activation, rows, n):
    gate, up = random(rows, 2 * n, dtype=dtype, scale=3).chunk(2, -1)
    assert_as_torch(swiglu(gate, up, activation), swiglu(gate, up, activation, backend="torch"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "key_heads", "dim", "rotated"), [(9, 3, 64, 64), (32, 8, 128, 128), (32, 32, 80, 32), (71, 1, 64, 64)]
)
def test_rotation_is_torchs_bit_for_bit(dtype, heads, key_heads, dim, rotated):
    fused = random(1, 1023, (heads + key_heads) * dim, dtype=dtype).unflatten(2, (-1, dim)).transpose(1, 2)
    q, k = fused[:, :heads], fused[:, heads:]
    cos, sin = (random(1, 1023, rotated, dtype=dtype, seed=seed) for seed in (1, 2))
    expected = rotary(q, k, cos, sin, backend="torch")
    assert all(map(torch.equal, rotary(q, k, cos, sin), expected))
