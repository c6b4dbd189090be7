"""Models that are larger than the device, or smaller than their weights: offloaded, quantized, in half precision."""

import logging
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from fasttrace.api import Tracer
from fasttrace.engines import ENGINES, reference
from fasttrace.engines import self_check as select
from fasttrace.errors import EngineError, NumericsError
from fasttrace.models.anatomy import anatomy_of
from fasttrace.models.loading import load
from tests.conftest import all_grids, loads_in_blocks, make_job
from tests.helpers.two_devices import device_map_of
from tests.helpers.zoo import INSTALLED, tiny_model

OFFLOADED = {
    "gpt2": ("wavefront", "rows"),
    "llama": ("wavefront", "rows"),
    "gemma3n_text": ("wavefront", "rows"),
    "mixtral": ("wavefront", "rows"),
    "bloom": ("fork", "rows"),
}
"""Family -> engines that run it."""

IDS = torch.tensor([[1, 2, 3, 4]])

ignore_deprecations = pytest.mark.filterwarnings("ignore:.*deprecated")


def run(engine, anatomy, job):
    return ENGINES[engine](anatomy, job, lambda: None)


def job_of(anatomy):
    return make_job(7, (1, 3), 2, all_grids(anatomy.streams, 3, 7), d_model=anatomy.d_model)


def error(scores, expected):
    """Largest difference of a cell, over the spread of the grids."""
    return np.abs(scores.cells - expected.cells).max() / np.ptp(expected.cells)


def offloaded(family, way, folder):
    """A tiny model whose weights come when they are used."""
    model = tiny_model(family)
    if way == "cpu_offload":
        return cpu_offload(model, torch.device("cpu"))
    if way == "disk_offload":
        return disk_offload(model, folder, torch.device("cpu"))
    model.save_pretrained(folder / "model")
    device_map = device_map_of(model, ["cpu", "disk", "disk", "cpu"], "cpu")
    return load(str(folder / "model"), device_map=device_map, offload_folder=folder / "offloaded")[0]


def loaded_weights(model):
    return [name for name, parameter in model.named_parameters() if not parameter.is_meta]


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")  # but buffers, in gemma3n
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("family", OFFLOADED)
def test_offloaded_weights_come_once_a_pass_and_give_the_grids_of_memory(family, way, tmp_path, loads):
    in_memory = anatomy_of(tiny_model(family))
    job = job_of(in_memory)
    model = offloaded(family, way, tmp_path)
    anatomy = anatomy_of(model)
    assert anatomy.is_offloaded
    before = loaded_weights(model)
    loads.clear()
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    once = loads_in_blocks(anatomy, loads)
    on_disk = anatomy.blocks[1:3] if way == "device_map" else anatomy.blocks
    assert len(once) == sum(1 for block in on_disk for _ in block.parameters())
    if family != "gemma3n_text":  # whose blocks call one of their linears twice
        assert set(once.values()) == {1}
    for engine in OFFLOADED[family]:
        loads.clear()
        scores = run(engine, anatomy, job)
        if engine != "fork":  # which calls attention once a group of rows
            assert loads_in_blocks(anatomy, loads) == once
        assert loaded_weights(model) == before
        assert error(scores, run(engine, in_memory, job)) < 1e-6


def test_other_engines_bring_the_weights_again_and_again(tmp_path, loads):
    """So the count above can fail."""
    anatomy = anatomy_of(offloaded("llama", "cpu_offload", tmp_path))
    job = job_of(anatomy)
    few = job.part(slice(0, 60, 20), slice(1))
    loads.clear()
    run("reference", anatomy, few)
    assert set(loads_in_blocks(anatomy, loads).values()) == {2 + len(few.cells)}
    loads.clear()
    run("fork", anatomy, job)
    assert max(loads_in_blocks(anatomy, loads).values()) > 3


@pytest.mark.parametrize(("family", "chosen"), [("llama", "wavefront"), ("bloom", "rows")])
def test_rows_goes_before_fork_when_weights_have_to_come(family, chosen, tmp_path):
    anatomy = anatomy_of(offloaded(family, "disk_offload", tmp_path))
    assert select.order(anatomy) == ("wavefront", "rows", "fork", "reference")
    assert select.order(anatomy_of(tiny_model(family))) == tuple(ENGINES)
    assert select.choose(anatomy).name == chosen


@pytest.mark.parametrize("family", ["llama", "bloom", "doge", "zaya"])
def test_looking_at_a_model_leaves_no_weights_behind(family):
    """The last two have weights of their own in blocks and trunk, whose forward is cut short."""
    model = cpu_offload(tiny_model(family), torch.device("cpu"))
    anatomy = anatomy_of(model)
    assert anatomy.mixer_axes
    assert loaded_weights(model) == []


def test_blocks_that_come_whole_come_once_a_pass(loads):
    in_memory = anatomy_of(tiny_model("llama"))
    model = cpu_offload(tiny_model("llama"), torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"])
    anatomy, job = anatomy_of(model), job_of(in_memory)
    assert anatomy.mixer_axes
    assert loaded_weights(model) == []
    for engine in ("wavefront", "rows"):
        loads.clear()
        assert error(run(engine, anatomy, job), run(engine, in_memory, job)) < 1e-6
        assert set(loads_in_blocks(anatomy, loads).values()) == {1}


@pytest.mark.parametrize("engine", ["wavefront", "rows"])
def test_an_interrupted_pass_leaves_an_offloaded_model_as_it_was(engine, tmp_path):
    model = offloaded("llama", "disk_offload", tmp_path)
    anatomy, forwards = anatomy_of(model), [module.forward for module in model.modules()]
    job = job_of(anatomy)
    expected = run(engine, anatomy, job)

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ENGINES[engine](anatomy, job, interrupt)
    assert loaded_weights(model) == []
    assert [module.forward for module in model.modules()] == forwards
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    np.testing.assert_array_equal(run(engine, anatomy, job).cells, expected.cells)


def test_a_whole_trace_of_an_offloaded_model_equals_that_in_memory(tmp_path):
    request = {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 2, "window": 3}
    expected = Tracer(tiny_model("llama")).trace(**request)
    result = Tracer(offloaded("llama", "device_map", tmp_path)).trace(**request)
    assert result.metadata["engine"] == "wavefront"
    for stream in expected.streams:
        np.testing.assert_allclose(result.grid(stream), expected.grid(stream), rtol=1e-6)


@pytest.mark.parametrize("way", ["in memory", "cpu_offload"])
@pytest.mark.parametrize(("family", "engine"), [("llama", "wavefront"), ("llama", "rows"), ("bloom", "fork")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_first_block_with_an_overflow_is_named(family, engine, way, dtype):
    model = tiny_model(family, dtype)
    with torch.no_grad():
        for number in (2, 3):
            anatomy_of(model).parts.down[number].weight.fill_(float("inf"))
    if way == "cpu_offload":
        model = cpu_offload(model, torch.device("cpu"))
    anatomy = anatomy_of(model)
    advice = "load the model with dtype='bfloat16'" if dtype == torch.float16 else "look at the weights"
    with pytest.raises(NumericsError, match=rf"block 2 produced inf or NaN in {str(dtype)[6:]}: {advice}"):
        run(engine, anatomy, make_job(5, (1, 2), 1, all_grids(anatomy.streams, 2, 5)))


class PackedLinear(nn.Module):
    """A linear layer as quantizing packages make them: four 8-bit weights to an integer, in a buffer, no `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (weight / self.scale).round().to(torch.int8).flatten().view(torch.int32))

    def forward(self, hidden):
        weight = self.packed.view(torch.int8).view(self.out_features, self.in_features) * self.scale
        return nn.functional.linear(hidden, weight.to(hidden.dtype))


def packed(module):
    """All linear modules inside, replaced."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            packed(child)


@pytest.mark.parametrize("head_too", [False, True], ids=["blocks", "blocks and head"])
def test_quantized_linears_are_called_and_never_looked_into(head_too):
    model, whole = tiny_model("llama"), anatomy_of(tiny_model("llama"))
    packed(model if head_too else model.model)
    anatomy = anatomy_of(model)
    assert anatomy.streams == whole.streams
    assert anatomy.unit_work == whole.unit_work
    assert anatomy.widest == whole.widest
    assert anatomy.vocabulary == whole.vocabulary
    assert select.choose(anatomy).name == "wavefront"
    tracer, request = Tracer(model), {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 2, "window": 3}
    expected = tracer.trace(**request, engine="reference")
    for options in ({"engine": "wavefront"}, {"engine": "rows"}, {"engine": "wavefront", "budget": 20}):
        result = tracer.trace(**request, **options)
        for stream in expected.streams:
            np.testing.assert_allclose(result.grid(stream), expected.grid(stream), rtol=1e-5)
    assert result.cost.flops < expected.cost.flops


def rounded_by_call():
    quantization = pytest.importorskip("torch.ao.quantization")
    return quantization.quantize_dynamic(tiny_model("llama"), {nn.Linear}, dtype=torch.qint8, inplace=True)


@ignore_deprecations
@pytest.mark.parametrize("told", [False, True], ids=["quantized by somebody", "quantized by transformers"])
def test_scales_of_whole_calls_are_noticed_and_leave_one_run_at_a_time(told):
    """torch's dynamic int8 rounds activations by the largest one of a call: a token then depends on later tokens, and
    on the rows beside its own. No packing can repeat that, so only the reference engine may run."""
    model = rounded_by_call()
    if told:
        model.quantization_method = "of some package"  # as from_pretrained notes it
    tracer = Tracer(model)
    anatomy, request = tracer._anatomy, {"prompt": [5, 6, 7, 8], "subject": (1, 2), "samples": 1}
    assert anatomy.streams == ("block_output", "mlp_activation", "attention_output")
    assert anatomy.unit_work == anatomy_of(tiny_model("llama")).unit_work
    for engine in ("wavefront", "rows"):
        with pytest.raises(EngineError, match=r"what a run gives moves by .* with what else is in its batch; use"):
            tracer.trace(**request, engine=engine)
    result = tracer.trace(**request)
    assert result.metadata["engine"] == "reference"
    assert result.metadata["engine_reason"].endswith("reference is one plain forward pass after another")
    with torch.no_grad():
        own = model(torch.tensor([request["prompt"]])).logits[0, -1].softmax(-1)
    assert result.clean_prob == pytest.approx(float(own.max()), rel=1e-5)
    few = job_of(anatomy).part(slice(0, None, 5), slice(None))
    alone = run("reference", anatomy, few)
    together = reference.run(anatomy, few, lambda: None, rows=len(few.cells) * 2)
    assert 1e-2 < error(together, alone) < 0.3, "plain passes, too, depend on what is in the batch"
    assert 1e-2 < error(run("wavefront", anatomy, few), alone) < 0.3, "and a pack is another batch"


class RoundedByToken(nn.Linear):
    """Activations in 8 bits with a scale for each token."""

    def forward(self, hidden):
        scale = hidden.abs().amax(-1, keepdim=True) / 127
        return super().forward((hidden / scale).round() * scale)


def test_scales_of_tokens_are_not_the_batchs_and_the_tolerance_is_what_rounding_moves():
    model = tiny_model("llama")
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = RoundedByToken
    model.quantization_method = "of some package"
    anatomy = anatomy_of(model)
    choice = select.choose(anatomy)
    (checks,) = select._CHECKS[model]
    assert choice.name == "wavefront"
    assert choice.self_check_error < checks.tolerance < select.HALF_TOLERANCE
    assert select._effect_of_batch(anatomy, checks.job) == 0


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
def test_models_of_bitsandbytes_are_traced(settings, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantized = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**settings))
    quantized.save_pretrained(tmp_path / "quantized")
    model, _ = load(str(tmp_path / "quantized"), "float32", "cpu")
    assert type(model.model.layers[0].mlp.down_proj).__module__.startswith("bitsandbytes")
    anatomy = anatomy_of(model)
    assert select.choose(anatomy).name == "wavefront"
    job = job_of(anatomy)
    # 8 bits: which columns stay in 16 is decided by all tokens of a call
    allowed = 0.2 if "load_in_8bit" in settings else 1e-5
    assert error(run("wavefront", anatomy, job), run("rows", anatomy, job)) < allowed


@pytest.fixture
def uncompiled():
    """Flex attention as written; compiling it takes 15 s."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings(action="ignore"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
@pytest.mark.parametrize(("family", "safe"), [("llama", "sdpa"), ("mistral", "sdpa"), ("gpt_oss", "eager")])
def test_fast_attention_of_the_users_is_computed_by_one_that_takes_masks_and_a_log_says_so(name, family, safe, caplog):
    if family == "gpt_oss" and INSTALLED < (5, 17) and "flash" in name:
        pytest.skip("this transformers refuses such a GPT-OSS")
    model = tiny_model(family)
    model.set_attn_implementation(safe)
    anatomy = anatomy_of(model)
    job = job_of(anatomy)
    expected = run("wavefront", anatomy, job)
    model.config._attn_implementation_internal = name  # its package need not be there
    with caplog.at_level(logging.INFO, logger="fasttrace"):
        scores = run("wavefront", anatomy, job)
    assert error(scores, expected) < 1e-6
    assert f"attention '{name}' takes no mask of a pack: tracing computes it with '{safe}'" in caplog.text
    assert model.config._attn_implementation == name


@pytest.mark.usefixtures("uncompiled")
def test_a_model_set_to_flex_attention_passes_its_self_check():
    model = tiny_model("llama")
    request = {"prompt": [5, 6, 7, 8, 9], "subject": (1, 3), "samples": 1, "window": 3}
    expected = Tracer(model).trace(**request)
    model.set_attn_implementation("flex_attention")
    result = Tracer(model).trace(**request)
    assert result.metadata["engine"] == "wavefront"
    assert result.metadata["attention"] == "flex_attention"
    assert model.config._attn_implementation == "flex_attention"
    for stream in expected.streams:
        np.testing.assert_allclose(result.grid(stream), expected.grid(stream), rtol=1e-5)
