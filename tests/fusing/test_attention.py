"""Attention in one call a block gives the numbers of attention group by group, with the model's own masks."""

import numpy as np
import pytest
import torch
from fasttrace_kernels import suffix_attention_cpu

from fasttrace import EngineError, Tracer, memories
from fasttrace.engines import ENGINES, reference, wavefront
from fasttrace.engines.job import Job
from fasttrace.experiment.cells import grid_cells
from fasttrace.experiment.corruption import draw
from fasttrace.fusing import choose as ops
from fasttrace.fusing.attention import KernelState, window_of_mask
from fasttrace.fusing.choose import fused
from fasttrace.models.anatomy import anatomy_of
from tests.helpers import zoo

FAMILIES = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gemma3n_text", "gpt_oss", "granite")
FAMILIES += ("cohere2", "deepseek_v3", "phi3", "olmo3", "mixtral", "stablelm", "gpt_neox", "starcoder2")


@pytest.fixture
def kernel(monkeypatch):
    """The torch path of one call a block, on a CPU and for narrow models too; counts its calls."""
    calls = []
    right = KernelState.attend

    def counted(state, *arguments):
        attended = right(state, *arguments)
        calls.append(attended is not None)
        return attended

    monkeypatch.setattr(ops, "CPU_WIDTH", 1)
    monkeypatch.setattr(ops, "compiler_is_there", lambda _: True)
    monkeypatch.setattr(suffix_attention_cpu, "is_installed", lambda: False)
    monkeypatch.setattr(KernelState, "attend", counted)
    return calls


def job_of(anatomy, samples=2, n_positions=9):
    ids = torch.randint(1, 60, (n_positions,), generator=torch.Generator().manual_seed(3))
    cells = tuple(cell for s in anatomy.streams for cell in grid_cells(s, 3, anatomy.n_layers, n_positions))
    return Job(ids, draw((2, 4), anatomy.d_model, sigma=1.0, samples=samples, seed=1), cells, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kernel_gives_the_grids_of_plain_forward_passes(name, kernel):
    anatomy = anatomy_of(zoo.tiny_model(name))
    job = job_of(anatomy)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    with fused(anatomy):
        scores = ENGINES["wavefront"](anatomy, job, lambda: None)
    builds_masks = hasattr(anatomy.decoder, "_update_causal_mask")  # StableLM of early transformers 5: group by group
    assert kernel == [not builds_masks] * anatomy.n_layers, "every block attends in one call"
    assert np.abs(scores.cells - expected.cells).max() < 1e-5 * np.ptp(expected.cells)


@pytest.fixture
def compiled(kernel, monkeypatch):
    """The same, compiled by numba; what it computes is counted."""
    pytest.importorskip("numba")
    calls, right = [], suffix_attention_cpu.attend
    monkeypatch.setattr(suffix_attention_cpu, "is_installed", lambda: True)
    monkeypatch.setattr(suffix_attention_cpu, "attend", lambda q, *rest: calls.append(q.dtype) or right(q, *rest))
    return calls


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss", "gemma2"])
def test_the_compiled_loop_gives_the_grids_of_plain_forward_passes(name, compiled):
    anatomy = anatomy_of(zoo.tiny_model(name))
    job = job_of(anatomy)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    with fused(anatomy):
        scores = ENGINES["wavefront"](anatomy, job, lambda: None)
    assert compiled == [torch.float32] * anatomy.n_layers
    assert np.abs(scores.cells - expected.cells).max() < 1e-5 * np.ptp(expected.cells)


@pytest.mark.parametrize(
    ("width", "dtype", "package", "calls"),
    [(1, None, "numba", True), (64, None, "numba", False), (1, torch.float64, "numba", False), (1, None, "", False)],
    ids=["taken", "a narrow model", "float64", "numba is not there"],
)
def test_where_a_cpu_attends_in_one_call(width, dtype, package, calls, kernel, monkeypatch):
    monkeypatch.setattr(ops, "CPU_WIDTH", width)
    monkeypatch.setattr(ops, "compiler_is_there", lambda name: name == package)
    anatomy = anatomy_of(zoo.tiny_model("gpt2").to(dtype or torch.float32))
    with fused(anatomy):
        ENGINES["wavefront"](anatomy, job_of(anatomy), lambda: None)
    assert kernel == [True] * (anatomy.n_layers if calls else 0)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss", "gemma3_text"])
def test_the_kernel_serves_prompts_of_several_lengths(name, kernel):
    anatomy = anatomy_of(zoo.tiny_model(name))
    jobs = [job_of(anatomy, samples, n_positions) for samples, n_positions in ((2, 9), (1, 6), (1, 9))]
    with fused(anatomy):
        together = wavefront.run_jobs(anatomy, jobs, lambda: None)
    assert kernel == [True] * anatomy.n_layers
    for scores, job in zip(together, jobs, strict=True):
        expected = reference.run(anatomy, job, lambda: None, rows=1000)
        assert np.abs(scores.cells - expected.cells).max() < 1e-5 * np.ptp(expected.cells)


def test_a_window_that_is_not_told_moves_the_grids(kernel, monkeypatch):
    """The comparison has teeth: with the window taken for none, mistral's grids are wrong."""
    from fasttrace.fusing import attention as kernel_attention

    anatomy = anatomy_of(zoo.tiny_model("mistral"))
    job = job_of(anatomy)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    monkeypatch.setattr(kernel_attention, "window_of_mask", lambda _: None)
    with fused(anatomy):
        scores = ENGINES["wavefront"](anatomy, job, lambda: None)
    assert np.abs(scores.cells - expected.cells).max() > 1e-2 * np.ptp(expected.cells)


def test_without_fusing_or_without_triton_attention_goes_group_by_group(kernel, monkeypatch):
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    with fused(anatomy, fuse=False):
        ENGINES["wavefront"](anatomy, job_of(anatomy), lambda: None)
    monkeypatch.setattr(ops, "compiler_is_there", lambda _: False)
    with fused(anatomy):
        ENGINES["wavefront"](anatomy, job_of(anatomy), lambda: None)
    assert kernel == []


def test_what_the_kernel_does_not_know_goes_group_by_group(kernel, monkeypatch):
    from fasttrace.fusing import attention as kernel_attention

    monkeypatch.setattr(kernel_attention, "UNDERSTOOD", frozenset())
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    job = job_of(anatomy)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    with fused(anatomy):
        scores = ENGINES["wavefront"](anatomy, job, lambda: None)
    assert kernel == [False] * anatomy.n_layers
    np.testing.assert_allclose(scores.cells, expected.cells, rtol=1e-4)


def test_blocks_without_births_share_a_layout(kernel):
    anatomy = anatomy_of(zoo.tiny_model("llama"))
    cells = (grid_cells("attention_output", 1, anatomy.n_layers, 9)[5],)
    job = job_of(anatomy)
    job = Job(job.token_ids, job.runs, cells, None)
    state = KernelState(9, job.plan(anatomy.n_layers, wavefront.LAYOUT).blocks)
    states = torch.zeros(1, 4, state.blocks[-1].n_tokens, 8)
    layouts = []
    for state.number in range(anatomy.n_layers):
        q = states[0, :, : state.blocks[state.number].n_tokens].transpose(0, 1)
        layouts.append(state._layout(q, q, q))
    assert layouts[-1] is layouts[-2]
    assert len(state.layouts) < anatomy.n_layers


class OutOfResources(Exception):  # noqa: N818 - Triton's own name; it is no RuntimeError
    """What Triton raises for a kernel that does not fit the device."""


FAILURES = [
    OutOfResources("out of resource: shared memory, Required: 270336, Hardware limit: 232448"),
    RuntimeError("device kernel image is invalid"),
    ValueError("heads of 512 and 512: the Triton kernel takes up to 256; pass backend='torch'"),
    AssertionError("no message"),
]


@pytest.fixture
def failing(kernel, monkeypatch):
    """The kernel fails from its n-th call on."""
    from fasttrace.fusing import attention as kernel_attention

    right, calls = kernel_attention.suffix_attention, []
    memories.clear("warnings")

    def make(error, after=0):
        def attention(*args, **options):
            calls.append(1)
            if len(calls) > after:
                raise error
            return right(*args, **options)

        monkeypatch.setattr(kernel_attention, "suffix_attention", attention)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_kernel_that_fails_costs_a_warning_and_not_the_engine(name, error, failing, caplog):
    model = zoo.tiny_model(name)
    request = {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 2, "window": 3}
    expected = Tracer(model).trace(**request, engine="reference")
    assert Tracer(model).trace(**request).metadata["attention_by"] == "kernel"
    assert expected.metadata["attention_by"] == "model"
    failing(error)
    for _ in range(2):
        result = Tracer(model).trace(**request)
        assert (result.metadata["engine"], result.metadata["attention_by"]) == ("wavefront", "groups")
        for stream in expected.streams:
            np.testing.assert_allclose(result.grid(stream), expected.grid(stream), rtol=1e-4)
    assert caplog.text.count(f"{type(error).__name__}: {error}") == 1


def test_a_kernel_that_fails_in_the_middle_of_a_trace_leaves_its_numbers_right(failing):
    model = zoo.tiny_model("llama")
    tracer, request = Tracer(model), {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 2, "window": 3}
    expected = tracer.trace(**request)
    failing(FAILURES[0], after=2)
    result = tracer.trace(**request)
    assert result.metadata["attention_by"] == "kernel and groups"
    for stream in expected.streams:
        np.testing.assert_allclose(result.grid(stream), expected.grid(stream), rtol=1e-4)
    assert tracer.trace(**request, budget=20).metadata["attention_by"] == "groups"


def test_a_kernel_that_fails_between_the_passes_of_a_trace_is_told_of_the_whole(failing):
    model = zoo.tiny_model("llama")
    tracer, request = Tracer(model), {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 2, "window": 3}
    tracer.trace(**request)
    failing(FAILURES[0], after=2 * len(tracer.anatomy.blocks))
    assert tracer.trace(**request, budget=40).metadata["attention_by"] == "kernel and groups"


@pytest.mark.slow
def test_a_kernel_that_runs_out_of_memory_makes_smaller_passes(failing):
    model = zoo.tiny_model("llama")
    tracer, request = Tracer(model), {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 1, "window": 3}
    tracer.trace(**request)
    failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(EngineError, match="out of memory on cpu with one cell and one noise sample"):
        tracer.trace(**request)


def test_heads_on_which_the_kernel_fails_are_left_out_and_others_are_not(failing):
    first, other = zoo.tiny_model("llama"), zoo.tiny_model("llama", head_dim=4)
    request = {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 1, "window": 3}
    failing(FAILURES[0])
    assert Tracer(first).trace(**request).metadata["attention_by"] == "groups"
    failing(FAILURES[0], after=10**6)
    assert Tracer(other).trace(**request).metadata["attention_by"] == "kernel"
    assert Tracer(first).trace(**request).metadata["attention_by"] == "groups"


def band(n, window):
    ones = torch.ones(n, n, dtype=torch.bool)
    return (ones.tril() & ones.triu(1 - window))[None, None]


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (band(6, 6), None),
        (band(6, 3), 3),
        (band(6, 1), 1),
        (band(1, 1), None),
        (torch.where(band(6, 3), 0.0, torch.finfo(torch.float32).min), 3),
        (torch.ones(1, 1, 6, 6, dtype=torch.bool), 0),
        (band(6, 6) & (torch.arange(6) != 2), 0),
        (band(6, 6).expand(1, 4, 6, 6), 0),
        (band(6, 6)[:, :, 2:], 0),
        (None, 0),
    ],
    ids=["causal", "window", "itself", "one token", "added", "all", "a hole", "by head", "not square", "none"],
)
def test_a_mask_is_read_as_a_window_only_if_it_is_one(mask, window):
    assert window_of_mask(mask) == window
