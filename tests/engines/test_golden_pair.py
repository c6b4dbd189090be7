"""A pair of prompts on SmolLM2: numbers that plain forward passes with hooks gave, in logit differences.

"When John and Mary went to the shops, John gave the bag to" against the same with Mary giving: the clean run goes on
with Mary. Values are exact to 2e-3, which is what another order of summing in float32 can move them by.
"""

from functools import cache

import numpy as np
import pytest
import torch

import fasttrace
from fasttrace.engines import ENGINES
from fasttrace.engines.job import Job
from fasttrace.experiment.cells import CLEAN, CORRUPTED, Edit, EditsIn
from fasttrace.experiment.corruption import Counterfactual

FIRST_DIFFERENCE, LAST, LAST_BLOCK = 9, 13, 29
EFFECTS = {
    **dict(
        zip(
            [("block_output", block, 9) for block in (0, 5, 10, 15, 20, 25, 29)],
            (7.280, 7.321, 7.355, 7.322, 5.030, -0.043, 0.0),
            strict=True,
        )
    ),
    **dict(
        zip(
            [("block_output", block, 13) for block in (0, 5, 10, 15, 20, 25, 29)],
            (0.004, -0.006, -0.009, -0.104, 2.340, 6.695, 7.278),
            strict=True,
        )
    ),
    ("attention_output", 23, 13): 5.749,
    ("attention_output", 20, 13): 1.882,
    ("attention_output", 24, 13): -1.638,
    ("attention_output", 17, 9): 1.002,
    ("mlp_output", 0, 9): 7.302,
    ("mlp_output", 26, 13): 0.918,
    ("mlp_output", 21, 9): 0.886,
    ("mlp_output", 29, 13): 0.790,
}
"""(site, block, position) -> what the clean value brings back of the difference, denoising."""


@cache
def pair():
    tracer = fasttrace.Tracer.from_pretrained("smollm2", cpu_matmul="mkl")
    prompts = [f"When John and Mary went to the shops, {name} gave the bag to" for name in ("John", "Mary")]
    ids = [tuple(tracer.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    mary, john = (tracer.tokenizer(name)["input_ids"][0] for name in (" Mary", " John"))
    return tracer._anatomy, ids, (mary, john)


def logit_differences(engine, cells, prompt=0):
    """Of [cell], and of the clean and the corrupted run: log p(Mary) - log p(John), which is that of the logits."""
    anatomy, ids, names = pair()
    runs = Counterfactual([ids[1 - prompt]]).runs(ids[prompt], (0, 1), anatomy)
    assert runs.span == (FIRST_DIFFERENCE, FIRST_DIFFERENCE + 1)
    assert len(ids[0]) == LAST + 1
    job = Job(torch.tensor(ids[prompt]), runs, tuple(cells), names[0])
    scores = [ENGINES[engine](anatomy, Job(job.token_ids, job.runs, job.cells, name), lambda: None) for name in names]
    mary, john = ([s.cells[:, 0], s.clean[s.target], s.corrupted[0, s.target]] for s in scores)
    return [np.log(a) - np.log(b) for a, b in zip(mary, john, strict=True)]


@pytest.mark.parametrize("engine", ["wavefront", "rows"])
def test_denoising_gives_the_known_effects(engine):
    cells = [(Edit(*place),) for place in EFFECTS]
    found, clean, corrupted = logit_differences(engine, cells)
    assert (clean, corrupted) == (pytest.approx(3.1214, abs=2e-3), pytest.approx(-4.1569, abs=2e-3))
    np.testing.assert_allclose(found - corrupted, list(EFFECTS.values()), atol=2e-3)


def test_noising_the_other_prompt_is_the_same():
    cells = [EditsIn(CLEAN, (Edit(*place, source=CORRUPTED),)) for place in EFFECTS]
    found, clean, corrupted = logit_differences("wavefront", cells, prompt=1)
    assert (clean, corrupted) == (pytest.approx(-4.1569, abs=2e-3), pytest.approx(3.1214, abs=2e-3))
    np.testing.assert_allclose(found - clean, list(EFFECTS.values()), atol=2e-3)
