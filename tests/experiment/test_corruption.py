"""The noise has the published code's bits."""

import numpy as np
import pytest
import torch
from torch import nn

from fasttrace.errors import PlanError
from fasttrace.experiment.corruption import draw, sigma_of

SIGMA = 0.13462981581687927


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_added_in_float64_and_rounded_once(dtype):
    embeddings = torch.randn(1, 7, 50).to(dtype).expand(4, -1, -1)
    corrupted = draw((1, 5), 50, sigma=SIGMA, samples=3, seed=1).added_to(embeddings)
    expected = embeddings.clone()
    expected[1:, 1:5] += torch.from_numpy(np.random.RandomState(1).randn(3, 4, 50)) * SIGMA
    assert torch.equal(corrupted, expected)


def test_rounding_the_noise_first_would_change_bits():
    embeddings = torch.randn(1, 4, 500).expand(2, -1, -1)
    noise = draw((0, 4), 500, sigma=SIGMA, samples=1, seed=1)
    early = embeddings[1] + noise.noise[0].float()
    assert not torch.equal(noise.added_to(embeddings)[1], early)


def test_the_clean_row_and_other_tokens_stay():
    embeddings = torch.randn(3, 6, 8)
    corrupted = draw((2, 4), 8, sigma=1.0, samples=2, seed=0).added_to(embeddings)
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
