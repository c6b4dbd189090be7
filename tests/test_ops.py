"""Fused operations compute what the modules they stand in for compute, and go away again."""

import pytest
import torch
from transformers.activations import NewGELUActivation

import fasttrace
from fasttrace.ops import fused, gelu_tanh
from tests.conftest import tiny_model


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_the_fused_gelu_is_transformers_gelu(dtype, tolerance):
    hidden = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    truth = NewGELUActivation()(hidden)
    torch.testing.assert_close(gelu_tanh(hidden.to(dtype)).double(), truth, atol=tolerance, rtol=tolerance)


def test_fusing_lasts_as_long_as_the_context():
    model = tiny_model("gpt2")
    activation = model.transformer.h[0].mlp.act
    with fused(model):
        assert "forward" in vars(activation)
    assert "forward" not in vars(activation)
    with fused(model, fuse=False):
        assert "forward" not in vars(activation)


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
