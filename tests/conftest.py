"""What many tests need: tiny models, jobs on them, and quiet settings."""

import os
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from accelerate import hooks as accelerate_hooks
from hypothesis import settings

from fasttrace.engines.job import Job
from fasttrace.engines.readout import Scores
from fasttrace.experiment.cells import Cell, grid_cells
from fasttrace.experiment.corruption import draw
from fasttrace.models.anatomy import Anatomy, anatomy_of
from tests.helpers.zoo import N_LAYERS, VOCABULARY, tiny_model

settings.register_profile("ci", derandomize=True)  # the same examples for everyone who looks at a red run
if os.environ.get("CI"):
    settings.load_profile("ci")
THREADS = 1
"""Tiny products only lose by being shared out, and another number of threads rounds otherwise."""
torch.set_num_threads(THREADS)

FAMILIES = ("gpt2", "llama")
"""Two that stand for all where engines are not what is tested; `test_families.py` has the others."""


SLOW_FIXTURES = {"browser", "launcher"}
"""Tests that drive a browser or start processes by themselves are slow, as are those marked so."""


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


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
    target: int | tuple[int, ...] | None = None,
    foil: tuple[int, ...] = (),
) -> Job:
    """A job on arbitrary tokens."""
    ids = torch.randint(0, VOCABULARY, (n_positions,), generator=torch.Generator().manual_seed(n_positions))
    return Job(ids, draw(span, d_model, sigma=sigma, samples=samples, seed=1), cells, target, foil)


def blank_scores(job: Job, vocabulary: int) -> Scores:
    """What an engine would return that computes nothing."""
    cells, base = np.zeros((1, len(job.cells), job.samples)), np.zeros((1, 1 + job.samples))
    return Scores((0,), (), ("prob",), cells, base, torch.zeros(1 + job.samples, vocabulary))


def all_grids(streams: tuple[str, ...], window: int, n_positions: int) -> tuple[Cell, ...]:
    """The cells of one grid per stream."""
    return tuple(cell for stream in streams for cell in grid_cells(stream, window, N_LAYERS, n_positions))


def relative_error(scores, expected):
    """Largest relative difference over cells and the distributions of the base runs."""
    pairs = (
        (scores.cells, expected.cells),
        (scores.clean, expected.clean),
        (scores.corrupted, expected.corrupted),
    )
    return max(float(np.abs(a.astype(np.float64) / b - 1).max()) for a, b in pairs if a.size)


@pytest.fixture(autouse=True)
def threads():
    """Accelerate and numba set torch's number of threads; the next test has its own again."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture
def loads(monkeypatch) -> Counter:
    """(module, parameter) -> how often accelerate has brought its weights."""
    counts = Counter()
    bring = accelerate_hooks.set_module_tensor_to_device

    def counted(module, name, device, *args, **kwargs):
        counts[module, name] += torch.device(device).type != "meta"
        return bring(module, name, device, *args, **kwargs)

    monkeypatch.setattr(accelerate_hooks, "set_module_tensor_to_device", counted)
    return counts


def loads_in_blocks(anatomy, loads):
    inside = {module for block in anatomy.blocks for module in block.modules()}
    return {place: count for place, count in loads.items() if place[0] in inside and count}
