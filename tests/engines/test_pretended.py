"""Whole traces on a pretended GPU: the numbers of the CPU, devices never mixed, nothing waited for, few launches."""

import numpy as np
import pytest
import torch

from fasttrace import Tracer
from fasttrace.engines import reference, wavefront
from fasttrace.fusing import choose
from fasttrace.fusing.choose import fused
from fasttrace.models.anatomy import anatomy_of
from tests.conftest import all_grids, make_job
from tests.helpers import zoo
from tests.helpers.pretended import PretendedCuda, placed

FAMILIES = ("gpt2", "llama", "gemma2", "gemma3_text", "mixtral")
IDS = [5, 6, 7, 8, 9, 10, 11]
OPTIONS = {"subject": (1, 3), "samples": 2, "window": 3, "noise": 0.5}
LAUNCHES, AT_THE_END = 9, 2
"""Beyond the model's own: growth of the hidden state, of both rotary tables and of the positions (4), a restored output
(2), the MLP's kept and spread tokens (2), the finite check (1); once a pass the restored rows and the base rows."""
READOUT_WAITS = 6
"""The finite check, the rows, the base runs, the targets, and the ids and probabilities of the top tokens."""


@pytest.fixture
def gpu(monkeypatch):
    """With a kernel for attention, and the model's own norms and gates."""
    monkeypatch.setattr(choose, "compiler_is_there", lambda _: True)
    monkeypatch.setattr(choose, "GLUE_DEVICES", ())
    with PretendedCuda() as gpu:
        yield gpu


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def marked(model, gpu):
    """A model that notes where its first block begins and where its forward ends."""
    anatomy_of(model).blocks[0].register_forward_pre_hook(lambda *_: gpu.note("first block", ""))
    model.register_forward_hook(lambda *_: gpu.note("end", ""))
    return model


def warm_trace(name, gpu):
    """The log of a second trace of one shape."""
    tracer = Tracer(marked(placed(zoo.tiny_model(name)), gpu))
    for _ in range(2):
        gpu.log.clear()
        result = tracer.trace(IDS, **OPTIONS)
    assert (result.metadata["engine"], result.metadata["attention_by"]) == ("wavefront", "kernel")
    return tracer


@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES[1:])])
def test_a_trace_gives_the_grids_of_the_cpu(name, gpu):
    found = Tracer(placed(zoo.tiny_model(name))).trace(IDS, **OPTIONS)
    assert (found.metadata["engine"], found.metadata["attention_by"]) == ("wavefront", "kernel")
    expected = Tracer(zoo.tiny_model(name)).trace(IDS, **OPTIONS, engine="reference")
    for stream in expected.streams:
        spread = np.ptp(expected.grid(stream))
        np.testing.assert_allclose(found.grid(stream), expected.grid(stream), rtol=0, atol=1e-4 * spread)


def test_the_prompts_of_a_pack_have_the_scores_that_each_has_on_the_cpu(name, gpu):
    on_cpu, on_gpu = anatomy_of(zoo.tiny_model(name)), anatomy_of(placed(zoo.tiny_model(name)))
    sizes = ((9, (2, 4), 2), (6, (0, 2), 1), (9, (1, 3), 1))
    jobs = [make_job(t, span, n, all_grids(on_cpu.streams, 3, t)) for t, span, n in sizes]
    with fused(on_gpu):
        together = wavefront.run_jobs(on_gpu, jobs, lambda: None)
    for scores, job in zip(together, jobs, strict=True):
        expected = reference.run(on_cpu, job, lambda: None, rows=1000)
        assert np.abs(scores.cells - expected.cells).max() < 1e-4 * np.ptp(expected.cells)


def test_nothing_waits_from_the_first_block_to_the_readout(name, gpu):
    warm_trace(name, gpu)
    assert [event for event in gpu.between("first block", "end") if event.kind == "wait"] == []


def test_the_host_waits_for_results_alone(name, gpu):
    warm_trace(name, gpu)
    readout = gpu.log[[event.kind for event in gpu.log].index("end") :]
    waits = [event for event in readout if event.kind == "wait" and event.by != "readout._logits"]
    assert len(waits) <= READOUT_WAITS, waits


def test_a_block_launches_little_beyond_the_models_own(name, gpu):
    tracer = warm_trace(name, gpu)
    ours = gpu.between("first block", "end")
    gpu.log.clear()
    with torch.no_grad():
        tracer.model(input_ids=torch.tensor([IDS]).to(gpu.device), use_cache=False)
    own = gpu.between("first block", "end")
    launches, models = (sum(event.kind == "launch" for event in events) for events in (ours, own))
    assert launches - models <= LAUNCHES * len(tracer.anatomy.blocks) + AT_THE_END


def test_tables_go_over_in_three_copies(gpu):
    warm_trace("llama", gpu)
    assert sum(event.kind == "copy" for event in gpu.log) <= 3


def test_the_pretended_device_refuses_tensors_of_two_devices(gpu):
    there, here = torch.ones(3).to(gpu.device), torch.ones(3)
    with pytest.raises(RuntimeError, match="on two devices"):
        there + here
    assert (there + torch.tensor(1.0)).cpu().tolist() == [2.0] * 3


def test_the_pretended_device_sees_what_waits(gpu):
    there = torch.ones(3).pin_memory().to(gpu.device, non_blocking=True)
    assert [event.kind for event in gpu.log] == ["copy"]
    (there * 2).sum().item()
    there[[0, 1]]
    there[there > 0]
    there.cpu()
    torch.ones(3).to(gpu.device)
    assert [event.kind for event in gpu.log if event.kind == "wait"] == ["wait"] * 5
    assert sum(event.kind == "launch" for event in gpu.log) == 3
