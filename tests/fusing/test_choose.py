"""Fused operations compute what the modules they stand in for compute, and go away again."""

import pytest
import torch
from transformers.activations import NewGELUActivation

import fasttrace
from fasttrace.fusing import choose as ops
from fasttrace.fusing.choose import fused, gelu_tanh
from fasttrace.models.anatomy import anatomy_of
from fasttrace.models.hooks import output_hook
from tests.conftest import tiny_model


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_the_fused_gelu_is_transformers_gelu(dtype, tolerance):
    hidden = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    truth = NewGELUActivation()(hidden)
    torch.testing.assert_close(gelu_tanh(hidden.to(dtype)).double(), truth, atol=tolerance, rtol=tolerance)


def test_fusing_lasts_as_long_as_the_context():
    anatomy = anatomy_of(tiny_model("gpt2"))
    mlp = anatomy.parts.mlp[0]
    with fused(anatomy):
        assert "forward" in vars(mlp)
        assert "forward" in vars(mlp.act)
    assert "forward" not in vars(mlp)
    assert "forward" not in vars(mlp.act)
    with fused(anatomy, fuse=False):
        assert "forward" not in vars(mlp)


def test_an_mlp_in_chunks_is_the_mlp(family, monkeypatch):
    monkeypatch.setattr(ops, "CPU_CHUNK", 3)
    mlp = anatomy_of(tiny_model(family)).parts.mlp[0]
    hidden = torch.randn(1, 11, 32)
    seen = []
    with torch.no_grad(), output_hook(next(mlp.children()), lambda out: seen.append(out.shape[1])):
        torch.testing.assert_close(ops.in_chunks(mlp.forward)(hidden), mlp(hidden))
    assert seen == [3, 3, 3, 2, 11]


def test_a_trace_in_chunks_is_the_trace(family, monkeypatch):
    tracer = fasttrace.Tracer(tiny_model(family))
    whole = tracer.trace([1, 2, 3, 4], subject=(0, 2), samples=2)
    monkeypatch.setattr(ops, "CPU_CHUNK", 5)
    chunked = tracer.trace([1, 2, 3, 4], subject=(0, 2), samples=2)
    for stream in whole.streams:
        torch.testing.assert_close(
            torch.from_numpy(whole.grid(stream)), torch.from_numpy(chunked.grid(stream)), rtol=1e-5, atol=0
        )


def test_fused_and_plain_traces_agree(family):
    model = tiny_model(family)
    fast, plain = (
        fasttrace.Tracer(model, fuse=fuse).trace([1, 2, 3, 4], subject=(0, 2), samples=2) for fuse in (True, False)
    )
    for stream in fast.streams:
        torch.testing.assert_close(
            torch.from_numpy(fast.grid(stream)), torch.from_numpy(plain.grid(stream)), rtol=1e-5, atol=0
        )
    assert (fast.metadata["fuse"], plain.metadata["fuse"]) == (True, False)
