"""Parts are found by rule or by path; what cannot be traced is refused with a sentence that says what to do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import fasttrace
from fasttrace.engines import ENGINES
from fasttrace.engines import self_check as select
from fasttrace.engines.job import Job
from fasttrace.errors import EngineError, ModelError
from fasttrace.experiment.cells import Edit
from fasttrace.experiment.corruption import draw
from fasttrace.models.anatomy import anatomy_of, module_paths
from tests.helpers import zoo

BERT = {"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 2, "vocab_size": 9, "intermediate_size": 8}

PATHS = {
    "gpt2": ("transformer.h", "attn", "mlp", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "self_attn", "fc2", "fc2"),
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    "mpt": ("transformer.blocks", "attn", "ffn.down_proj", "ffn.down_proj"),
    "llama": ("model.layers", "self_attn", "mlp", "mlp.down_proj"),
    "phi": ("model.layers", "self_attn", "mlp", "mlp.fc2"),
}


@pytest.mark.parametrize("name", PATHS)
def test_parts_are_found_by_name_and_never_one_that_holds_the_residual_stream(name):
    paths = module_paths(anatomy_of(zoo.tiny_model(name)))
    blocks, *parts = PATHS[name]
    assert paths["blocks"] == blocks
    assert [paths[what] for what in ("attention", "mlp", "down")] == [f"{blocks}.0.{part}" for part in parts]


def test_the_paths_of_a_user_win():
    model = zoo.tiny_model("llama")
    modules = {"blocks": "model.layers", "attention": "self_attn.o_proj", "mlp": "mlp.down_proj", "down": "mlp.up_proj"}
    found = module_paths(anatomy_of(model, modules))
    assert found["attention"] == "model.layers.0.self_attn.o_proj"
    assert found["down"] == "model.layers.0.mlp.up_proj"


def rename(model):
    """Gives the parts of every block names that nobody has thought of."""
    for block in model.model.layers:
        block.talker, block.thinker = block._modules.pop("self_attn"), block._modules.pop("mlp")
        vars(block)["self_attn"], vars(block)["mlp"] = block.talker, block.thinker
    return model


def test_names_that_no_rule_knows_are_given_by_the_user():
    tracer = fasttrace.Tracer(rename(zoo.tiny_model("llama")))
    assert tracer.streams == ("block_output",)
    with pytest.raises(ModelError, match=r"block 0 of LlamaForCausalLM has no attention_output; it has block_output"):
        tracer.trace([1, 2, 3], subject=(0, 1), streams=["attention_output"])
    named = fasttrace.Tracer(rename(zoo.tiny_model("llama")), modules={"attention": "talker", "mlp": "thinker"})
    plain = fasttrace.Tracer(zoo.tiny_model("llama"))
    options = {"subject": (0, 1), "samples": 2, "window": 3}
    given, wanted = named.trace([1, 2, 3, 4], **options), plain.trace([1, 2, 3, 4], **options)
    assert given.metadata["engine"] == "wavefront"
    for stream in fasttrace.STREAMS:
        assert given.grid(stream) == pytest.approx(wanted.grid(stream), rel=1e-5)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"attention": "attn"},
            r"modules\['attention'\] is 'attn', and LlamaDecoderLayer has no such module; it has self_",
        ),
        ({"mlp": "mlp.fc3"}, r"modules\['mlp'\] is 'mlp.fc3'"),
        (
            {"blocks": "model.h"},
            r"modules\['blocks'\] is 'model.h', and LlamaForCausalLM has no such module; it has mo",
        ),
        (
            {"blocks": "model.norm"},
            r"modules\['blocks'\] is 'model.norm', a LlamaRMSNorm; it must be the list of blocks",
        ),
        ({"embedding": "wte"}, r"modules\['embedding'\] is 'wte'"),
        ({"attn": "self_attn"}, r"modules has 'attn'; its keys are embedding, blocks, attention, mlp, down"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_that_shows_what_is_there(modules, message):
    with pytest.raises(ModelError, match=message):
        fasttrace.Tracer(zoo.tiny_model("llama"), modules=modules)


def test_blocks_that_no_rule_finds_are_asked_for():
    model = zoo.tiny_model("llama")
    model.config.num_hidden_layers = 9
    with pytest.raises(ModelError, match=r"no list of 9 blocks in LlamaForCausalLM; .* modules=\{'blocks': "):
        fasttrace.Tracer(model)
    assert fasttrace.Tracer(model, modules={"blocks": "model.layers"}).streams == fasttrace.STREAMS


def test_a_mixture_of_experts_is_restored_at_its_output():
    tracer = fasttrace.Tracer(zoo.tiny_model("mixtral"))
    assert tracer.streams == ("block_output", "mlp_output", "attention_output")
    with pytest.raises(ModelError, match=r"has no mlp_activation; it has block_output, mlp_output, attention_output"):
        tracer.trace([1, 2, 3], subject=(0, 1), streams=["mlp_activation"])


def test_a_recurrent_model_has_its_mixer_for_attention_and_no_mlp():
    result = fasttrace.Tracer(zoo.tiny_model("mamba")).trace([1, 2, 3, 4], subject=(0, 2), samples=1)
    assert result.streams == ("block_output", "attention_output")
    assert result.metadata["engine"] == "rows"
    assert "0 of 4 blocks attended through the pack" in result.metadata["engine_reason"]


def test_restoring_the_mlp_activation_restores_the_mlp_output():
    """On a gated MLP the activation is the input of the down projection, gate and up together."""
    tracer = fasttrace.Tracer(zoo.tiny_model("llama"))
    streams = ["mlp_activation", "mlp_output"]
    result = tracer.trace([5, 6, 7, 8], subject=(0, 2), samples=2, window=2, streams=streams, engine="reference")
    assert result.grid("mlp_activation") == pytest.approx(result.grid("mlp_output"), rel=1e-5)


def built(model_class, config_class, **settings):
    return model_class(config_class(**settings))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: built(GPT2Model, GPT2Config, n_layer=1, n_embd=12, vocab_size=9), "has no language-model head; load"),
        (
            lambda: built(T5ForConditionalGeneration, T5Config, num_layers=1, d_model=8, vocab_size=9, num_heads=2),
            "T5ForConditionalGeneration is an encoder-decoder model; causal tracing needs a decoder-only one",
        ),
        (
            lambda: built(BertForMaskedLM, BertConfig, **BERT),
            "BertForMaskedLM fills in masked words; causal tracing needs",
        ),
        (lambda: built(RobertaForMaskedLM, RobertaConfig, **BERT), "RobertaForMaskedLM fills in masked words"),
        (
            lambda: built(
                ViTForImageClassification, ViTConfig, num_hidden_layers=1, hidden_size=12, num_attention_heads=2
            ),
            "ViTForImageClassification has no language-model head; load it with AutoModelForCausalLM",
        ),
        (lambda: nn.Linear(2, 2), "Linear is not a Hugging Face model; load one with AutoModelForCausalLM"),
    ],
)
def test_models_that_cannot_be_traced_are_refused(model, message):
    with pytest.raises(ModelError, match=message):
        fasttrace.Tracer(model())


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        empty = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=12, vocab_size=9))
    with pytest.raises(ModelError, match=r"no weights \(meta device\); load it with from_pretrained, or call to_empty"):
        fasttrace.Tracer(empty)


def test_a_model_that_reads_in_both_directions_passes_no_self_check():
    model = zoo.tiny_model("bert", is_decoder=False)
    with pytest.raises(EngineError, match=r"does not read from left to right, .* moves log p by .* \(allowed 1e-03\)"):
        select.choose(anatomy_of(model))


def test_a_model_that_gives_other_numbers_every_time_gets_no_engine():
    model = zoo.tiny_model("llama")
    handle = model.model.layers[1].register_forward_hook(lambda _m, _a, output: output * (1 + torch.rand(1)))
    anatomy = anatomy_of(model)
    with pytest.raises(EngineError, match=r"or not twice the same: .* moves log p by"):
        select.choose(anatomy)
    handle.remove()
    assert select.choose(anatomy_of(model)).name == "wavefront"


def test_a_trunk_that_moves_positions_is_refused():
    model = zoo.tiny_model("llama")
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda _m, _a, output: torch.cat((output[:, :1], output), dim=1))
    with pytest.raises(ModelError, match=r"gets hidden states of shape \[2, 6, 32\] for 2 prompts of 5 tokens"):
        fasttrace.Tracer(model)


def test_a_model_with_several_embeddings_is_refused():
    model = zoo.tiny_model("llama")
    model.get_input_embeddings = lambda: nn.ModuleList([model.model.embed_tokens])
    with pytest.raises(ModelError, match="LlamaForCausalLM has no single input embedding to add noise to"):
        fasttrace.Tracer(model)


def test_a_block_that_is_left_out_is_named():
    model = zoo.tiny_model("llama")
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states  # its parts are never called
    with pytest.raises(
        EngineError, match=r"EngineError: the \w+ of block 1 is never computed .* look at Tracer\(modules"
    ):
        select.choose(anatomy_of(model))


@pytest.mark.parametrize("name", ["llama4_text", "minimax_m3_vl_text"])
def test_families_that_count_places_in_the_pack_do_not_get_the_wavefront(name):
    """On a pack as short as the self-check's they would pass."""
    model = zoo.tiny_model(name, **({"floor_scale": 8192} if name == "llama4_text" else {}))
    choice = select.choose(anatomy_of(model))
    assert choice.name in ("fork", "rows")
    assert f"wavefront is not for {name}: its attention" in choice.reason


@pytest.mark.parametrize("name", ["zamba", "rwkv", "inkling_text"])
def test_blocks_that_mix_tokens_after_their_attention_are_traced_to_the_last(name):
    anatomy = anatomy_of(zoo.tiny_model(name))
    assert select.choose(anatomy).name == "rows"
    last = anatomy.n_layers - 1
    cells = tuple((Edit(stream, last, 5),) for stream in anatomy.streams[1:])
    ids = torch.arange(11, 46, 5)
    corruption = draw((2, 4), anatomy.d_model, sigma=1.0, samples=2, seed=1)
    job = Job(ids, corruption, cells, None)
    expected = ENGINES["reference"](anatomy, job, lambda: None)
    assert ENGINES["rows"](anatomy, job, lambda: None).cells == pytest.approx(expected.cells, rel=1e-4)
    base = expected.corrupted[:, expected.target]
    assert max(abs(expected.cells - base).ravel()) > 1e-5, "the edits must matter, or the test says nothing"


def test_dbrx_has_a_router_and_no_single_down_projection():
    assert fasttrace.Tracer(zoo.tiny_model("dbrx")).streams == ("block_output", "mlp_output", "attention_output")


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_fork_gives_queries_their_place_where_the_model_leaves_out_the_mask(name):
    assert select.choose(anatomy_of(zoo.tiny_model(name)), "fork").self_check_error < 1e-4


def test_every_engine_is_named_in_the_error_when_none_is_right(monkeypatch):
    def crash(*_):
        raise RuntimeError("shape mismatch")

    for name in ENGINES:
        monkeypatch.setitem(ENGINES, name, replace(ENGINES[name], run=crash))
    with pytest.raises(EngineError, match=r"wavefront does not run.*fork does not.*rows does not.*reference does not"):
        select.choose(anatomy_of(zoo.tiny_model("gpt2")))


@pytest.mark.parametrize(
    ("name", "sizes"), [("gemma4_text", (8, 16, 8, 16)), ("dots3_note_text", (8, 8, 12, 12)), ("llama", (8, 8, 8, 8))]
)
def test_heads_of_several_sizes_are_counted_block_by_block(name, sizes):
    """Such a configuration has no single head_dim, and transformers raises where one is read."""
    assert anatomy_of(zoo.tiny_model(name)).unit_work.pair == tuple(4 * 4 * size for size in sizes)


@pytest.mark.parametrize("name", ["gemma4_text", "gemma4", "gemma4_unified", "dots3_note"])
@pytest.mark.parametrize("engine", ["auto", "rows", "reference"])
def test_a_model_whose_heads_have_several_sizes_is_traced_to_the_end(name, engine):
    tracer = fasttrace.Tracer(zoo.tiny_model(name))
    result = tracer.trace([5, 9, 13, 21, 34, 55, 60], subject=(0, 2), samples=2, window=3, engine=engine)
    assert result.cost.flops > 0
    assert np.ptp(result.grid("block_output")) > 1e-3


def test_blocks_that_share_keys_only_through_a_cache_are_refused(monkeypatch):
    """Without one they use weights of their own, which no checkpoint has."""
    model = zoo.tiny_model("gemma4_text")
    assert model.config.num_kv_shared_layers
    anatomy_of(model)
    own = model.model.layers[3].mlp.forward
    forward = model.forward

    def uncached(*args, use_cache=None, **kwargs):
        with monkeypatch.context() as patch:
            if not use_cache:
                patch.setattr(model.model.layers[3].mlp, "forward", lambda hidden: -own(hidden))
            return forward(*args, use_cache=use_cache, **kwargs)

    model.forward = uncached
    said = r"gives other logits without a cache of keys and values, .* update transformers"
    with pytest.raises(ModelError, match=said):
        fasttrace.Tracer(model)
