"""Probabilities of large vocabularies, as float64 gives them."""

import numpy as np
import pytest
import torch

from fasttrace.engines.metrics import Answers, distributions, scored


@pytest.mark.parametrize("vocabulary", [50_257, 262_144])
def test_base_runs_and_restored_rows_are_read_in_the_same_way_and_as_exactly_as_float32_can(vocabulary):
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)) * 4.5
    exact = logits.double().softmax(-1).numpy()
    base = distributions(logits).numpy()
    none = torch.zeros(1, 0, dtype=torch.long)
    answers = Answers.of(logits[:1], torch.tensor([[7]]), none)
    rows = scored(logits, answers, np.zeros(3, dtype=int), torch.zeros(3, dtype=torch.long))[0].numpy()
    np.testing.assert_array_equal(base[:, 7], rows)
    assert (np.abs(base / exact - 1) <= 2.0**-23 * (8 + np.abs(np.log(exact)))).all()


def test_float64_logits_stay_in_float64():
    logits = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(distributions(logits).numpy(), logits.softmax(-1).numpy(), rtol=1e-14)
