"""Facts of many shapes, for averages over them."""

import itertools

import numpy as np

from fasttrace.facts.dataset import Fact
from fasttrace.planning.cost import Cost
from fasttrace.results.record import Record
from fasttrace.results.result import TraceResult

STREAMS = ("block_output", "mlp_activation", "attention_output")
WINDOWS = {"block_output": 1, "mlp_activation": 10, "attention_output": 10}
N_LAYERS = 4
SHAPES = [((0, 3), 7), ((2, 3), 6), ((1, 5), 6), ((0, 2), 2), ((0, 1), 2), ((3, 4), 9), ((0, 6), 12)]


def make_result(span=(0, 3), n_positions=7, seed=0, n_layers=N_LAYERS, streams=STREAMS, **changes):
    random = np.random.default_rng(seed)
    fields = {
        "prob": {stream: random.random((n_layers, n_positions)) for stream in streams},
        "prob_std": {stream: np.zeros((n_layers, n_positions)) for stream in streams},
        "clean_prob": random.random(),
        "corrupted_prob": random.random() / 10,
        "corrupted_std": 0.0,
        "tokens": tuple(f" t{i}" for i in range(n_positions)),
        "token_ids": tuple(range(n_positions)),
        "span": span,
        "target": " Paris",
        "target_id": 5,
        "top": {},
        "windows": {stream: WINDOWS[stream] for stream in streams},
        "cost": Cost(0, 0.0, 0.0, 0),
        "metadata": {"model": "gpt2-xl"},
    }
    return TraceResult(**{**fields, **changes})


def record(result=None, name="1", **changes):
    return Record(Fact(name, "a b c", "b"), result, **changes)


def facts(n=20):
    shapes = itertools.islice(itertools.cycle(SHAPES), n)
    return [record(make_result(span, size, seed), str(seed)) for seed, (span, size) in enumerate(shapes)]
