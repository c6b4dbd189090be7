"""Names become models where they belong, and what cannot be loaded is one clear sentence."""

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, ViTConfig

from fasttrace.errors import ModelError
from fasttrace.models import loading
from fasttrace.models.loading import choose_device, choose_dtype, load
from tests.helpers.zoo import tiny_model

LAYERS = [f"model.layers.{number}" for number in range(4)]
OTHERS = ["model.embed_tokens", "model.norm", "lm_head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    return str(path)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def request_of(monkeypatch):
    """What a load asks transformers for, without the weights."""

    def asked(*args, **kwargs):
        seen = {}

        def from_pretrained(source, **options):
            seen.update(options)
            raise RuntimeError("that is enough")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
        with pytest.raises(ModelError, match="cannot be loaded: that is enough"):
            load(*args, **kwargs)
        return seen

    return asked


def devices(model):
    return {name.removesuffix(".weight"): parameter.device.type for name, parameter in model.named_parameters()}


def test_a_model_comes_in_evaluation_mode_in_the_type_and_on_the_device_asked_for(folder):
    model, tokenizer = load(folder, "bfloat16", "cpu")
    assert not any(module.training for module in model.modules())
    assert {(parameter.dtype, parameter.device.type) for parameter in model.parameters()} == {(torch.bfloat16, "cpu")}
    assert tokenizer is None
    assert not hasattr(model, "_hf_hook")


def test_a_model_is_never_moved_after_it_is_loaded(folder, monkeypatch):
    """Quantized weights, and those that accelerate has placed, refuse to be."""
    monkeypatch.setattr(PreTrainedModel, "to", lambda *_: pytest.fail("moved"))
    load(folder)
    load(folder, device_map={"model": "disk", "lm_head": "cpu"})


def test_automatic_types_go_with_the_device(gpus):
    assert choose_dtype("auto", choose_device("auto")) == torch.float16
    assert choose_dtype("auto", choose_device("cpu")) == torch.float32
    assert choose_dtype("auto", choose_device("cuda:1")) == torch.float16
    assert choose_dtype("float16", choose_device("cuda")) == torch.float16


@pytest.mark.parametrize(
    ("device_map", "dtype"),
    [
        ("auto", torch.float16),
        ("balanced", torch.float16),
        ({"": "cuda:1"}, torch.float16),
        ({**dict.fromkeys(OTHERS, 0), **dict.fromkeys(LAYERS, 1)}, torch.float16),
        ({**dict.fromkeys(OTHERS, "cpu"), **dict.fromkeys(LAYERS, "disk"), LAYERS[1]: 0}, torch.float16),
        ({"": "cpu"}, torch.float32),
        ({"model": "disk", "lm_head": "cpu"}, torch.float32),
    ],
)  # fmt: skip
def test_with_a_device_map_the_automatic_type_is_half_precision_where_a_gpu_computes(
    gpus, request_of, folder, device_map, dtype
):
    asked = request_of(folder, device_map=device_map)
    assert asked["device_map"] == device_map
    assert asked["dtype"] == dtype


def test_a_device_map_that_may_not_use_gpus_gets_single_precision(gpus, request_of, folder):
    assert request_of(folder, device_map="auto", max_memory={"cpu": "1GB"})["dtype"] == torch.float32
    assert request_of(folder, device_map="auto", max_memory={0: "1GB"})["dtype"] == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be used")
@pytest.mark.parametrize("device_map", loading.STRATEGIES)
def test_without_a_gpu_every_strategy_keeps_the_model_in_memory(folder, device_map):
    model, _ = load(folder, device_map=device_map)
    assert set(devices(model).values()) == {"cpu"}
    assert model.dtype == torch.float32


def test_what_does_not_fit_into_the_memory_allowed_stays_on_disk(folder):
    allowed = {"cpu": "60KB"}
    model, _ = load(folder, device_map="auto", max_memory=allowed)
    assert devices(model)["model.embed_tokens"] == "cpu"
    assert devices(model)["model.layers.3.mlp.up_proj"] == "meta"
    assert allowed == {"cpu": "60KB"}, "transformers writes into the mapping that it is given"


def test_a_mapping_places_modules_as_it_says(folder, tmp_path):
    placed = {**dict.fromkeys([*OTHERS, *LAYERS], "cpu"), LAYERS[2]: "disk"}
    model, _ = load(folder, device_map=placed, offload_folder=tmp_path / "made" / "here")
    on_disk = {name for name, place in devices(model).items() if place == "meta"}
    assert on_disk == {name for name in devices(model) if name.startswith("model.layers.2.")}
    assert (tmp_path / "made" / "here").is_dir()


def test_weights_that_have_to_be_rewritten_need_a_folder(tmp_path):
    """Experts are saved one by one and kept together."""
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    placed = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ModelError, match=r"would go to disk and have to be written there: pass offload_folder='a/fol"):
        load(str(tmp_path / "model"), device_map=placed)
    model, _ = load(str(tmp_path / "model"), device_map=placed, offload_folder=tmp_path / "weights")
    assert devices(model)["model.layers.0.mlp.experts.down_proj"] == "meta"
    assert list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose from auto, float16"),
        ({"device": "tpu9"}, "unknown device 'tpu9'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there: torch sees . GPUs"),
        ({"device": "cpu", "device_map": "auto"}, "device is 'cpu', and device_map names devices too"),
        ({"max_memory": {"cpu": "1GB"}}, "limits of a device_map; pass device_map='auto' too"),
        ({"offload_folder": "here"}, "limits of a device_map; pass device_map='auto' too"),
        ({"device_map": "everywhere"}, "'everywhere': give auto, balanced, balanced_low_0, sequential, or {"),
        ({"device_map": "cuda:0"}, "for a single device there is device='cuda:0'"),
        ({"device_map": 0}, "device_map is 0: give auto"),
        ({"device_map": {}}, "device_map is {}: give auto"),
        ({"device_map": {"": "tpu9"}}, "unknown device 'tpu9'"),
        ({"device_map": {"": 99}}, "device 'cuda:99' is not there"),
        ({"device_map": {"model.layer": "cpu", "lm_head": "cpu"}}, "names 'model.layer', and Llama.* has no such"),
        ({"device_map": dict.fromkeys(LAYERS, "cpu")}, r"for model.embed_tokens.weight \(3 of 39 weights"),
        ({"device_map": {"": "cpu", LAYERS[0]: "disk"}}, "device_map has '', the whole model, beside other modules"),
        ({"device_map": "auto", "max_memory": 5}, "max_memory is 5, expected memory by device"),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "cannot be loaded: .*lots is not in a valid format"),
        ({"device_map": "auto", "offload_folder": __file__}, "offload_folder .* cannot be made: File exists"),
    ],
)  # fmt: skip
def test_places_that_cannot_be_are_errors(folder, options, message):
    with pytest.raises(ModelError, match=message):
        load(folder, **options)


def edited(folder, tmp_path, **changes):
    """A copy of a model's configuration, changed; without weights."""
    with open(f"{folder}/config.json") as file:
        config = json.load(file) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.skipif(find_spec("hqq") is not None, reason="the package that should be missing is installed")
def test_a_quantized_checkpoint_whose_package_is_missing_says_which(folder, tmp_path):
    name = edited(folder, tmp_path, quantization_config={"quant_method": "hqq"})
    with pytest.raises(ModelError, match=r"needs a package that is not installed: A valid HQQ version"):
        load(name)


def test_a_model_that_does_not_fit_is_told_about_device_maps(folder, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB.\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ModelError, match=r"does not fit \(CUDA out of memory.* 14.00 GiB.\); device_map='auto' uses"):
        load(folder)


def test_a_full_disk_is_not_taken_for_a_model_that_is_not_there(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ModelError, match=r"cannot be loaded: .*No space left on device"):
        load(folder)


def test_models_of_other_kinds_are_refused(folder, tmp_path):
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match="is not a model with a causal language-model head: Unrecognized"):
        load(str(tmp_path / "vit"))
    with pytest.raises(ModelError, match=r"cannot be loaded: The checkpoint .* model type `oddity`"):
        load(edited(folder, tmp_path, model_type="oddity"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"cannot be loaded: Error no file named model\.safetensors"):
        load(edited(folder, tmp_path / "empty"))
