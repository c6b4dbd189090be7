"""Folders that hold a PEFT adapter alone: loaded into their base model, every weight of both."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fasttrace
from fasttrace.errors import ModelError
from tests.helpers.run_facts import save_model

peft = pytest.importorskip("peft")

IDS = [7, 12, 33, 45]
TASK = {"task_type": "CAUSAL_LM"}
KINDS = {
    "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **TASK),
    "lora with a head": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], **TASK),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], **TASK),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base") / "model", "llama")


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """kind -> (folder of an adapter of that kind, PEFT's own model)."""
    home, made = tmp_path_factory.mktemp("adapters"), {}

    def adapter(kind):
        if kind not in made:
            model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), KINDS[kind]).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
            model.save_pretrained(home / kind)
            made[kind] = home / kind, model
        return made[kind]

    return adapter


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the adapter's folder, changed."""

    def copy(change, kind="lora"):
        shutil.copytree(saved(kind)[0], tmp_path / "adapter")
        change(tmp_path / "adapter")
        return tmp_path / "adapter"

    return copy


def settings(**changes):
    def rewrite(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return rewrite


def weights(change):
    def rewrite(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return rewrite


def only(found, *parts):
    return {key: value for key, value in found.items() if any(part in key for part in parts)}


@pytest.mark.parametrize("kind", ["lora", "lora with a head", "dora", "ia3"])
def test_an_adapter_gives_what_peft_gives(saved, kind):
    folder, model = saved(kind)
    tracer = fasttrace.Tracer.from_pretrained(folder)
    result = tracer.trace(IDS, subject=(1, 3), samples=1)
    expected = model(torch.tensor([IDS])).logits[0, -1].softmax(-1)
    assert result.clean_prob == pytest.approx(expected[result.target_id].item(), rel=1e-5)
    assert tracer.name == folder.name
    assert tracer.tokenizer is not None  # the base model's
    assert result.metadata["engine"] == "wavefront"


def test_an_adapter_may_bring_a_tokenizer_and_its_base_models_configuration(base, copied):
    """As some trainers save it."""

    def beside(folder):
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(base / name, folder)

    tracer = fasttrace.Tracer.from_pretrained(copied(beside))
    assert tracer.tokenizer.name_or_path.endswith("adapter")


def test_a_model_that_peft_wraps_is_traced_as_it_is(saved):
    folder, model = saved("lora")
    loaded = fasttrace.Tracer.from_pretrained(folder).trace(IDS, subject=(1, 3), samples=1)
    given = fasttrace.Tracer(model).trace(IDS, subject=(1, 3), samples=1)
    assert given.clean_prob == pytest.approx(loaded.clean_prob)
    assert given.grid("mlp_activation") == pytest.approx(loaded.grid("mlp_activation"), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("lora", weights(lambda found: dict(list(found.items())[::2])), r"8 are not in its files \(base_model.model"),
        ("lora with a head", weights(lambda found: only(found, "lora_")), "KeyError: 'base_model.model.lm_head"),
        ("dora", weights(lambda found: only(found, "lora_A", "lora_B")), "lora_magnitude_vector"),
        ("lora", weights(lambda found: found | {"x.lora_A.weight": torch.ones(4, 32)}), "1 is in its files without"),
        ("lora", weights(lambda found: {key: torch.ones(3, 3) for key in found}), "size mismatch for base_model"),
        ("lora", lambda folder: os.truncate(folder / "adapter_model.safetensors", 99), "adapter_model.safetensors in"),
        ("lora", lambda folder: (folder / "adapter_model.safetensors").unlink(), "has adapter_config.json and no adap"),
        ("lora", lambda folder: (folder / "adapter_config.json").write_text("null"), "adapter_config.json in .* holds"),
        ("lora", settings(base_model_name_or_path=None), "adapter_config.json of .* names no base model"),
        ("lora", settings(base_model_name_or_path="no/such"), "no/such, the base model of the adapter .*, is not a"),
        ("lora", settings(base_model_name_or_path=os.path.dirname(__file__)), "the base model of .* has no config"),
        ("lora", settings(peft_type="none such"), "cannot be loaded: KeyError: 'none such'"),
        ("lora", settings(target_modules=["none_such"]), "cannot be loaded: Target modules"),
        ("prefix", lambda folder: None, r"\(PREFIX_TUNING\) puts positions of its own before the prompt, and cannot"),
        ("prompt", lambda folder: None, r"\(PROMPT_TUNING\) puts positions of its own before the prompt, and cannot"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_one_sentence(copied, kind, change, message):
    with pytest.raises(ModelError, match=message) as caught:
        fasttrace.Tracer.from_pretrained(copied(change, kind))
    assert "\n" not in str(caught.value)


def test_a_folder_with_model_and_adapter_is_ambiguous(base, copied):
    folder = copied(lambda folder: shutil.copytree(base, folder, dirs_exist_ok=True))
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        fasttrace.Tracer.from_pretrained(folder)


def test_weights_that_the_base_model_lacks_are_named(base, copied, tmp_path):
    shutil.copytree(base, tmp_path / "cut")
    found = load_file(base / "model.safetensors")
    save_file({k: v for k, v in found.items() if ".1." not in k}, tmp_path / "cut" / "model.safetensors")
    adapter = copied(settings(base_model_name_or_path=str(tmp_path / "cut")))
    with pytest.raises(ModelError, match=r"the base model of the adapter .* are not those of a Llama\w+: 9 are"):
        fasttrace.Tracer.from_pretrained(adapter)


def test_an_adapter_is_not_put_into_a_model_on_disk(saved):
    with pytest.raises(ModelError, match="needs a base model in memory: leave 'disk' out of the device_map"):
        fasttrace.Tracer.from_pretrained(saved("lora")[0], device_map={"model": "disk", "lm_head": "cpu"})


def test_without_peft_it_is_named(saved, monkeypatch):
    folder, _ = saved("lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"is an adapter of .* and needs the package peft: pip install peft"):
        fasttrace.Tracer.from_pretrained(folder)
