"""What is given as a model, its name or its modules: taken, or one sentence says what to give."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, LlamaForCausalLM, TextGenerationPipeline

import fasttrace
from fasttrace.errors import ModelError
from tests.helpers.run_facts import save_model
from tests.helpers.tokenizers import byte_level
from tests.helpers.zoo import tiny_model


def blip():
    """A model that answers questions about pictures."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "opt", "vocab_size": 101, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "word_embed_proj_dim": 32}
    vision, between = small | {"image_size": 16, "patch_size": 8}, small | {"vocab_size": 50, "encoder_hidden_size": 32}
    config = Blip2Config(
        text_config=text, vision_config=vision, qformer_config=between, num_query_tokens=2, image_token_index=99
    )
    return Blip2ForConditionalGeneration(config)


def llama(**config):
    model = tiny_model("llama", vocab_size=300)
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.DataParallel(llama()), r"DataParallel wraps the model; .*: Tracer\(model.module, tokenizer\)"),
        (lambda: torch.compile(llama()), r"OptimizedModule wraps the model; .*: Tracer\(model._orig_mod, tokenizer\)"),
        (lambda: nn.DataParallel(torch.compile(llama())), r"Tracer\(model.module._orig_mod, tokenizer\)"),
        (lambda: "gpt2", r"the model is 'gpt2'; Tracer.from_pretrained\('gpt2'\) loads one by its name"),
        (lambda: Path("folder"), r"the model is 'folder'; Tracer.from_pretrained"),
        (lambda: LlamaForCausalLM, r"the model is the class LlamaForCausalLM; give .*LlamaForCausalLM.from_pretrained"),
        (lambda: (llama(), None), r"the model is a tuple; give model and tokenizer one by one: Tracer\(model, token"),
        (
            lambda: TextGenerationPipeline(llama(), tokenizer=byte_level()),
            "TextGenerationPipeline holds a model",
        ),
        (lambda: nn.Linear(2, 2), "Linear is not a Hugging Face model; load one with AutoModelForCausalLM"),
        (lambda: None, "NoneType is not a Hugging Face model"),
        (byte_level, "is not a Hugging Face model"),
        (lambda: llama(return_dict=False), "returns tuples; set model.config.return_dict = True"),
        (blip, r"needs images beside the tokens and cannot be traced \(.*pixel_values.*Tracer\(model.language_model"),
    ],
)
def test_what_is_not_a_model_to_trace_is_told_what_is(model, message):
    with pytest.raises(ModelError, match=message) as caught:
        fasttrace.Tracer(model())
    assert "\n" not in str(caught.value)


def test_the_language_model_inside_is_traced():
    assert fasttrace.Tracer(blip().language_model).trace([5, 6, 7], subject=(0, 1), samples=1).clean_prob > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the model's name is '', expected an id"),
        (" ", "the model's name is ' ', expected an id"),
        ("a\0b", "expected an id such as"),
        (None, "the model's name is a NoneType"),
        (5, "the model's name is a int"),
        (b"gpt2", "the model's name is a bytes"),
        (["gpt2"], "the model's name is a list"),
        (
            nn.Linear(1, 1),
            r"a Linear, expected an id, a folder or a GGUF file; a model that is loaded already goes into Tracer\(",
        ),
        ("https://huggingface.co/gpt2", "is the address 'https://huggingface.co/gpt2'; give its id"),
        ("file:///models/gpt2", "is the address"),
        (__file__, "is a file: give the folder that holds it"),
        ("./no/such/folder", "is not a local folder with a model, not in the local cache, and cannot be fetched"),
        ("~nosuchuser/model", "is not a local folder with a model"),
    ],
)
def test_what_cannot_be_a_models_name_is_refused(name, message):
    with pytest.raises(ModelError, match=message):
        fasttrace.Tracer.from_pretrained(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("home") / "model")


def test_paths_are_names(folder, tmp_path):
    result = fasttrace.Tracer.from_pretrained(folder).trace([1, 2, 3], subject=(0, 1), samples=1)
    result.save(tmp_path / "trace.parquet")
    assert fasttrace.load(tmp_path / "trace.parquet").metadata["model"] == "model"


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert fasttrace.Tracer.from_pretrained("~/model").name == "model"


def test_names_of_given_models_are_text_in_results(tmp_path):
    tracer = fasttrace.Tracer(llama(name_or_path=Path("/models/x")), name=Path("mine"), revision=Path("main"))
    result = tracer.trace([1, 2, 3], subject=(0, 1), samples=1)
    result.save(tmp_path / "trace.parquet")
    assert (tracer.name, tracer.revision) == ("mine", "main")
    for options in ({"name": 5}, {"revision": 5}):
        with pytest.raises(ModelError, match="is 5, expected text for the results to record"):
            fasttrace.Tracer(llama(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": ""}, "revision is '', expected a branch"),
        ({"revision": 5}, "revision is 5, expected a branch"),
        ({"dtype": 5}, "unknown dtype '5'"),
        ({"device": 5}, "device is 5, expected auto"),
        ({"device": None}, "device is None, expected auto"),
        ({"device": "meta"}, "device 'meta' holds no numbers"),
        ({"device": "hpu"}, "device 'hpu' is not there"),
        ({"modules": 5}, "modules is 5, expected paths by name"),
        ({"modules": ["blocks"]}, r"modules is \['blocks'\], expected paths by name"),
        ({"modules": {"blocks": 5}}, "expected paths by name, such as"),
        ({"modules": {"none such": "x"}}, "modules has 'none such'; its keys are embedding"),
        ({"offload_folder": 5, "device_map": "auto"}, "offload_folder is 5, expected the path of a folder"),
    ],
)
def test_options_are_checked_before_anything_is_read(folder, monkeypatch, options, message):
    monkeypatch.setattr("fasttrace.models.checkpoints.read_json", lambda _: pytest.fail("the folder was read"))
    with pytest.raises(ModelError, match=message):
        fasttrace.Tracer.from_pretrained(folder, **options)


def test_a_revision_of_a_local_folder_is_said_to_mean_nothing(folder, caplog):
    fasttrace.Tracer.from_pretrained(folder, revision="v2")
    assert "is local and has no revisions; revision 'v2' is not looked for" in caplog.text
