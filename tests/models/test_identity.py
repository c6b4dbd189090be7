"""What makes a model the same model: everything that is computed with, and nothing else."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers.models import BPE
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fasttrace
from fasttrace import StoreError
from fasttrace.cli import app as cli
from fasttrace.facts.dataset import read_facts
from fasttrace.models.identity import digests, identity_of, shown_name, tokenizer_digests, weights_digest
from fasttrace.runs.manifest import differences
from fasttrace.runs.run import run
from fasttrace.runs.store import Store
from tests.conftest import tiny_model
from tests.helpers.run_facts import FLAGS, OPTIONS, Launcher, facts_of, save_model, write_facts
from tests.helpers.tokenizers import Slow, byte_level, sentencepiece_like
from tests.helpers.zoo import INSTALLED

FACTS = read_facts(facts_of(3))
TRACE = ("The Space Needle is in", "--subject", "The Space Needle", "--samples", 1, "--noise", 1.0, "--device", "cpu")


def fasttrace_command(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a model, not to be changed."""
    return save_model(tmp_path_factory.mktemp("identity") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def loaded(name, **options):
    return fasttrace.Tracer.from_pretrained(str(name), **options or {"device": "cpu"})


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def found(there, here):
    """What differs, by name."""
    return [difference.split(" ")[0] for difference in differences(there, here)]


# The same model.


def moved(folder, tmp_path):
    return folder.rename(tmp_path / "elsewhere")


def linked(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    return tmp_path / "link"


def cut_otherwise(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    for path in folder.glob("tok*"):
        shutil.copy(path, tmp_path / "cut")
    return tmp_path / "cut"


@pytest.mark.parametrize(
    "other",
    [
        moved,
        linked,
        cut_otherwise,
        lambda folder, _: f"{folder}/",
        lambda folder, _: os.path.relpath(folder),
    ],
    ids=["moved", "link", "shards", "slash", "relative"],
)
def test_where_and_how_a_model_is_stored_makes_no_difference(saved, folder, tmp_path, other):
    assert loaded(other(folder, tmp_path)).identity() == loaded(saved).identity()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_weights_out_of_memory_are_those_in_memory(tmp_path, tied, place):
    if INSTALLED < (5, 17) and (tied or place == "disk"):
        pytest.skip("this transformers cannot compute with such a model")
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    blocks = {f"model.layers.{number}": "disk" for number in range(4)}
    rest = "disk" if tied else place
    places = {"model.embed_tokens": rest, "model.norm": place, "model.rotary_emb": place, "lm_head": rest, **blocks}
    tracer = loaded(tmp_path / "model", device_map=places)
    assert any(parameter.is_meta for parameter in tracer.model.parameters())
    assert tracer.identity() == identity_of(fasttrace.Tracer(model))
    tracer.trace([1, 2, 3, 4], subject=(0, 2), samples=1)
    assert tracer.identity() == identity_of(fasttrace.Tracer(model))


def test_weights_that_accelerate_keeps_in_main_memory_are_read_there():
    from accelerate import cpu_offload

    expected = weights_digest(tiny_model("gpt2"))
    assert weights_digest(cpu_offload(tiny_model("gpt2"), torch.device("cpu"))) == expected


def test_weights_that_are_nowhere_are_an_error():
    with pytest.raises(fasttrace.ModelError, match=r"the weight transformer\.wte\.weight is not in memory"):
        weights_digest(tiny_model("gpt2").to("meta"))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"_name_or_path": "/home/somebody/model", "transformers_version": "5.0.0"}),
        ("config.json", {"torch_dtype": "float32"}),
        ("config.json", {"attn_pdrop": 0.3, "initializer_range": 1.0, "use_cache": False, "id2label": {"0": "yes"}}),
        ("generation_config.json", {"temperature": 0.5, "do_sample": True}),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}", "model_max_length": 7}),
    ],
    ids=["names", "dtype", "training", "generation", "template"],
)
def test_what_no_forward_pass_depends_on_is_left_out(saved, folder, file, changes):
    edit(folder / file, **changes)
    assert loaded(folder).identity() == loaded(saved).identity()


def test_a_trace_changes_nothing_and_an_attention_implementation_is_only_a_way_to_compute(saved):
    tracer = loaded(saved)
    identity = tracer.identity()
    tracer.trace("The Space Needle is in", subject="The Space Needle", samples=1)
    tracer.tokenizer(["a", "The Space Needle"], padding=False, truncation=True, max_length=3)
    assert tracer.identity() == identity
    tracer.model.set_attn_implementation("eager")
    assert tracer.identity() == identity


def test_only_where_soft_caps_may_be_left_out_the_attention_implementation_counts():
    counted = {}
    for family in ("gemma2", "llama"):
        tracer = fasttrace.Tracer(tiny_model(family))
        for name in ("eager", "sdpa", "my_own"):
            tracer.model.config._attn_implementation_internal = name
            counted[family, name] = tracer.identity()["attention"]
    capped, plain = ({name: counted[family, name] for name in ("eager", "sdpa")} for family in ("gemma2", "llama"))
    assert (capped, plain) == ({"eager": None, "sdpa": "sdpa"}, {"eager": None, "sdpa": None})
    assert counted["llama", "my_own"] == "my_own"


# Another model.


def test_every_element_of_every_weight_counts_however_it_was_edited():
    model = tiny_model("gpt2", vocab_size=256)
    expected = weights_digest(model)
    assert expected == weights_digest(tiny_model("gpt2", vocab_size=256)) != weights_digest(tiny_model("llama"))
    for parameter in model.parameters():
        for at in (0, len(parameter.reshape(-1)) // 2 + 1, -1):
            flat = parameter.data.reshape(-1)
            kept = flat[at].item()
            flat[at] += 1e-3
            assert weights_digest(model) != expected
            flat[at] = kept
    assert weights_digest(model) == expected
    numbers = model.lm_head.weight.detach().numpy()
    numbers[[1, 2]] = numbers[[2, 1]]  # behind torch's back, and the same values in another order
    assert weights_digest(model) != expected


def test_types_shapes_and_names_of_weights_count():
    layers = [nn.Linear(4, 2, bias=False) for _ in range(2)]
    nn.init.zeros_(layers[0].weight)
    nn.init.zeros_(layers[1].weight)
    same = weights_digest(layers[0])
    assert weights_digest(layers[1]) == same
    assert weights_digest(layers[1].to(torch.bfloat16)) != weights_digest(layers[1].to(torch.float16)) != same
    flat = nn.Linear(2, 4, bias=False)
    nn.init.zeros_(flat.weight)
    assert weights_digest(flat) != same
    assert weights_digest(nn.Sequential(layers[0])) != same


def test_persistent_buffers_count_and_others_do_not():
    module = nn.Linear(2, 2)
    expected = weights_digest(module)
    module.register_buffer("cache", torch.ones(3), persistent=False)
    assert weights_digest(module) == expected
    module.register_buffer("packed", torch.ones(3, dtype=torch.int32))
    packed = weights_digest(module)
    module.packed[2] = 5
    assert len({expected, packed, weights_digest(module)}) == 3


@pytest.mark.filterwarnings("ignore")
def test_the_packed_weights_of_a_quantized_model_count():
    quantization = pytest.importorskip("torch.ao.quantization")

    def quantized(scale):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[3, 3] *= scale
        return quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)

    assert weights_digest(quantized(1)) == weights_digest(quantized(1)) != weights_digest(quantized(-1))


@pytest.mark.parametrize(
    "change",
    [
        {"layer_norm_epsilon": 0.5},
        {"activation_function": "relu"},
        {"n_head": 2},
        {"scale_attn_by_inverse_layer_idx": True},
        {"attn_scale_of_a_later_version": 2.0},
    ],
)
def test_every_other_entry_of_a_configuration_counts_and_is_named(saved, folder, change):
    edit(folder / "config.json", **change)
    assert f"config.{next(iter(change))}" in found(loaded(saved).identity(), loaded(folder).identity())


def test_nested_entries_of_a_configuration_count():
    ropes = [{"rope_type": "default", "rope_theta": theta} for theta in (1e4, 1e5)]
    first, second = (fasttrace.Tracer(tiny_model("llama", rope_parameters=rope)).identity() for rope in ropes)
    assert found(first, second) == ["config.rope_parameters.rope_theta"]


@pytest.mark.parametrize(
    ("change", "entry"),
    [
        (lambda model: setattr(model.transformer.h[2].ln_1, "eps", 0.5), "module_settings"),
        (lambda model: setattr(model.transformer.h[2].mlp, "act", nn.ReLU()), "module_settings"),
        (lambda model: model.transformer.h[2].mlp.register_forward_hook(halved), "hooks"),
        (lambda model: setattr(model.transformer.h[2].mlp, "forward", halved), "hooks"),
        (lambda model: setattr(model.config, "layer_norm_epsilon", 0.5), "config.layer_norm_epsilon"),
    ],
)
def test_what_is_changed_in_memory_beside_weights_counts(saved, change, entry):
    tracer = loaded(saved)
    before = tracer.identity()
    change(tracer.model)
    assert found(before, tracer.identity()) == [entry]


def halved(*_):
    """A hook, by name."""


def test_modules_that_are_named_otherwise_and_autocast_count(saved):
    tracer = loaded(saved)
    named = fasttrace.Tracer(tracer.model, tracer.tokenizer, modules={"attention": "ln_1"})
    assert found(tracer.identity(), named.identity()) == ["modules.attention"]
    with torch.autocast("cpu", torch.bfloat16):
        assert tracer.identity()["autocast"] == "bfloat16"
    assert tracer.identity()["autocast"] is None


def test_adapters_count_by_what_they_do():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    base = weights_digest(tiny_model("gpt2"))
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("gpt2"), config)
    model.add_adapter("second", config)
    tracer = fasttrace.Tracer(model.eval())
    seen = [base, tracer.identity()]
    model.set_adapter("second")
    seen.append(tracer.identity())
    model.base_model.model.transformer.h[0].attn.c_attn.scaling["second"] *= 2
    seen.append(tracer.identity())
    with model.disable_adapter():
        seen.append(tracer.identity())
    model.merge_adapter(["default"])
    seen.append(tracer.identity())
    seen.append(fasttrace.Tracer(model.merge_and_unload()).identity())
    assert len({json.dumps(each, sort_keys=True) for each in seen}) == len(seen)
    assert tracer.identity()["weights"] != base


def test_code_that_comes_with_a_model_counts(folder):
    code = "from transformers import GPT2LMHeadModel\nclass Mine(GPT2LMHeadModel):\n    factor = 1\n"
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    seen = []
    for text in (code, code, code.replace("1", "2")):
        (folder / "modeling_mine.py").write_text(text)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == "Mine"
        seen.append(fasttrace.Tracer(model).identity())
    assert seen[0] == seen[1]
    assert found(seen[0], seen[2]) == ["code"]
    assert loaded(folder.parent / shutil.copytree(folder, folder.parent / "copy")).identity()["code"] is None


# Tokenizers.

TOKENIZERS = {
    "bytes": byte_level,
    "bytes with BOS": lambda: byte_level(bos=True),
    "bytes with EOS": lambda: byte_level(eos=True),
    "other merges": lambda: byte_level(words=["The", " Space"]),
    "pieces": sentencepiece_like,
    "pieces, always a space": lambda: sentencepiece_like(prepend_scheme="always"),
    "pieces, no BOS": lambda: sentencepiece_like(bos=False),
    "unigram": lambda: sentencepiece_like(unigram=True),
    "slow": Slow,
    "slow, small letters": lambda: Slow(lower=True),
    "slow, pieces": lambda: Slow(metaspace=True),
}


def test_tokenizers_count_by_what_they_do():
    seen = {name: tokenizer_digests(make()) for name, make in TOKENIZERS.items()}
    assert len({json.dumps(each) for each in seen.values()}) == len(seen)
    assert seen == {name: tokenizer_digests(make()) for name, make in TOKENIZERS.items()}
    assert tokenizer_digests(None) is None


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "slow" not in name])
def test_a_tokenizer_that_was_saved_and_loaded_is_the_same_until_it_puts_something_in_front(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    before = tokenizer_digests(tokenizer)
    for _ in range(2):
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer_digests(tokenizer) == before
    tokenizer.add_bos_token = not tokenizer.add_bos_token
    assert tokenizer_digests(tokenizer) != before


@pytest.mark.parametrize("name", ["bytes", "slow"])
def test_an_added_token_counts(name):
    tokenizer = TOKENIZERS[name]()
    seen = [tokenizer_digests(tokenizer)]
    tokenizer.add_tokens(["Seattle's"])
    seen.append(tokenizer_digests(tokenizer))
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    seen.append(tokenizer_digests(tokenizer))
    assert len({each["vocabulary"] for each in seen}) == 3


def test_merges_count_where_the_vocabulary_is_the_same():
    tokenizers = [byte_level(), byte_level()]
    model = json.loads(tokenizers[1].backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in reversed(model["merges"])]
    tokenizers[1].backend_tokenizer.model = BPE(model["vocab"], merges)
    assert "rules" in found(*map(tokenizer_digests, tokenizers))


def test_padding_truncation_and_chat_templates_of_a_tokenizer_do_not_count():
    tokenizer = byte_level()
    before = tokenizer_digests(tokenizer)
    tokenizer.pad_token = "<s>"
    before_padding, tokenizer.chat_template = tokenizer_digests(tokenizer), "{{ messages }}"
    tokenizer(["a", "The Space"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digests(tokenizer) == before_padding != before


# What is made of it: folders, results, names.


@pytest.mark.slow
def test_a_traces_folder_takes_the_same_model_from_elsewhere_and_no_edited_one(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    request = ("trace", *TRACE, "--out", out)
    assert fasttrace_command(*request, "--model", folder).exit_code == 0
    metadata = fasttrace.load(out / "trace.parquet").metadata
    assert metadata["identity"] == digests(loaded(folder).identity())
    elsewhere = moved(folder, tmp_path)
    assert fasttrace_command(*request, "--model", elsewhere).exit_code == 0
    edit(elsewhere / "config.json", layer_norm_epsilon=0.5)
    monkeypatch.setattr(fasttrace.Tracer, "trace", lambda *_, **__: pytest.fail("it was traced"))
    done = fasttrace_command(*request, "--model", elsewhere)
    assert done.exit_code == 2
    assert "holds another run (config '" in done.stderr
    result = fasttrace.load(out / "trace.parquet")
    unknown = {name: value for name, value in result.metadata.items() if name != "identity"}
    dataclasses.replace(result, metadata=unknown).save(out / "trace.parquet")
    done = fasttrace_command(*request, "--model", elsewhere)
    assert "holds a run that does not say on which weights it was made" in done.stderr


@pytest.mark.slow
def test_no_path_of_a_model_is_in_any_file(folder, tmp_path):
    secret = Path(shutil.copytree(folder, tmp_path / "alice_secret" / "her model"))
    tracer = loaded(secret)
    assert tracer.name == "her model"
    run(tracer, FACTS, tmp_path / "run", **OPTIONS)
    assert fasttrace_command("trace", *TRACE, "--model", secret, "--out", tmp_path / "trace").exit_code == 0
    assert fasttrace_command("report", tmp_path / "run").exit_code == 0
    files = [path for out in ("run", "trace") for path in (tmp_path / out).rglob("*") if path.is_file()]
    assert {"report.html", "manifest.json", "trace.parquet"} < {path.name for path in files}
    assert not [path for path in files if b"alice_secret" in path.read_bytes()]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "her model" in page


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("gpt2-xl", "gpt2-xl"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("/home/alice/models/mine/", "mine"),
        ("/home/alice/.cache/hub/models--org--a-model/snapshots/0123abc", "org/a-model"),
        ("/", "model"),
    ],
)
def test_a_name_is_an_id_or_the_last_name_of_a_folder(name, shown):
    assert shown_name(name) == shown


def test_a_folder_by_a_relative_path_has_its_own_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert (shown_name("."), shown_name("../model/")) == ("model", "model")
    assert loaded(".").name == "model"


def test_paths_in_a_configuration_are_cut_to_their_last_name(folder):
    edit(folder / "config.json", quantized_on={"data": "/home/alice/texts"})
    assert loaded(folder).identity()["config"]["quantized_on"] == {"data": "texts"}


def test_a_name_that_is_given_stays_unless_it_is_a_path(saved):
    model = loaded(saved).model
    names = ("mine/first", str(saved), None)
    assert [fasttrace.Tracer(model, name=name).name for name in names] == ["mine/first", "model", "model"]


# Stores.


@pytest.mark.parametrize("changed", ["weights", "config", "tokenizer"])
def test_a_run_on_an_edited_model_is_refused_and_the_right_one_goes_on(saved, folder, tmp_path, changed):
    run(loaded(saved), FACTS, tmp_path / "run", **OPTIONS)
    if changed == "config":
        edit(folder / "config.json", n_head=2)
    elif changed == "tokenizer":
        byte_level(bos=True).save_pretrained(folder)
    tracer = loaded(folder)
    if changed == "weights":
        tracer.model.transformer.h[3].mlp.c_proj.weight.data[5, 7] = 0.0
    with pytest.raises(StoreError, match=rf"holds another run \({changed}"):
        run(tracer, read_facts(facts_of(5)), tmp_path / "run", **OPTIONS)
    assert run(loaded(saved), read_facts(facts_of(5)), tmp_path / "run", **OPTIONS).before == 3


FINGERPRINT = {
    "weights": "a",
    "tokenizer": {"vocabulary": "v", "rules": "r"},
    "config": {"n_layer": 4, "rope": {"theta": 1.0}},
    "module_settings": "b",
    "versions": {"torch": "2.7", "transformers": "5.1"},
}


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"config": {"n_layer": 4, "rope": {"theta": 1.0}, "added": None}, "module_settings": "c"}, None),
        ({"config": {"n_layer": 4, "rope": {"theta": 1.0, "kind": "default"}}}, None),
        ({"config": {"n_layer": 4}}, None),
        ({"tokenizer": {"vocabulary": "v", "rules": "s"}}, None),
        ({"tokenizer": {"vocabulary": "w", "rules": "r"}}, "tokenizer.vocabulary 'v' there, 'w' here"),
        ({"config": {"n_layer": 4, "rope": {"theta": 2.0}}}, "config.rope.theta 1.0 there, 2.0 here"),
        ({"weights": "c"}, "weights 'a' there, 'c' here"),
    ],
)
def test_another_version_of_transformers_may_write_more_or_less_but_nothing_else(tmp_path, change, refused):
    Store.open(tmp_path, FINGERPRINT)
    newer = {"versions": {"torch": "2.7", "transformers": "5.2"}}
    with pytest.raises(StoreError, match=refused) if refused else contextlib.nullcontext():
        Store.open(tmp_path, FINGERPRINT | newer | change)
    with pytest.raises(StoreError, match="holds another run"):
        Store.open(tmp_path, FINGERPRINT | change)


# Processes.


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with Launcher(tmp_path_factory.mktemp("launcher")) as made:
        yield made


def started(launcher, tmp_path, model, facts):
    return launcher.run("run", "--model", model, "--facts", facts, "--out", tmp_path / "run", *FLAGS)


@pytest.mark.slow
def test_processes_with_different_facts_all_refuse_and_name_the_first(saved, tmp_path, launcher):
    write_facts(tmp_path / "facts0.jsonl", facts_of(9))
    text = (tmp_path / "facts0.jsonl").read_text()
    (tmp_path / "facts1.jsonl").write_text(text.replace("The Needle is in downtown", "The Needle in downtown"))
    codes, said = started(launcher, tmp_path, saved, tmp_path / "facts{rank}.jsonl")
    assert codes[0] == 2
    expected = "prompt 'The Needle is in downtown' in process 0, 'The Needle in downtown' in process 1"
    assert f"process 1 has other facts than process 0 (fact '1': {expected}): give all processes" in said
    assert not (tmp_path / "run").exists()
    (tmp_path / "facts1.jsonl").write_text("".join(text.splitlines(keepends=True)[:8]))
    codes, said = started(launcher, tmp_path, saved, tmp_path / "facts{rank}.jsonl")
    assert "(fact '8' in process 0, None in process 1)" in said


@pytest.mark.slow
def test_a_trial_goes_on_with_more_facts_in_two_processes_with_its_noise(saved, tmp_path, launcher):
    facts = write_facts(tmp_path / "facts.jsonl", facts_of(6))
    request = ("run", "--model", saved, "--facts", facts, "--out", tmp_path / "run", "--samples", 1, "--window", 3)
    assert launcher.run(*request, "--limit", 2)[0] == [0, 0]
    codes, said = launcher.run(*request)
    assert codes == [0, 0], said
    assert "note: noise" not in said
    write_facts(facts, facts_of(9))
    codes, said = launcher.run(*request)
    assert codes == [0, 0], said
    assert said.count("note: noise: the folder's sigma ") == 1
    sigmas = {record.result.metadata["sigma"] for record in Store.read(tmp_path / "run").records()}
    assert len(sigmas) == 1


@pytest.mark.slow
def test_processes_with_different_models_all_refuse_and_say_in_what(saved, tmp_path, launcher):
    facts = write_facts(tmp_path / "facts.jsonl", facts_of(3))
    for rank in (0, 1):
        shutil.copytree(saved, tmp_path / f"model{rank}")
    edit(tmp_path / "model1" / "config.json", layer_norm_epsilon=0.5)
    codes, said = started(launcher, tmp_path, tmp_path / "model{rank}", facts)
    assert codes[0] == 2
    assert "config.layer_norm_epsilon 1e-05 in process 0, 0.5 in process 1" in said
    assert not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path / "model1")
    shutil.copytree(saved, tmp_path / "model1")
    codes, said = started(launcher, tmp_path, tmp_path / "model{rank}", facts)
    assert codes == [0, 0], said
