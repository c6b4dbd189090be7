"""The noise has the published code's bits."""

import numpy as np
import pytest
import torch
from torch import nn

from fasttrace.errors import PlanError
from fasttrace.experiment.corruption import (
    Counterfactual,
    EmbeddingsReplaced,
    Moments,
    NoCorruption,
    Noise,
    draw,
    sigma_of,
)
from tests.conftest import tiny_anatomy

SIGMA = 0.13462981581687927


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_added_in_float64_and_rounded_once(dtype):
    embeddings = torch.randn(1, 7, 50).to(dtype).expand(4, -1, -1)
    corrupted = draw((1, 5), 50, sigma=SIGMA, samples=3, seed=1).embedded(embeddings)
    expected = embeddings.clone()
    expected[1:, 1:5] += torch.from_numpy(np.random.RandomState(1).randn(3, 4, 50)) * SIGMA
    assert torch.equal(corrupted, expected)


def test_rounding_the_noise_first_would_change_bits():
    embeddings = torch.randn(1, 4, 500).expand(2, -1, -1)
    noise = draw((0, 4), 500, sigma=SIGMA, samples=1, seed=1)
    early = embeddings[1] + noise.noise[0].float()
    assert not torch.equal(noise.embedded(embeddings)[1], early)


def test_the_clean_row_and_other_tokens_stay():
    embeddings = torch.randn(3, 6, 8)
    corrupted = draw((2, 4), 8, sigma=1.0, samples=2, seed=0).embedded(embeddings)
    assert torch.equal(corrupted[0], embeddings[0])
    assert torch.equal(corrupted[:, :2], embeddings[:, :2])
    assert torch.equal(corrupted[:, 4:], embeddings[:, 4:])
    assert (corrupted[1:, 2:4] != embeddings[1:, 2:4]).all()


def test_the_first_samples_are_those_of_a_smaller_draw():
    assert torch.equal(
        draw((0, 3), 5, sigma=1.0, samples=10, seed=1).noise[:4],
        draw((0, 3), 5, sigma=1.0, samples=4, seed=1).noise,
    )


def test_no_generator_is_shared_between_draws():
    np.random.seed(0)
    first = draw((0, 3), 5, sigma=1.0, samples=2, seed=7)
    second = draw((0, 3), 5, sigma=1.0, samples=2, seed=7)
    assert torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, draw((0, 3), 5, sigma=1.0, samples=2, seed=8).noise)


def test_s3_is_three_times_the_deviation_of_all_subject_embeddings():
    embedding = nn.Embedding(20, 16)
    subjects = [[3, 4], [7]]
    measured = sigma_of("s3", embedding, subjects, "cpu")
    assert measured == pytest.approx(3 * embedding.weight[[3, 4, 7]].std().item())
    assert sigma_of("s", embedding, subjects, "cpu") == pytest.approx(measured / 3)
    assert sigma_of("s1.5", embedding, subjects, "cpu") == pytest.approx(measured / 2)


def test_a_number_is_taken_as_it_is():
    assert sigma_of(SIGMA, nn.Embedding(2, 2), [], "cpu") == SIGMA
    assert sigma_of(0, nn.Embedding(2, 2), [], "cpu") == 0.0


@pytest.mark.parametrize("noise", ["x3", "s-1", "snan", "s1e", "u3", "", None, True, [1.0]])
def test_an_unknown_rule_is_an_error(noise):
    with pytest.raises(PlanError, match="noise"):
        sigma_of(noise, nn.Embedding(4, 4), [[1]], "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"samples": 2.0}, "samples is 2.0"),
        ({"sigma": -0.1}, "deviation -0.1"),
        ({"sigma": float("nan")}, "deviation nan"),
        ({"sigma": float("inf")}, "deviation inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_a_draw_that_makes_no_sense_is_an_error(options, message):
    with pytest.raises(PlanError, match=message):
        draw((0, 2), 4, **({"sigma": 1.0, "samples": 1, "seed": 0} | options))


PROMPT = (5, 9, 13, 21, 34)


@pytest.mark.parametrize("replaces", [False, True])
def test_uniform_noise_and_replacing_have_numpys_bits(replaces):
    embeddings = torch.randn(1, 5, 32).expand(3, -1, -1)
    rule = Noise(0.5, samples=2, seed=4, distribution="uniform", replaces=replaces)
    corrupted = rule.runs(PROMPT, (1, 3), tiny_anatomy("gpt2")).embedded(embeddings)
    noise = torch.from_numpy(np.random.RandomState(4).uniform(-1, 1, (2, 2, 32)) * 0.5)
    expected = noise if replaces else embeddings[1:, 1:3].double() + noise
    assert torch.equal(corrupted[1:, 1:3], expected.float())
    assert torch.equal(corrupted[:, 3:], embeddings[:, 3:])


def test_noise_with_moments_has_them():
    texts = torch.randn(4000, 3, dtype=torch.float64) @ torch.tensor([[2.0, 0, 0], [1, 1, 0], [0, 0, 0.1]]).double() + 5
    moments = Moments.of(texts)
    noise = Noise(0.0, samples=4000, moments=moments).drawn((0, 1), 3).noise
    found = Moments.of(noise[:, 0])
    torch.testing.assert_close(found.mean, moments.mean, atol=0.1, rtol=0)
    torch.testing.assert_close(found.covariance, moments.covariance, atol=0.3, rtol=0)


def test_counterfactuals_are_fed_as_they_are_and_say_where_they_differ():
    runs = Counterfactual([[5, 9, 14, 21, 34], (5, 9, 13, 22, 34)]).runs(PROMPT, (0, 1), tiny_anatomy("gpt2"))
    assert (runs.span, len(runs)) == ((2, 4), 2)
    assert runs.seen(torch.tensor(PROMPT)).tolist() == [[5, 9, 14, 21, 34], [5, 9, 13, 22, 34]]
    embeddings = torch.randn(3, 5, 32)
    assert runs.embedded(embeddings) is embeddings
    assert runs.part(slice(1, None)).seen(torch.tensor(PROMPT)).tolist() == [[5, 9, 13, 22, 34]]


def test_a_counterfactual_that_is_the_prompt_differs_nowhere():
    assert Counterfactual([PROMPT]).runs(PROMPT, (0, 1), tiny_anatomy("gpt2")).span == (5, 5)


def test_a_counterfactual_of_another_length_is_refused_with_both():
    with pytest.raises(PlanError, match=r"has 4 tokens and the prompt 5.* first 2 tokens.*\[13, 21, 34\]"):
        Counterfactual([(5, 9, 14, 21)]).runs(PROMPT, (0, 1), tiny_anatomy("gpt2"))
    with pytest.raises(PlanError, match="a token id of the counterfactual is 10000"):
        Counterfactual([(5, 9, 14, 21, 10000)]).runs(PROMPT, (0, 1), tiny_anatomy("gpt2"))
    with pytest.raises(PlanError, match="counterfactual is empty"):
        Counterfactual([])


def test_embeddings_become_zero_their_mean_or_a_vector():
    anatomy, embeddings = tiny_anatomy("llama"), torch.randn(2, 5, 32)
    mean = anatomy.embedding.weight.double().mean(0).float()
    for by, value in (("zero", torch.zeros(32)), ("mean", mean), (mean * 2, mean * 2)):
        corrupted = EmbeddingsReplaced(by).runs(PROMPT, (1, 3), anatomy).embedded(embeddings)
        torch.testing.assert_close(corrupted[1, 1:3], value.detach().expand(2, -1))
        assert torch.equal(corrupted[0], embeddings[0])
    with pytest.raises(PlanError, match="shape"):
        EmbeddingsReplaced(torch.zeros(3)).runs(PROMPT, (1, 3), anatomy)


def test_no_corruption_makes_no_run():
    runs = NoCorruption().runs(PROMPT, (1, 3), tiny_anatomy("gpt2"))
    assert (len(runs), runs.span, runs.seen(torch.tensor(PROMPT)).shape) == (0, (5, 5), (0, 5))
    assert len(runs.part(slice(1))) == 0
