"""The kernels on a GPU against torch on the same GPU, at the sizes of models; skipped where there is none."""

import pytest
import torch
from fasttrace_kernels import reference
from fasttrace_kernels.rms_norm import rms_norm
from fasttrace_kernels.rotary import rotary
from fasttrace_kernels.swiglu import swiglu
from fasttrace_kernels.target_logprob import target_logprob, target_readout

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


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "scale": 0.5}], ids=["plain", "capped"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "d"), [(1000, 50257, 576), (63, 123, 255), (2049, 32000, 1024), (1, 256000, 64)]
)
def test_readout_is_that_of_unrounded_logits(dtype, options, rows, vocabulary, d, backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    hidden, weight = random(rows, d, dtype=dtype), random(vocabulary, d, dtype=dtype, seed=1, scale=0.1)
    target = (torch.arange(rows, device="cuda")[:, None] * 37) % vocabulary
    readout = target_readout(hidden, weight, target, **options, backend=backend)
    sample = slice(None, None, max(1, rows // 50))
    truth = reference.target_logprob(hidden[sample], weight, target[sample], **options)
    torch.testing.assert_close(readout.logprob[sample].double(), truth, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(
        readout.logprob, target_logprob(hidden, weight, target, **options, backend=backend), atol=1e-5, rtol=1e-6
    )
    top = reference.target_logprob(hidden[sample], weight, readout.top_id[sample, None], **options)
    torch.testing.assert_close(readout.top_logprob[sample, None].double(), top, atol=1e-4, rtol=1e-6)
    assert (readout.rank[readout.top_id == target[:, 0]] == 0).all()


def test_ids_outside_the_vocabulary_give_nan():
    hidden, weight = random(2, 64, dtype=torch.float16), random(99, 64, dtype=torch.float16, seed=1)
    target = torch.tensor([[99, -1], [0, 1 << 40]], device="cuda")
    for backend in ("triton", "torch"):
        assert target_logprob(hidden, weight, target, backend=backend).isnan().tolist() == [[True, True], [False, True]]
