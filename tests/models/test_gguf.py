"""GGUF files become models with the numbers that the file holds; what cannot be read is one sentence, said early."""

import copy
import os
import shutil
import struct
from collections import namedtuple
from importlib import util
from pathlib import Path

import pytest
import torch
import transformers

import fasttrace
from fasttrace.errors import ModelError
from fasttrace.models import cache, checkpoints, gguf
from fasttrace.models.gguf_header import read_header
from tests.helpers.gguf_files import TOKENIZER, write_gguf
from tests.helpers.zoo import tiny_model

PROMPT, SUBJECT = "The Space Need is in downtown", "Space Need"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The cache and a GGUF file of 8-bit weights, with the model that the file holds."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "model").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTTRACE_CACHE", str(folder / "cache"))
        yield folder / "model" / "tiny.gguf", write_gguf(folder / "model" / "tiny.gguf")


@pytest.fixture
def file(files):
    return files[0]


@pytest.fixture
def heavy(monkeypatch):
    """Nothing is converted, and the cache is not touched."""

    def forbidden(*_args, **_kwargs):
        pytest.fail("something heavy began")

    monkeypatch.setattr(gguf, "_save_unpacked", forbidden)
    monkeypatch.setattr(gguf, "sha256", forbidden)


def load(name, **options):
    return fasttrace.Tracer.from_pretrained(name, device="cpu", **options)


def test_a_gguf_file_has_the_weights_of_its_model(files):
    path, model = files
    found = load(path).model.state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in model.state_dict().items())


def test_a_gguf_file_is_traced_as_the_same_weights_in_safetensors(files, tmp_path):
    path, model = files
    model.save_pretrained(tmp_path / "same")
    TOKENIZER.save_pretrained(tmp_path / "same")
    kept, same = (load(name).trace(PROMPT, subject=SUBJECT, samples=2) for name in (path, tmp_path / "same"))
    assert kept.token_ids == same.token_ids
    for stream in same.streams:
        assert abs(kept.grid(stream) - same.grid(stream)).max() < 1e-6


def test_a_result_names_the_file_and_its_quantization_and_no_path(file):
    tracer = load(file)
    metadata = tracer.trace(PROMPT, subject=SUBJECT, samples=1).metadata
    assert (tracer.name, metadata["model"]) == ("tiny.gguf", "tiny.gguf")
    assert metadata["quantization"] == "Q8_0 weights, computed in float32"
    assert str(file.parent) not in str(metadata)


def test_another_dtype_is_named_beside_the_quantization(file):
    metadata = load(file, dtype="bfloat16").trace(PROMPT, subject=SUBJECT, samples=1).metadata
    assert metadata["quantization"] == "Q8_0 weights, computed in bfloat16"


def test_a_model_is_the_same_whether_it_comes_from_gguf_or_from_safetensors(file, tmp_path):
    tracer = load(file)
    tracer.model.save_pretrained(tmp_path / "same")
    tracer.tokenizer.save_pretrained(tmp_path / "same")
    assert load(tmp_path / "same").identity() == tracer.identity()


def test_a_file_without_a_name_for_its_quantization_is_named_by_most_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "plain.gguf", "F32")
    metadata = load(tmp_path / "plain.gguf").trace(PROMPT, subject=SUBJECT, samples=1).metadata
    assert metadata["quantization"] == "F32 weights, computed in float32"


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_with_one_gguf_file_is_that_file(file, relative, monkeypatch):
    monkeypatch.chdir(file.parent.parent)
    tracer = load(file.parent.name if relative else file.parent)
    assert torch.equal(next(tracer.model.parameters()), next(load(file).model.parameters()))


@pytest.mark.parametrize("name", ["owner/name/tiny.gguf", "owner/name/folder/tiny.gguf"])
def test_a_file_of_the_hub_is_fetched_in_its_revision(file, monkeypatch, name):
    asked = []

    def cached_file(repository, path, revision=None, **_):
        asked.append((repository, path, revision))
        return str(file)

    monkeypatch.setattr(fasttrace.models.loading, "cached_file", cached_file)
    tracer = load(name, revision="v2")
    assert (tracer.name, tracer.revision) == (name, "v2")
    assert ("owner/name", name.removeprefix("owner/name/"), "v2") in asked


def test_a_file_is_converted_once_wherever_it_lies(file, tmp_path, monkeypatch):
    load(file)
    shutil.copy(file, tmp_path / "other.gguf")
    monkeypatch.setattr(gguf, "_save_unpacked", lambda *_: pytest.fail("converted again"))
    assert load(tmp_path / "other.gguf").name == "other.gguf"
    assert len(list(cache.cache_folder().iterdir())) == 1


def test_conversion_is_announced_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "new.gguf")
    for _ in range(2):
        load(tmp_path / "new.gguf")
    said = [record.getMessage() for record in caplog.records if "unpacking" in record.getMessage()]
    assert len(said) == 1
    assert "new.gguf (Q8_0) to float32 safetensors in the cache, once" in said[0]


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_begins_as_the_file_says(tmp_path, monkeypatch, bos):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "bos.gguf", bos=bos)
    tokens = load(tmp_path / "bos.gguf").tokenizer(PROMPT)["input_ids"]
    assert tokens == [0] * bos + TOKENIZER(PROMPT)["input_ids"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_tokenizer_of_another_mind_begins_as_the_file_says(asked):
    tokenizer = copy.deepcopy(TOKENIZER)
    gguf._set_bos(tokenizer, asked)
    plain = TOKENIZER(PROMPT)["input_ids"]
    assert tokenizer(PROMPT)["input_ids"] == [0] * asked + plain
    assert gguf._adds_bos(tokenizer) == asked


def test_a_file_without_tokens_is_traced_by_token_ids(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "bare.gguf", tokens=False, qwen2__vocab_size=len(TOKENIZER))
    tracer = load(tmp_path / "bare.gguf")
    assert tracer.tokenizer is None
    assert tracer.trace([5, 9, 13, 21], subject=(1, 3), samples=1).n_positions == 4


def test_a_folder_of_the_cache_that_was_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "x.gguf")
    load(tmp_path / "x.gguf")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"not as it was converted \(config.json\).*: delete that folder"):
        load(tmp_path / "x.gguf")


def test_nothing_is_kept_of_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "x.gguf")
    save = gguf._save_unpacked

    def meanwhile(path, *others):
        save(path, *others)
        with path.open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr(gguf, "_save_unpacked", meanwhile)
    with pytest.raises(ModelError, match=r"x.gguf changed while it was read: run again"):
        load(tmp_path / "x.gguf")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_header_tells_what_there_is(file):
    header = read_header(file, "tiny.gguf")
    assert header.architecture == "qwen2"
    assert header.values["tokenizer.ggml.tokens"] == len(TOKENIZER)
    assert header.values["qwen2.embedding_length"] == 32
    assert header.weights == sum(weight.numel() for weight in load(file).model.state_dict().values())


# What cannot be read: one sentence, before anything is converted.


def refused(path, words):
    with pytest.raises(ModelError, match=words) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(path).name in message


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "is empty: fetch it again"),
        (3, "is not a GGUF file: it begins with b'GGU'"),
        (20, "is damaged or cut short within its header: fetch it again"),
        (1000, "is damaged or cut short within its header: fetch it again"),
        (-1, r"is cut short: it has [\d,]+ bytes of [\d,]+; fetch it again"),
        (-40_000, r"is cut short: it has [\d,]+ bytes of [\d,]+; fetch it again"),
    ],
)
def test_a_file_that_is_cut_is_refused(file, tmp_path, heavy, keep, words):
    content = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:keep])
    refused(tmp_path / "cut.gguf", words)


def test_every_cut_of_a_header_is_refused(file, tmp_path):
    content, header = file.read_bytes(), read_header(file, "x")
    for length in range(4, header.start - 40, 97):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"cut short within its header"):
            read_header(tmp_path / "cut.gguf", "cut.gguf")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04 a zip", r"is not a GGUF file: it begins with b'PK\\x03\\x04', expected b'GGUF'"),
        (checkpoints.POINTER + b".github.com/spec/v1", "is a Git LFS pointer"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "it is GGUF of version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is GGUF of version 50331648, expected 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63), "cut short within its header"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "a value of the unknown kind 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "arrays of arrays"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "of the architecture ''"),
    ],
    ids=["zip", "pointer", "version 1", "big-endian", "huge", "kind", "arrays", "nothing"],
)
def test_what_is_no_gguf_file_is_refused(tmp_path, heavy, content, words):
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf", words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"general__architecture": "rwkv6"},
            r"of the architecture 'rwkv6', which transformers does not read from GGUF",
        ),
        ({"general__architecture": "tokenizer"}, r"of the architecture 'tokenizer'"),
        ({"general__architecture": "t5"}, "is an encoder-decoder model"),
        ({"general__type": "adapter"}, "holds a GGUF adapter, expected a model"),
        ({"split__count": 3}, "is one of 3 parts of a model: join them with llama-gguf-split --merge"),
        ({"qwen2__rope__scaling__type": "yarn"}, r"scales its rotary frequencies \(yarn\)"),
        ({"general__alignment": 0}, "its general.alignment is 0"),
    ],
)
def test_what_cannot_be_read_as_a_model_is_refused(tmp_path, heavy, values, words):
    write_gguf(tmp_path / "x.gguf", **values)
    refused(tmp_path / "x.gguf", words)


def with_type(path, number):
    """Gives the last tensor of a file another type."""
    content, header = path.read_bytes(), read_header(path, "x")
    name, _, kind, offset = header.tensors[-1]
    place = content.index(struct.pack("<IQ", kind, offset), content.index(name.encode()))
    return content[:place] + struct.pack("<I", number) + content[place + 4 :]


@pytest.mark.parametrize(("number", "named"), [(999, "999"), (15, "Q8_K"), (26, "I32")])
def test_a_type_that_cannot_be_unpacked_is_refused(file, tmp_path, heavy, number, named):
    (tmp_path / "x.gguf").write_bytes(with_type(file, number))
    refused(tmp_path / "x.gguf", f"has weights of the GGUF type {named}, which the package gguf cannot unpack")


def test_several_files_in_a_folder_are_named(file, tmp_path, heavy):
    for name in ("b.gguf", "a.gguf"):
        shutil.copy(file, tmp_path / name)
    refused(tmp_path, r"holds 2 GGUF files \(a.gguf, b.gguf\): give one of them, such as .*a.gguf")


def test_a_missing_package_is_named(file, heavy, monkeypatch):
    find = util.find_spec
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == "gguf" else find(name))
    refused(file, "is a GGUF file and needs the package gguf: pip install gguf")


def test_a_disk_without_space_is_told_before_conversion(file, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_save_unpacked", lambda *_: pytest.fail("converted"))
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 1000, 7_000_000))
    refused(file, r"needs 100 MB in .*cache, where 7 MB are free: free some space, or set FASTTRACE_CACHE")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_machine_without_memory_is_told_before_conversion(file, heavy, monkeypatch):
    monkeypatch.setattr(checkpoints, "memory", lambda: 1000)
    refused(file, "GiB in float32, and this machine has 0 GiB: give a smaller model")


def test_what_transformers_cannot_convert_is_one_sentence(file, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "cache"))

    def broken(*_args, **_kwargs):
        raise KeyError("blk.0")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", broken)
    refused(file, r"could not be converted \(KeyError: .*\): check that memory and disk have space")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["nowhere.gguf", "./owner/nowhere.gguf", "owner/nowhere.gguf"])
def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(name, r"there is no GGUF file .*nowhere.gguf; one of the Hub is given as owner/name/file.gguf")


def test_a_file_of_the_hub_that_cannot_be_fetched_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelError, match=r"owner/name/x.gguf is not .*cannot be fetched; check the name and the network"
    ):
        load("owner/name/x.gguf")


def test_weights_that_the_file_lacks_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTTRACE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "x.gguf")
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(content.replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_xx.weight"))
    refused(tmp_path / "x.gguf", r"the weights of .*x.gguf are not those of a Qwen2ForCausalLM: 1 is not in its files")


def test_a_folder_of_transformers_may_hold_gguf_files_too(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"anything")
    assert load(tmp_path).model.config.model_type == "llama"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO on this system")
def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match=r"x.gguf in .* is not a regular file"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"x.gguf"):
        load(Path(tmp_path / "x.gguf"))
