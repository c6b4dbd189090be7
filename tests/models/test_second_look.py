"""What a model reads from its tokens beside the input embedding is hidden from the corrupted runs, in every engine."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fasttrace
from fasttrace.engines import ENGINES, reference
from fasttrace.engines import self_check as select
from fasttrace.engines.job import Job
from fasttrace.experiment.cells import Edit, grid_cells
from fasttrace.experiment.corruption import Runs, draw
from fasttrace.models.anatomy import anatomy_of
from fasttrace.models.second_look import neutral_token
from tests.helpers import zoo

BEST = {
    "gemma3n_text": "wavefront",  # per-layer embeddings, shared keys, windows shorter than the prompt
    "gemma3n_text-unshared": "wavefront",
    "gemma4_text": "wavefront",  # the same, with heads of two sizes
    "gemma4_text-unshared": "wavefront",
    "gemma4": "wavefront",  # inside a model of text and images
    "deepseek_v4": "rows",  # experts chosen by token id
    "qwen4_exp_text": "rows",  # tables of n-grams
    "llama-twice": "wavefront",
    "llama-ngrams": "wavefront",
}
"""Models that look twice, and an engine for each."""

PROMPT = (7, 12, 33, 45, 60, 21, 9)


class TwiceLlama(nn.Module):
    """A block that adds its own embedding of the tokens, which it takes from the model's own ids."""

    def __init__(self, block, table):
        super().__init__()
        self.block, self.table = block, table
        self.self_attn, self.mlp = block.self_attn, block.mlp

    def forward(self, hidden_states, token_ids=None, **kwargs):
        return self.block(hidden_states, **kwargs) + self.table(token_ids)


def twice_llama(table=None):
    """A Llama whose third block adds what another table has of each token."""
    model = zoo.tiny_model("llama")
    torch.manual_seed(0)
    third = TwiceLlama(model.model.layers[2], table or nn.Embedding(zoo.VOCABULARY, 32))
    model.model.layers[2] = third.eval()
    forward = model.model.forward
    model.model.forward = lambda input_ids=None, **kwargs: forward(input_ids=input_ids, token_ids=input_ids, **kwargs)
    return model


def ngram_llama():
    """A Llama that adds what a table has of the token before to each embedding."""
    model = zoo.tiny_model("llama")
    torch.manual_seed(0)
    trunk: Any = model.model
    table, embed, forward = nn.Embedding(zoo.VOCABULARY, 32), trunk.embed_tokens, trunk.forward

    def with_ngrams(input_ids, inputs_embeds=None, **kwargs):
        return forward(inputs_embeds=embed(input_ids) + table(nn.functional.pad(input_ids[:, :-1], (1, 0))), **kwargs)

    trunk.forward = with_ngrams
    return model


def model_of(name):
    if name.startswith("llama"):
        return twice_llama() if name == "llama-twice" else ngram_llama()
    model_type, settings = zoo.VARIANTS.get(name, (name, {}))
    return zoo.tiny_model(model_type, **settings)


def job_on(anatomy, ids=PROMPT, span=(2, 4), samples=2, cells=None):
    if cells is None:
        cells = [cell for s in anatomy.streams for cell in grid_cells(s, 3, anatomy.n_layers, len(ids))]
        # Where the model reads n-grams, what enters the first block may differ behind the subject too.
        cells += [(Edit("block_input", 0, position),) for position in range(len(ids))]
    noise = draw(span, anatomy.d_model, sigma=1.0, samples=samples, seed=1, neutral=anatomy.neutral_token)
    return Job(torch.tensor(ids), noise, tuple(cells), 5)


def run(engine, anatomy, job):
    return ENGINES[engine](anatomy, job, lambda: None)


def with_equal_embeddings(model):
    """Tokens 33 and 34, and 45 and 46, are no longer told apart by the input embedding."""
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[[34, 46]] = weight[[33, 45]]
    return anatomy_of(model)


@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize("engine", ["best", "rows", "reference"])
def test_corrupted_and_restored_runs_know_no_subject_but_its_noised_embedding(name, engine):
    anatomy = with_equal_embeddings(model_of(name))
    engine = BEST[name] if engine == "best" else engine
    span = (2, 4)
    cells = [(Edit("mlp_output", layer, 3, "corrupted"), Edit("mlp_output", layer, 6, "corrupted")) for layer in (0, 3)]
    jobs = [job_on(anatomy, ids, span, cells=cells) for ids in (PROMPT, (7, 12, 34, 46, 60, 21, 9))]
    one, other = (run(engine, anatomy, job) for job in jobs)
    np.testing.assert_allclose(one.corrupted, other.corrupted, rtol=1e-5)
    np.testing.assert_allclose(one.cells, other.cells, rtol=1e-5)
    assert np.abs(one.clean - other.clean).max() > 1e-4, "the clean runs see the subject, or the test says nothing"
    seeing = [replace(job, runs=replace(job.runs, neutral=None)) for job in jobs]
    one, other = (run(engine, anatomy, job) for job in seeing)
    assert np.abs(one.corrupted - other.corrupted).max() > 1e-5, "the second look must matter"


@pytest.mark.slow
@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize(("ids", "span"), [(PROMPT, (2, 4)), (PROMPT, (0, 2)), (PROMPT, (5, 7)), ((5,), (0, 1))])
def test_all_cells_are_those_of_plain_forward_passes(name, ids, span):
    anatomy = anatomy_of(model_of(name))
    job = job_on(anatomy, ids, span, samples=3)
    expected = reference.run(anatomy, job, lambda: None, rows=1000)
    for engine in (BEST[name], "rows"):
        given = run(engine, anatomy, job)
        np.testing.assert_allclose(given.cells, expected.cells, rtol=2e-4, err_msg=engine)
        np.testing.assert_allclose(given.corrupted, expected.corrupted, rtol=1e-4, atol=1e-7, err_msg=engine)


def test_the_reference_swaps_ids_for_what_a_person_would_write_by_hand():
    """Gemma's corrupted run: the second table's rows of padding, the subject's own noised ones of the first."""
    anatomy = anatomy_of(zoo.tiny_model("gemma4_text"))
    job = job_on(anatomy, cells=[])
    ids = torch.tensor([PROMPT])
    second = anatomy.model.model.embed_tokens_per_layer

    def noised(_module, _inputs, output):
        output = output.double()
        output[0, 2:4] += job.runs.noise[1]
        return output.float()

    def without_subject(_module, _inputs, output):
        output = output.clone()
        output[0, 2:4] = row_of_padding
        return output

    with torch.no_grad():
        row_of_padding = second(torch.tensor([0]))[0]
        handles = [
            anatomy.embedding.register_forward_hook(noised),
            second.register_forward_hook(without_subject),
        ]
        expected = anatomy.model(input_ids=ids).logits[0, -1].softmax(-1)
        for handle in handles:
            handle.remove()
    np.testing.assert_allclose(run("reference", anatomy, job).corrupted[1], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_an_engine_that_shows_the_subject_to_the_second_look_fails_the_self_check(name, monkeypatch):
    from fasttrace.engines import wavefront

    def blind(jobs):
        return torch.cat([job.token_ids.expand(1 + job.samples, -1) for job in jobs])

    monkeypatch.setattr(wavefront, "base_ids", blind)
    choice = select.choose(anatomy_of(zoo.tiny_model(name)))
    assert choice.name == "rows"
    assert "wavefront differs from plain forward passes by" in choice.reason


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text", "llama-twice"])
def test_prompts_of_several_lengths_share_a_pass_of_a_model_that_looks_twice(name):
    anatomy = anatomy_of(model_of(name))
    jobs = [
        job_on(anatomy),
        job_on(anatomy, [9, 33, 45, 7], (1, 3)),
        job_on(anatomy, [45, 3, 8, 30, 2, 12, 44], (0, 1)),
    ]
    assert select.prompts_share_passes(anatomy, "wavefront")
    for job, given in zip(jobs, ENGINES["wavefront"].run_jobs(anatomy, jobs, lambda: None), strict=True):
        expected = reference.run(anatomy, job, lambda: None, rows=1000)
        np.testing.assert_allclose(given.cells, expected.cells, rtol=2e-4)


def test_the_choice_is_logged_once_and_kept_in_the_notes(caplog):
    tracer = fasttrace.Tracer(zoo.tiny_model("gemma4_text"))
    for _ in range(2):
        result = tracer.trace(PROMPT, subject=(2, 4), samples=1)
    note = (
        "Gemma4ForCausalLM looks its tokens up a second time, beside its input embedding: there corrupted runs see "
        "token 0 in place of the subject"
    )
    assert result.metadata["notes"] == [note]
    assert caplog.text.count(note) == 1


@pytest.mark.parametrize("name", ["gemma4_text", "qwen4_exp_text"])
def test_noise_of_0_corrupts_nothing_there_neither(name):
    result = fasttrace.Tracer(zoo.tiny_model(name)).trace(PROMPT, subject=(2, 4), samples=1, noise=0, target=5)
    assert result.corrupted_prob == pytest.approx(result.clean_prob, rel=1e-5)
    assert result.metadata["notes"] == []


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta", "gemma3_text", "mixtral", "opt", "mamba"])
def test_a_model_with_one_look_is_left_alone(name):
    """RoBERTa counts its positions by what is no padding; its code reads ids twice, and no word of them."""
    assert anatomy_of(zoo.tiny_model(name)).neutral_token is None
    result = fasttrace.Tracer(zoo.tiny_model(name)).trace(PROMPT, subject=(2, 4), samples=1)
    assert result.metadata["notes"] == []


def test_one_table_looked_up_twice_is_noised_at_both_looks():
    """A tied module gets its noise wherever it is called, so no neutral token is needed."""
    model = zoo.tiny_model("llama")
    embed = model.model.embed_tokens
    forward = model.model.forward

    def again(input_ids=None, inputs_embeds=None, **kwargs):
        return forward(inputs_embeds=embed(input_ids) + embed(input_ids), **kwargs)

    model.model.forward = again
    assert anatomy_of(model).neutral_token is None


def test_a_table_with_the_weights_of_the_input_embedding_is_a_second_look():
    """Tied weights in a module of its own: a hook on the input embedding does not reach it."""
    table = nn.Embedding(zoo.VOCABULARY, 32)
    model = twice_llama(table)
    table.weight = model.model.embed_tokens.weight
    assert anatomy_of(model).neutral_token == 0


def test_numbers_that_never_repeat_are_no_second_look():
    model = zoo.tiny_model("llama")
    model.model.layers[1].register_forward_hook(lambda _m, _a, output: output * (1 + torch.rand(1)))
    assert anatomy_of(model).neutral_token is None


@pytest.mark.parametrize(
    ("settings", "token"),
    [
        ({"pad_token_id": 3}, 3),
        ({"pad_token_id": None, "eos_token_id": [8, 9]}, 8),
        ({"pad_token_id": None, "eos_token_id": None, "bos_token_id": 2}, 2),
        ({"pad_token_id": -1, "eos_token_id": 9}, 9),
        ({"pad_token_id": 4000, "eos_token_id": None, "bos_token_id": None}, 0),
    ],
)
def test_the_neutral_token_is_padding_or_an_end_of_text(settings, token):
    model = zoo.tiny_model("gemma4_text")
    for name, value in settings.items():
        setattr(model.config, name, value)
    assert neutral_token(model, zoo.VOCABULARY) == token


def test_the_noise_keeps_its_bits():
    plain = draw((0, 3), 5, sigma=1.0, samples=2, seed=7)
    beside = draw((0, 3), 5, sigma=1.0, samples=2, seed=7, neutral=1)
    assert torch.equal(plain.noise, beside.noise)
    ids = torch.tensor([4, 5, 6, 7])
    assert beside.seen(ids).tolist() == [[1, 1, 1, 7]] * 2
    assert plain.seen(ids).tolist() == [ids.tolist()] * 2
    embeddings = torch.randn(1, 4, 5).expand(3, -1, -1)
    assert torch.equal(plain.embedded(embeddings), beside.embedded(embeddings))


def test_a_corruption_made_by_hand_needs_no_neutral_token():
    assert Runs((0, 1), torch.zeros(1, 1, 4)).neutral is None
