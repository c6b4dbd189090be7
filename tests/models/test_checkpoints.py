"""A model is loaded with all of its files' weights and no others, or one sentence says what is wrong with its files."""

import json
import math
import os
import pickle
import shutil
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fasttrace
from fasttrace.errors import FasttraceError, ModelError
from fasttrace.models.loading import load
from tests.helpers import zoo
from tests.helpers.run_facts import save_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny models with tokenizers, by family, and one in several files."""
    home = tmp_path_factory.mktemp("saved")
    zoo.tiny_model("llama").save_pretrained(home / "sharded", max_shard_size="30KB")
    return {"sharded": home / "sharded"} | {name: save_model(home / name, name) for name in ("gpt2", "llama")}


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of such a folder, changed."""

    def copy(change, family="gpt2"):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[family], folder)
        change(folder)
        return folder

    return copy


def weights(change):
    def rewrite(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return rewrite


def without(part):
    return weights(lambda found: {key: value for key, value in found.items() if part not in key})


def config(**changes):
    def rewrite(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return rewrite


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def more_weights(**found):
    return weights(lambda before: before | {name.replace("__", "."): value for name, value in found.items()})


def cut_index(folder):
    """Takes the last file's weights out of the index."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = max(index["weight_map"].values())
    index["weight_map"] = {key: value for key, value in index["weight_map"].items() if value != last}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", without(".h.1."), r"12 are not in its files \(transformer.h.1.attn.c_attn.bias, .*, and 9 more\)"),
        ("gpt2", without("h.0.attn.c_attn.bias"), r"1 is not in its files \(transformer.h.0.attn.c_attn.bias\)"),
        ("llama", without("embed_tokens"), r"1 is not in its files \(model.embed_tokens.weight\)"),
        ("llama", without("lm_head"), r"1 is not in its files \(lm_head.weight\)"),
        ("llama", both(without("lm_head"), without("embed_tokens"), config(tie_word_embeddings=True)), "2 are not in"),
        ("llama", weights(lambda found: {f"x.{key}": found[key] for key in found}), "39 are not in its .*39 are in"),
        ("llama", config(num_hidden_layers=6), "18 are not in its files"),
        ("llama", config(num_hidden_layers=2), r"18 are in its files without a place in the model \(model.layers.2"),
        ("gpt2", config(vocab_size=77), r"lm_head.weight: \[\d+, 32\], expected \[77, 32\]"),
        ("gpt2", more_weights(v_head__weight=torch.ones(1, 32)), r"1 is in its files .*\(v_head.weight\)\. They"),
        ("sharded", cut_index, r"1 is not in its files \(lm_head.weight\)"),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_files_are_named(copied, family, change, message):
    with pytest.raises(ModelError, match=rf"the weights of .* are not those of a \w+: .*{message}") as caught:
        load(copied(change, family))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [{"device_map": "auto"}, {"device_map": {"transformer": "disk", "lm_head": "cpu"}}])
def test_weights_that_are_missing_are_named_wherever_they_would_go(copied, place):
    with pytest.raises(ModelError, match="12 are not in its files"):
        load(copied(without(".h.1.")), **place)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", both(without("lm_head"), config(tie_word_embeddings=True))),
        ("llama", more_weights(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))),
        ("gpt2", more_weights(transformer__h__0__attn__bias=torch.ones(1, 1, 8, 8))),
        ("gpt2", more_weights(transformer__h__0__attn__masked_bias=torch.ones(()))),
        ("sharded", lambda folder: None),
    ],
)
def test_tied_heads_and_what_models_compute_anew_may_be_missing_or_left_over(copied, family, change):
    model, _ = load(copied(change, family))
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_nothing_is_logged_beside_the_error(copied, caplog):
    with pytest.raises(ModelError):
        load(copied(without(".h.1.")))
    assert "LOAD REPORT" not in caplog.text


PARTS = {"emu3", "mllama", "musicgen", "musicgen_melody"}
"""Types whose causal model is a part of another, and is not loaded alone."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*zoo.ALL, *zoo.VARIANTS} - {*zoo.UNBUILT}))
def test_what_a_family_saves_it_finds_again(tmp_path, name):
    model_type, settings = zoo.VARIANTS.get(name, (name, {}))
    zoo.tiny_model(model_type, **settings).save_pretrained(tmp_path)
    if name in PARTS:
        with pytest.raises(ModelError, match="is not a model with a causal language-model head"):
            load(tmp_path)
    else:
        load(tmp_path)


def truncated(name, size):
    return lambda folder: os.truncate(folder / name, size)


def pickled(content):
    def write(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return write


def in_place_of(name, make):
    def replace(folder):
        (folder / name).unlink()
        make(folder / name)

    return replace


def foreign_object(folder):
    found = load_file(folder / "model.safetensors") | {"x": folder}
    (folder / "model.safetensors").unlink()
    torch.save(found, folder / "pytorch_model.bin")


def second_shard(change):
    return lambda folder: change(folder / "model-00002-of-00006.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated("model.safetensors", 5000), "model.safetensors in .* is damaged or cut short .*: fetch it again"),
        (truncated("model.safetensors", 0), "model.safetensors in .* is empty: fetch it again"),
        (text("model.safetensors", LFS), "model.safetensors in .* is a Git LFS pointer .*: run git lfs pull there"),
        (pickled(pickle.dumps(print, 2)), r"pytorch_model.bin in .* holds more than weights \(.*\) and is not opened"),
        (pickled(pickle.dumps([1], 2)), "pytorch_model.bin in .* is damaged or cut short"),
        (pickled(b"junk" * 9), "pytorch_model.bin in .* is damaged or cut short"),
        (pickled(b""), "pytorch_model.bin in .* is empty"),
        (foreign_object, r"pytorch_model.bin in .* holds more than weights \(pathlib\._?.*PosixPath\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "Error no file named model.safetensors"),
        (in_place_of("model.safetensors", lambda path: path.with_name("a.gguf").touch()), "a.gguf: a GGUF file is"),
        (in_place_of("model.safetensors", lambda path: path.symlink_to("gone")), "cannot be read: No such file"),
        (in_place_of("model.safetensors", os.mkfifo), "model.safetensors in .* is not a regular file"),
        (in_place_of("config.json", os.mkfifo), "config.json in .* is not a regular file"),
        (in_place_of("config.json", os.mkdir), "config.json in .* cannot be read: Is a directory"),
        (in_place_of("config.json", lambda path: None), "is a folder without config.json: give the folder"),
        (text("config.json", ""), "config.json in .* is empty"),
        (text("config.json", "null"), "config.json in .* holds None, expected an object"),
        (text("config.json", "[]"), r"config.json in .* holds \[\], expected an object"),
        (text("config.json", "{"), r"config.json in .* is not JSON \(Expecting"),
        (text("config.json", "[" * 100_000), "config.json in .* is not JSON"),
        (text("config.json", LFS), "config.json in .* is a Git LFS pointer"),
        (text("config.json", "{}"), "cannot be loaded: Unrecognized model in"),
        (text("generation_config.json", "null"), "generation_config.json in .* holds None"),
        (text("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer"),
        (config(n_layer="4"), "cannot be loaded: "),
        (config(n_head=0), "cannot be loaded: "),
        (config(dtype="evil"), "cannot be loaded: "),
        (config(quantization_config=5), "cannot be loaded: "),
        (config(activation_function="none such"), "cannot be loaded: KeyError: 'none such'"),
        (config(n_embd=10**5), r"config.json of .* describes [\d,]+ weights, and its files have [\d,]+ bytes"),
        (config(vocab_size=10**6), "config.json of .* describes"),
        (config(n_layer=10**30), r"config.json of .* has n_layer = 1000000.*, expected at most 10,000: correct it"),
        (config(num_labels=10**9), "has num_labels = 1000000000, expected at most"),
        (config(n_head=math.inf), "has n_head = inf, expected at most"),
        (config(attn_implementation="some/kernel"), "asks for the kernel 'some/kernel', which is code: it"),
        (config(text_config={"_attn_implementation": "some/kernel"}), "asks for the kernel 'some/kernel'"),
    ],
)  # fmt: skip
def test_files_that_are_damaged_or_odd_are_one_sentence_that_names_them(copied, change, message):
    with pytest.raises(ModelError, match=message) as caught:
        fasttrace.Tracer.from_pretrained(copied(change))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (second_shard(os.remove), "index.json in .* names model-00002-of-00006.safetensors, which is not there"),
        (second_shard(lambda path: os.truncate(path, 100)), "model-00002-of-00006.safetensors in .* is damaged or cut"),
        (text("model.safetensors.index.json", "null"), "model.safetensors.index.json in .* holds None"),
        (
            text("model.safetensors.index.json", '{"metadata": {}, "weight_map": ["x"]}'),
            "has no weight_map from weights",
        ),
        (
            text("model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "../b"}}'),
            r"names \.\./b, which is",
        ),
    ],
)
def test_of_several_files_the_damaged_one_is_named(copied, change, message):
    with pytest.raises(ModelError, match=message):
        load(copied(change, "sharded"))


def test_the_original_reason_is_kept(copied):
    with pytest.raises(ModelError) as caught:
        load(copied(truncated("model.safetensors", (os.path.getsize(copied(lambda _: 0) / "model.safetensors") - 9))))
    assert type(caught.value.__cause__).__name__ == "SafetensorError"


def test_a_pickle_runs_nothing(copied, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(ModelError, match="holds more than weights"):
        load(copied(pickled(pickle.dumps(Evil(), 2))))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["", "null", "[]", "{", "{}", '{"version": "1.0", "truncated'])
def test_a_tokenizer_that_cannot_be_read_is_named_with_the_reason(copied, content, caplog):
    model, tokenizer = load(copied(text("tokenizer.json", content)))
    assert (model is None, tokenizer) == (False, None)
    assert "has no tokenizer that can be read (" in caplog.text
    assert "tokenizer.json" in caplog.text or "KeyError" in caplog.text


def test_outputs_as_tuples_make_no_difference(saved, copied):
    plain = fasttrace.Tracer.from_pretrained(saved["gpt2"]).trace([1, 2, 3], subject=(0, 1), samples=1)
    tuples = fasttrace.Tracer.from_pretrained(copied(config(return_dict=False)))
    assert tuples.trace([1, 2, 3], subject=(0, 1), samples=1).clean_prob == plain.clean_prob


def test_memory_that_is_not_there_is_asked_for_in_one_sentence(saved, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(ModelError, match=r"does not fit \(MemoryError\); device_map='auto' uses"):
        load(saved["gpt2"])


def test_a_model_larger_than_the_machine_is_refused_before_room_is_made(saved, monkeypatch):
    monkeypatch.setattr("fasttrace.models.checkpoints.memory", lambda: 10_000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=r"takes 0 GiB, and this machine has 0 GiB: take a smaller dtype, or device_m"):
        load(saved["gpt2"])


def test_a_panic_of_a_package_in_rust_is_an_error_of_the_file(saved, monkeypatch):
    panic = type("PanicException", (BaseException,), {})  # as pyo3 names it, which keeps the class to itself

    def panics(*_, **__):
        raise panic("index out of bounds")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", panics)
    with pytest.raises(ModelError, match="cannot be loaded: index out of bounds"):
        load(saved["gpt2"])


ODD = (None, "", "x", -1, 0, 1.5, 1e308, math.nan, True, [], {}, 10**30, [[[1]]], 10**9, "4", math.inf)
KEYS = (
    *("activation_function", "architectures", "attn_pdrop", "dtype", "layer_norm_epsilon", "model_type", "n_embd"),
    *(
        "n_head",
        "n_inner",
        "n_layer",
        "n_positions",
        "pad_token_id",
        "quantization_config",
        "return_dict",
        "rope_scaling",
    ),
    *("scale_attn_weights", "tie_word_embeddings", "vocab_size", "auto_map", "is_encoder_decoder", "text_config"),
    *("head_dim", "max_position_embeddings", "id2label", "attn_implementation", "transformers_version"),
)


def loads_or_says_why(folder, key, value):
    good = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(good | {key: value}))
    with suppress(FasttraceError):
        tracer = fasttrace.Tracer.from_pretrained(folder)
        tracer.trace([1, 2, 3], subject=(0, 1), samples=1, noise=1.0, streams=["mlp_output"])
    (folder / "config.json").write_text(json.dumps(good))


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "vocab_size", "model_type", "quantization_config", "head_dim"])
def test_odd_values_in_a_configuration_load_or_say_why(copied, key):
    folder = copied(lambda _: None)
    for value in ODD:
        loads_or_says_why(folder, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_odd_value_in_a_configuration_loads_or_says_why(copied, family, key):
    folder = copied(lambda _: None, family)
    for value in ODD:
        loads_or_says_why(folder, key, value)
