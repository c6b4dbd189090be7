"""Models on several devices and in several processes: the grids are those of one device."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from accelerate import dispatch_model
from torch.utils import backend_registration

from fasttrace.api import Tracer
from fasttrace.engines import ENGINES, memory
from fasttrace.errors import ModelError
from fasttrace.models.anatomy import anatomy_of
from tests.conftest import all_grids, make_job
from tests.helpers import tensor_parallel
from tests.helpers.two_devices import device_map_of
from tests.helpers.zoo import INSTALLED, is_known, tiny_model

needs_shared_weights = pytest.mark.skipif(INSTALLED < (5, 17), reason="this transformers shares no weights out so")

PATIENCE = 150
"""Seconds after which a script is taken to hang; on a busy machine of two cores one takes 25."""


def output_of(*arguments):
    """What a Python script prints; it and what it started are gone afterwards, whatever happens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", *map(str, arguments)]
    script = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, complaints = script.communicate(timeout=PATIENCE)
    finally:
        if script.is_running():
            for process in (*script.children(recursive=True), script):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            script.wait()
    assert script.returncode == 0, complaints[-4000:]
    return printed


def error(scores, expected):
    """Largest difference of a cell, over the spread of the grids."""
    return np.abs(scores.cells - expected.cells).max() / np.ptp(expected.cells)


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch takes no devices that are written in Python",
)
def test_blocks_on_two_devices_give_the_grids_of_one():
    families = {"llama": "wavefront", "bloom": "fork", "gemma3n_text": "wavefront", "mixtral": "wavefront"}
    families = {family: engine for family, engine in families.items() if is_known(family)}
    errors = json.loads(output_of("tests.helpers.two_devices", *families).splitlines()[-1])
    assert {family: set(by_engine) for family, by_engine in errors.items()} == {
        family: {engine, "rows"} for family, engine in families.items()
    }
    assert max(value for by_engine in errors.values() for value in by_engine.values()) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device beside the CPU")
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3n_text"])
def test_blocks_on_the_cpu_and_on_a_gpu_give_the_grids_of_the_cpu(family):
    model = tiny_model(family)
    anatomy = anatomy_of(model)
    job = make_job(7, (1, 3), 2, all_grids(anatomy.streams, 3, 7))
    engine = "fork" if family == "bloom" else "wavefront"
    expected = ENGINES[engine](anatomy, job, lambda: None)
    device_map = device_map_of(model, ["cpu", "cpu", "cuda:0", "cuda:0"], "cpu")
    split = anatomy_of(dispatch_model(model, device_map, main_device="cpu"))
    assert {device.type for device in split.devices} == {"cpu", "cuda"}
    for name in (engine, "rows"):
        assert error(ENGINES[name](split, job, lambda: None), expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to bring weights to")
def test_weights_that_come_to_a_gpu_give_the_grids_of_the_cpu():
    model = tiny_model("llama")
    anatomy = anatomy_of(model)
    job = make_job(7, (1, 3), 2, all_grids(anatomy.streams, 3, 7))
    expected = ENGINES["wavefront"](anatomy, job, lambda: None)
    device_map = device_map_of(model, ["cuda:0", "cpu", "cpu", "cuda:0"], "cuda:0")
    offloaded = anatomy_of(dispatch_model(model, device_map))
    assert offloaded.is_offloaded
    for engine in ("wavefront", "rows"):
        assert error(ENGINES[engine](offloaded, job, lambda: None), expected) < 1e-4


@pytest.mark.slow
@needs_shared_weights
def test_two_processes_that_share_the_weights_give_the_grids_of_one(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tracer = Tracer(model)
    launcher = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", 2)
    output_of(*launcher, "-m", "tests.helpers.tensor_parallel", tmp_path)
    for process in range(2):
        with np.load(tmp_path / f"process_{process}.npz") as grids:
            assert len(grids) == 3 * (1 + len(ENGINES))
            for engine in ENGINES:
                expected = tracer.trace(**tensor_parallel.REQUEST, engine=engine)
                for stream in expected.streams:
                    grid = expected.grid(stream)
                    np.testing.assert_allclose(grids[f"{engine} {stream}"], grid, rtol=0, atol=1e-5 * np.ptp(grid))


def test_processes_that_share_a_model_make_the_passes_of_the_one_with_least_memory(monkeypatch):
    """Otherwise one of them would wait for ever for the others' part of a product."""
    anatomy = anatomy_of(tiny_model("llama"))
    anatomy.model._device_mesh = object()
    elsewhere = memory.READOUT_BYTES + 60 * memory.bytes_per_token(anatomy)

    def all_reduce(tensor, operation):
        assert operation == torch.distributed.ReduceOp.MIN
        tensor.clamp_(max=int(elsewhere / memory.MEMORY_SHARE))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert memory.tokens_allowed(anatomy, "auto") in (59, 60)


def test_a_pack_fits_the_device_with_least_memory(monkeypatch):
    anatomy = anatomy_of(tiny_model("llama"))
    least = (memory.READOUT_BYTES + 60 * memory.bytes_per_token(anatomy)) / memory.MEMORY_SHARE
    places = {torch.device("cpu"): 10**10, torch.device("cuda:0"): 10**10, torch.device("cuda:1"): int(least) + 1}
    monkeypatch.setitem(vars(anatomy), "devices", frozenset(places))
    monkeypatch.setattr(memory, "free_bytes", places.get)
    assert memory.tokens_allowed(anatomy, "auto") == 60


@needs_shared_weights
def test_a_model_whose_blocks_are_in_several_processes_is_refused():
    from transformers.distributed import DistributedConfig

    model = tiny_model("llama")
    model.config.distributed_config = DistributedConfig(pp_size=2)
    with pytest.raises(ModelError, match=r"blocks of LlamaForCausalLM are in several processes; load it with tp_size"):
        anatomy_of(model)
