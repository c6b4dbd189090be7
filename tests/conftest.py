"""Tiny random models, one per family; weights are drawn so that grids really vary."""

import os
from functools import cache

import pytest
import torch
from hypothesis import settings
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fasttrace.adapters import Anatomy, anatomy_of
from fasttrace.cells import Cell, grid_cells
from fasttrace.corruption import draw
from fasttrace.engines.job import Job

settings.register_profile("ci", derandomize=True)  # the same examples for everyone who looks at a red run
if os.environ.get("CI"):
    settings.load_profile("ci")
torch.set_num_threads(1)  # tiny products only lose by being shared out

VOCABULARY = 67
N_LAYERS = 4
FAMILIES = ("gpt2", "llama")


def _config(family: str):
    if family == "gpt2":
        return GPT2Config(
            n_layer=N_LAYERS,
            n_embd=32,
            n_head=4,
            vocab_size=VOCABULARY,
            n_positions=24,
            bos_token_id=0,
            eos_token_id=0,
        )
    return LlamaConfig(
        num_hidden_layers=N_LAYERS,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=24,
    )


CLASSES = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **settings):
    """A fresh random model; matrices are redrawn at 1/sqrt(width)."""
    config = _config(family)
    for name, value in settings.items():
        setattr(config, name, value)
    generator = torch.Generator().manual_seed(0)
    model = CLASSES[family](config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
    return model


@cache
def tiny_anatomy(family: str, dtype: torch.dtype = torch.float32) -> Anatomy:
    """The parts of a shared tiny model; tests that change a model build their own."""
    return anatomy_of(tiny_model(family, dtype))


def make_job(
    n_positions: int = 7,
    span: tuple[int, int] = (1, 3),
    samples: int = 2,
    cells: tuple[Cell, ...] = (),
    *,
    d_model: int = 32,
    sigma: float = 1.0,
    target: int | None = None,
) -> Job:
    """A job on arbitrary tokens."""
    ids = torch.randint(0, VOCABULARY, (n_positions,), generator=torch.Generator().manual_seed(n_positions))
    return Job(ids, draw(span, d_model, sigma=sigma, samples=samples, seed=1), cells, target)


def all_grids(streams: tuple[str, ...], window: int, n_positions: int) -> tuple[Cell, ...]:
    """The cells of one grid per stream."""
    return tuple(cell for stream in streams for cell in grid_cells(stream, window, N_LAYERS, n_positions))


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Every family in turn."""
    return request.param
