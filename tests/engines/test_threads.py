"""Threads that trace one model take turns, and other calls of the model go on as if nothing were there."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from fasttrace import EngineError, Tracer
from fasttrace.engines import ENGINES
from fasttrace.engines.attention_ragged import NAME
from fasttrace.models.hooks import Replaced, apart, input_hook, output_hook, replaced_method
from tests.conftest import tiny_model
from tests.helpers import zoo
from tests.helpers.run_facts import facts_of
from tests.helpers.tracers import tracer_with_text

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [21, 22, 23, 24, 25, 26, 27], [33, 34, 35, 36, 37, 38, 39, 40]]
OPTIONS = {"subject": (1, 3), "target": 5, "samples": 2, "window": 3, "noise": 1.0}


def assert_same(found, expected):
    for stream in expected.streams:
        np.testing.assert_allclose(found.grid(stream), expected.grid(stream), rtol=1e-5)


def assert_as_it_was(model, implementation="sdpa"):
    assert not any("forward" in vars(module) or "_attn" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == implementation


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits


def in_another_thread(work):
    """What `work` gives, or raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("tracers", [1, 2], ids=["one tracer", "two tracers"])
def test_four_threads_get_the_numbers_of_one(family, tracers):
    model = tiny_model(family)
    made = [Tracer(model) for _ in range(tracers)]
    alone = [made[0].trace(ids, **OPTIONS) for ids in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        work = [(n % tracers, n % len(PROMPTS)) for n in range(24)]
        found = list(pool.map(lambda each: made[each[0]].trace(PROMPTS[each[1]], **OPTIONS), work))
    for (_, prompt), result in zip(work, found, strict=True):
        assert_same(result, alone[prompt])
    assert_as_it_was(model)


def test_traces_begun_with_asyncio_get_their_numbers():
    tracer = Tracer(tiny_model("llama"))

    async def all_at_once():
        return await asyncio.gather(*(asyncio.to_thread(tracer.trace, ids, **OPTIONS) for ids in PROMPTS))

    for result, ids in zip(asyncio.run(all_at_once()), PROMPTS, strict=True):
        assert_same(result, tracer.trace(ids, **OPTIONS))


@pytest.mark.parametrize(
    ("name", "engine", "own"),
    [
        *(("llama", engine, own) for engine in ENGINES for own in ("sdpa", "eager")),
        ("gpt2", "wavefront", "eager"),
        ("mistral", "wavefront", "sdpa"),
        ("bloom", "fork", "eager"),
    ],
)
def test_another_thread_that_calls_the_model_in_the_middle_of_a_pass_gets_its_own_logits(name, engine, own):
    model = zoo.tiny_model(name)
    model.set_attn_implementation(own)
    tracer, expected = Tracer(model), logits_of(model, PROMPTS[1])
    found, in_pass = [], []

    def progress(_done, _steps):
        in_pass.append(any(module._forward_hooks for module in model.modules()))
        found.append(in_another_thread(lambda: logits_of(model, PROMPTS[1])))

    result = tracer.trace(PROMPTS[0], engine=engine, progress=progress, **OPTIONS)
    assert all(in_pass) or engine == "reference", "which tells when a pass is done"
    assert all(torch.equal(each, expected) for each in found)
    assert_same(result, tracer.trace(PROMPTS[0], engine=engine, **OPTIONS))
    assert_as_it_was(model, own)


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_attention_by_a_method_is_the_models_own_in_another_thread(name):
    model = zoo.tiny_model(name)
    expected, found = logits_of(model, PROMPTS[1]), []

    def progress(_done, _steps):
        found.append(in_another_thread(lambda: logits_of(model, PROMPTS[1])))

    result = Tracer(model).trace(PROMPTS[0], progress=progress, **OPTIONS)
    assert result.metadata["engine"] == "wavefront"
    assert all(torch.equal(each, expected) for each in found)


def test_another_thread_generates_in_the_middle_of_a_pass():
    model, found = tiny_model("llama"), []

    def generate():
        return model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=4, do_sample=False).tolist()

    expected = generate()
    Tracer(model).trace(PROMPTS[0], progress=lambda *_: found.append(in_another_thread(generate)), **OPTIONS)
    assert found == [expected] * 4


def test_progress_may_call_the_model_and_may_not_trace_it(family):
    model = tiny_model(family)
    tracer, expected, found = Tracer(model), logits_of(model, PROMPTS[1]), []
    tracer.trace(PROMPTS[0], **OPTIONS, progress=lambda *_: found.append(logits_of(model, PROMPTS[1])))
    assert len(found) == 4
    assert all(torch.equal(each, expected) for each in found)
    with pytest.raises(EngineError, match=r"running in this context already: .* trace when the first trace is done"):
        tracer.trace(PROMPTS[0], **OPTIONS, progress=lambda *_: tracer.trace(PROMPTS[1], **OPTIONS))
    assert_as_it_was(model)


def test_a_trace_inside_a_hook_of_the_model_is_refused(family):
    model = tiny_model(family)
    tracer = Tracer(model)
    tracer.trace(PROMPTS[0], **OPTIONS)
    told = []

    def nested(*_):
        with pytest.raises(EngineError, match="running in this context already") as raised:
            tracer.trace(PROMPTS[1], **OPTIONS)
        told.append(raised)

    handle = tracer.anatomy.blocks[1].register_forward_hook(nested)
    tracer.trace(PROMPTS[0], engine="reference", streams=["block_output"], **OPTIONS)
    handle.remove()
    assert told
    assert_as_it_was(model)


def test_progress_may_trace_another_model():
    outer, inner = Tracer(tiny_model("llama")), Tracer(tiny_model("gpt2"))
    expected, found = inner.trace(PROMPTS[1], **OPTIONS), []
    result = outer.trace(PROMPTS[0], **OPTIONS, progress=lambda *_: found.append(inner.trace(PROMPTS[1], **OPTIONS)))
    assert_same(result, outer.trace(PROMPTS[0], **OPTIONS))
    for each in found:
        assert_same(each, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_one_thread_leaves_the_model_to_the_others(family, error):
    model = tiny_model(family)
    tracer = Tracer(model)
    expected = tracer.trace(PROMPTS[0], **OPTIONS)

    def fail(done, _steps):
        if done == 2:
            raise error("in the middle")

    with ThreadPoolExecutor(2) as pool:
        failing = [pool.submit(tracer.trace, PROMPTS[1], progress=fail, **OPTIONS) for _ in range(3)]
        right = [pool.submit(tracer.trace, PROMPTS[0], **OPTIONS) for _ in range(3)]
    assert all(type(each.exception()) is error for each in failing)
    for each in right:
        assert_same(each.result(), expected)
    assert_as_it_was(model)


@pytest.mark.slow
def test_generators_take_turns_pack_by_pack(family):
    tracer = tracer_with_text(family)
    facts, options = facts_of(4), {"samples": 1, "budget": 1, "window": 3}
    expected = [record.result for record in tracer.trace_many(facts, **options)]
    first, second = tracer.trace_many(facts, **options), tracer.trace_many(facts, **options)
    interleaved = [next(each).result for _ in facts for each in (first, second)]
    suspended = tracer.trace_many(facts, **options)
    begun = next(suspended).result
    elsewhere = in_another_thread(lambda: [record.result for record in tracer.trace_many(facts, **options)])
    for number, result in enumerate(interleaved):
        assert_same(result, expected[number // 2])
    for found, wanted in zip([begun, *(record.result for record in suspended)], expected, strict=True):
        assert_same(found, wanted)
    for found, wanted in zip(elsewhere, expected, strict=True):
        assert_same(found, wanted)


def test_models_that_share_a_configuration_are_traced_side_by_side():
    first = tiny_model("llama")
    second = LlamaForCausalLM(first.config).eval()
    second.load_state_dict(first.state_dict())
    assert first.config is second.config
    tracers = [Tracer(first), Tracer(second)]
    expected = tracers[0].trace(PROMPTS[0], **OPTIONS)
    found = []

    def progress(_done, _steps):
        found.append(in_another_thread(lambda: tracers[1].trace(PROMPTS[0], **OPTIONS)))

    found.append(tracers[0].trace(PROMPTS[0], **OPTIONS, progress=progress))
    for each in found:
        assert_same(each, expected)
    assert_as_it_was(first)
    assert_as_it_was(second)


def test_a_model_in_training_is_in_training_again_afterwards():
    model = tiny_model("gpt2").train()
    expected = Tracer(model).trace(PROMPTS[0], **OPTIONS)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: Tracer(model).trace(PROMPTS[0], **OPTIONS), range(8)):
            assert_same(result, expected)
    assert all(module.training for module in model.modules())


def test_attention_that_was_left_set_by_hand_says_what_to_do():
    model = tiny_model("llama")
    model.set_attn_implementation(NAME)
    with pytest.raises(EngineError, match="inside a fasttrace pass only; set the model back to 'sdpa'"):
        logits_of(model, PROMPTS[0])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
@pytest.mark.parametrize("own", [False, True], ids=["of the class", "of the instance"])
def test_replaced_methods_are_undone_in_any_order(order, own):
    module = torch.nn.Linear(2, 2)
    forward = lambda hidden: hidden - 1  # noqa: E731
    if own:
        module.forward = forward
    expected = module(torch.ones(2))
    contexts = []
    for number in range(3):
        with apart():
            contexts.append(replaced_method(module, "forward", lambda hidden, number=number: hidden * number))
            contexts[-1].__enter__()
            assert torch.equal(module(torch.ones(2)), torch.full((2,), float(number)))
        assert torch.equal(module(torch.ones(2)), expected)
    for number in order:
        contexts[number].__exit__(None, None, None)
        assert torch.equal(module(torch.ones(2)), expected)
    assert vars(module).get("forward") is (forward if own else None)
    assert not isinstance(module.forward, Replaced)


def test_hooks_work_for_the_thread_that_put_them_on():
    module = torch.nn.Linear(2, 2)
    with output_hook(module, torch.zeros_like), input_hook(module, lambda args, kwargs: (args, kwargs)):
        assert not module(torch.ones(2)).any()
        assert in_another_thread(lambda: module(torch.ones(2)).any())
