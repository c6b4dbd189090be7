"""A verdict of the self-check holds for the model that it was made on, and not after a change."""

import copy
import gc
import types
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fasttrace import EngineError, ModelError, Tracer
from fasttrace.engines import self_check as select
from fasttrace.engines.state import state_of
from tests.conftest import tiny_model
from tests.helpers.run_facts import facts_of
from tests.helpers.tracers import tracer_with_text

IDS = [7, 12, 33, 45, 60, 21, 58, 40, 9, 3, 14, 15]
OPTIONS = {"subject": (1, 3), "target": 5, "samples": 2, "window": 3, "noise": 1.0}
VECTOR = 2 * torch.randn(32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checked(monkeypatch):
    """The states that were checked."""
    made, right = [], select._new_checks
    monkeypatch.setattr(select, "_new_checks", lambda *given: made.append(given[-1]) or right(*given))
    return made


def own_probability(model, ids=IDS, target=5):
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[target])


def steered(position):
    """A hook that adds to the hidden state of some tokens."""

    def steer(_module, _args, output):
        hidden = (output if torch.is_tensor(output) else output[0]).clone()
        hidden[:, position] += VECTOR
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])

    return steer


def steered_before(_module, args, kwargs):
    hidden = (args[0] if args else kwargs["hidden_states"]).clone()
    hidden[:, -1] += VECTOR
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def replaced(module):
    own, steer = module.forward, steered(-1)
    module.forward = lambda *args, **kwargs: steer(module, args, own(*args, **kwargs))


def hooked_everywhere(model):
    block = model.model.layers[1]
    steer = steered(-1)
    return torch_module.register_module_forward_hook(lambda m, args, out: steer(m, args, out) if m is block else None)


def moved_by_method(mlp):
    def forward(self, hidden):
        before = torch.cat((hidden[:, :1], hidden[:, :-1]), 1)
        return self.down_proj(self.act_fn(self.gate_proj(before)) * self.up_proj(hidden))

    mlp.forward = types.MethodType(forward, mlp)


CHANGES = {
    "a hook at the last token": lambda model: model.model.layers[1].register_forward_hook(steered(-1)),
    "a hook in the subject": lambda model: model.model.layers[1].register_forward_hook(steered(2)),
    "a hook far behind": lambda model: model.model.layers[1].register_forward_hook(steered(10)),
    "a hook on the last block": lambda model: model.model.layers[-1].register_forward_hook(steered(-1)),
    "a hook on an MLP": lambda model: model.model.layers[2].mlp.register_forward_hook(steered(-1)),
    "a hook on an attention": lambda model: model.model.layers[2].self_attn.register_forward_hook(steered(-1)),
    "a hook on a projection": lambda model: model.model.layers[2].mlp.down_proj.register_forward_hook(steered(-1)),
    "a hook on the embedding": lambda model: model.model.embed_tokens.register_forward_hook(steered(-1)),
    "a hook on the final norm": lambda model: model.model.norm.register_forward_hook(steered(-1)),
    "a hook before a block": lambda model: model.model.layers[1].register_forward_pre_hook(
        steered_before, with_kwargs=True
    ),
    "a hook for all modules": hooked_everywhere,
    "a forward of its own": lambda model: replaced(model.model.layers[1]),
    "an MLP's forward": lambda model: replaced(model.model.layers[1].mlp),
    "a method": lambda model: moved_by_method(model.model.layers[1].mlp),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_on_a_model_after_its_first_trace_is_in_the_next(change):
    model = tiny_model("llama")
    tracer = Tracer(model)
    assert tracer.trace(IDS, **OPTIONS).metadata["engine"] == "wavefront"
    before = own_probability(model)
    handle = CHANGES[change](model)
    try:
        own = own_probability(model)
        assert abs(own - before) > 1e-3 * before, "or the test says nothing"
        for each in (tracer, Tracer(model)):
            found = each.trace(IDS, **OPTIONS)
            assert found.clean_prob == pytest.approx(own, rel=1e-4)
            assert found.metadata["hooks"] == 1
            expected = each.trace(IDS, engine="reference", **OPTIONS)
            for stream in found.streams:
                np.testing.assert_allclose(found.grid(stream), expected.grid(stream), rtol=1e-3)
    finally:
        if handle is not None:
            handle.remove()


def test_a_hook_that_is_made_for_long_prompts_is_checked_on_one():
    model = tiny_model("llama")
    tracer, ids = Tracer(model), [*IDS, *IDS]
    tracer.trace(ids, **OPTIONS)
    model.model.layers[1].register_forward_hook(steered(20))
    for each in (tracer, Tracer(model)):
        assert each.trace(ids, **OPTIONS).clean_prob == pytest.approx(own_probability(model, ids), rel=1e-4)
        with pytest.raises(IndexError):  # as the model itself
            each.trace(IDS, **OPTIONS)


def test_a_hook_that_reads_from_right_to_left_is_refused(family):
    model = tiny_model(family)
    tracer = Tracer(model)
    tracer.anatomy.blocks[2].mlp.register_forward_hook(lambda _m, _a, output: output - output.mean(1, keepdim=True))
    with pytest.raises(EngineError, match="does not read from left to right"):
        tracer.trace(IDS, **OPTIONS)
    assert tracer.trace(IDS, engine="reference", **OPTIONS).clean_prob == pytest.approx(
        own_probability(model), rel=1e-4
    )


def test_a_hook_that_steers_one_token_costs_the_packed_engine_and_a_warning_says_so(caplog):
    model = tiny_model("llama")
    tracer = Tracer(model)
    tracer.choose_engine()
    model.model.layers[1].register_forward_hook(steered(-1))
    choice = tracer.choose_engine()
    assert choice.name == "rows"
    assert "wavefront differs from plain forward passes" in caplog.text
    with pytest.raises(EngineError, match="engine 'wavefront' differs from plain forward passes"):
        tracer.trace(IDS, engine="wavefront", **OPTIONS)


def test_a_hook_that_treats_all_tokens_alike_keeps_the_packed_engine(family):
    model = tiny_model(family)
    seen = []
    Tracer(model).anatomy.blocks[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    found = Tracer(model).trace(IDS, **OPTIONS)
    assert (found.metadata["engine"], found.metadata["hooks"]) == ("wavefront", 1)
    assert seen


def test_a_hook_taken_off_or_exchanged_is_noticed_and_known_states_are_not_checked_again(checked):
    model = tiny_model("llama")
    tracer = Tracer(model)
    plain = tracer.choose_engine()
    assert tracer.choose_engine() == plain
    assert len(checked) == 1
    first = model.model.layers[1].register_forward_hook(steered(-1))
    assert tracer.choose_engine().name == "rows"
    first.remove()
    second = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert tracer.choose_engine().name == "wavefront"
    second.remove()
    assert len(checked) == 3
    assert tracer.choose_engine() == plain
    assert len(checked) == 3


@contextmanager
def adapter_of_peft(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["down_proj", "q_proj"], init_lora_weights=False))
    yield


@contextmanager
def setting(get, set_to, value):
    before = get()
    set_to(value)
    yield
    set_to(before)


@contextmanager
def scaled(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.model.layers[1].mlp.down_proj, "weight", Doubled())
    yield


@contextmanager
def done(change):
    yield


OTHER_STATES = {
    "bfloat16": lambda model: done(model.bfloat16()),
    "float64": lambda model: done(model.double()),
    "eager attention": lambda model: done(model.set_attn_implementation("eager")),
    "training": lambda model: done(model.train()),
    "an adapter": adapter_of_peft,
    "a parametrized weight": scaled,
    "an exchanged MLP": lambda model: done(
        setattr(model.model.layers[1], "mlp", copy.deepcopy(model.model.layers[2].mlp))
    ),
    "another activation": lambda model: done(setattr(model.model.layers[1].mlp, "act_fn", nn.Tanh())),
    "a scale": lambda model: done(setattr(model.model.layers[1].self_attn, "scaling", 0.1)),
    "more words": lambda model: done(model.resize_token_embeddings(80)),
    "deterministic": lambda _: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "another default dtype": lambda _: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "another precision": lambda _: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"
    ),
}


@pytest.mark.parametrize("change", OTHER_STATES)
def test_another_state_of_the_model_is_checked_and_traced_as_it_is(change, checked):
    model = tiny_model("llama")
    tracer = Tracer(model)
    tracer.trace(IDS, **OPTIONS)
    with OTHER_STATES[change](model):
        found = tracer.trace(IDS, **OPTIONS)
        assert len(checked) == 2, "checked again"
        assert found.metadata["dtype"] == str(model.dtype).removeprefix("torch.")
        assert found.metadata["attention"] == model.config._attn_implementation
        expected = Tracer(model).trace(IDS, engine="reference", **OPTIONS)
        tolerance = 0.1 if model.dtype == torch.bfloat16 else 1e-4
        for stream in found.streams:
            np.testing.assert_allclose(found.grid(stream), expected.grid(stream), rtol=tolerance)
        tracer.trace(IDS, **OPTIONS)
        assert len(checked) == 2, "once"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.requires_grad_(True),
        lambda model: model.zero_grad(),
        lambda model: model.model.layers[0].register_full_backward_hook(lambda *_: None),
        lambda model: model.lm_head.weight.data.mul_(1.01),
    ],
    ids=["gradients", "no gradients", "a backward hook", "weights"],
)
def test_what_moves_all_engines_alike_is_not_checked_again(change, checked):
    tracer = Tracer(tiny_model("llama"))
    tracer.trace(IDS, **OPTIONS)
    change(tracer.model)
    found, expected = (tracer.trace(IDS, engine=engine, **OPTIONS) for engine in ("auto", "reference"))
    assert len(checked) == 1
    for stream in found.streams:
        np.testing.assert_allclose(found.grid(stream), expected.grid(stream), rtol=1e-4)


def test_adapters_are_switched_on_and_off_between_traces():
    model = tiny_model("llama")
    tracer = Tracer(model)
    plain = tracer.trace(IDS, **OPTIONS)
    with adapter_of_peft(model):
        adapted = tracer.trace(IDS, **OPTIONS)
        assert adapted.clean_prob == pytest.approx(own_probability(model), rel=1e-4)
        assert adapted.clean_prob != pytest.approx(plain.clean_prob, rel=1e-3)
        model.disable_adapters()
        np.testing.assert_allclose(tracer.trace(IDS, **OPTIONS).grid("mlp_activation"), plain.grid("mlp_activation"))
        model.enable_adapters()
        assert tracer.trace(IDS, **OPTIONS) == adapted


def test_a_tracer_follows_a_model_that_is_converted():
    tracer = Tracer(tiny_model("llama"))
    tracer.trace(IDS, **OPTIONS)
    tracer.model.double()
    assert tracer.dtype == torch.float64
    assert tracer.trace(IDS, **OPTIONS).metadata["dtype"] == "float64"


@pytest.mark.parametrize("engine", ["auto", "wavefront", "reference"])
def test_a_trace_under_autocast_is_refused_in_one_sentence(engine):
    tracer = Tracer(tiny_model("llama"))
    expected = tracer.trace(IDS, **OPTIONS)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(EngineError, match=r"autocast to bfloat16 is on, and the model is in float32: trace outside"),
    ):
        tracer.trace(IDS, engine=engine, **OPTIONS)
    with torch.autocast("cpu", enabled=False):
        assert tracer.trace(IDS, **OPTIONS) == expected


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_a_trace_in_any_mode_of_gradients_is_the_trace(mode):
    tracer = Tracer(tiny_model("llama"))
    with mode():
        first = tracer.trace(IDS, **OPTIONS)
    assert tracer.trace(IDS, **OPTIONS) == first
    with mode():
        assert tracer.trace(IDS, **OPTIONS) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.transformer.h[1].register_forward_hook(steered(-1)),
        lambda model: model.set_attn_implementation("eager"),
    ],
    ids=["a dtype", "a hook", "attention"],
)
def test_a_model_that_changes_between_the_packs_of_a_study_stops_it(change):
    tracer = tracer_with_text("gpt2")
    records = tracer.trace_many(facts_of(4), samples=1, window=3, budget=1)
    next(records)
    change(tracer.model)
    with pytest.raises(EngineError, match=r"has changed since its trace began .* start the trace again"):
        list(records)


def test_autocast_between_the_packs_of_a_study_stops_it():
    records = tracer_with_text("gpt2").trace_many(facts_of(4), samples=1, window=3, budget=1)
    next(records)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(EngineError, match="autocast to bfloat16 is on"):
        next(records)


def test_a_state_keeps_neither_the_model_nor_its_hooks_alive():
    def hooked():
        model = tiny_model("llama")
        model.model.layers[0].register_forward_hook(lambda *_: model.training or None)
        Tracer(model).trace(IDS, **OPTIONS)
        assert select._CHECKS[model]
        return weakref.ref(model)

    held = hooked()
    gc.collect()
    assert held() is None


def test_the_state_is_the_same_under_fasttraces_own_hooks():
    from fasttrace.fusing.choose import fused

    tracer = Tracer(tiny_model("gpt2"))
    before = state_of(tracer.model)
    with fused(tracer.anatomy):
        assert any("forward" in vars(module) for module in tracer.model.modules())
        assert state_of(tracer.model) == before


def shared_blocks(model):
    model.model.layers[3] = model.model.layers[1]


def shared_attention(model):
    model.model.layers[3].self_attn = model.model.layers[1].self_attn


def shared_mlp(model):
    model.model.layers[3].mlp = model.model.layers[1].mlp


@pytest.mark.parametrize(
    ("share", "what"), [(shared_blocks, "block"), (shared_attention, "attention"), (shared_mlp, "MLP")]
)
def test_a_module_of_several_blocks_is_refused(share, what):
    model = tiny_model("llama")
    tracer = Tracer(model)
    tracer.trace(IDS, **OPTIONS)
    share(model)
    for attempt in (lambda: Tracer(model), lambda: tracer.trace(IDS, **OPTIONS)):
        with pytest.raises(ModelError, match=f"blocks 1 and 3 of LlamaForCausalLM have one {what} module in common"):
            attempt()


def test_blocks_that_share_their_weights_alone_are_traced():
    model = tiny_model("llama")
    first, other = model.model.layers[1], model.model.layers[3]
    for name, parameter in first.named_parameters():
        other.get_submodule(name.rpartition(".")[0]).register_parameter(name.rpartition(".")[2], parameter)
    found, expected = (Tracer(model).trace(IDS, engine=engine, **OPTIONS) for engine in ("auto", "reference"))
    assert found.metadata["engine"] == "wavefront"
    for stream in found.streams:
        np.testing.assert_allclose(found.grid(stream), expected.grid(stream), rtol=1e-4)
