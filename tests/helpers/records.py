"""Results, records and stores with made-up numbers."""

import json

import numpy as np
import pyarrow.parquet as pq

from fasttrace.experiment.metrics import METRICS, SPREADLESS
from fasttrace.facts.dataset import Fact
from fasttrace.planning.cost import Cost
from fasttrace.results.metric_grids import MetricGrids
from fasttrace.results.record import Record
from fasttrace.results.result import TraceResult
from fasttrace.runs.store import Store

STREAMS = ("block_output", "mlp_activation", "attention_output")
TOKENS = ("The", " Space", " Need", "le", " is", "\n", " 東京")
N_LAYERS = 5
SHAPE = (N_LAYERS, len(TOKENS))
FINGERPRINT = {
    "model": "gpt2-xl",
    "revision": "abc",
    "sigma": 0.13462981581687927,
    "samples": 10,
    "streams": STREAMS,
    "windows": {"mlp_activation": 10, "attention_output": 10},
    "versions": {"torch": "2.7.0"},
}


def make_result(**changes):
    random = np.random.default_rng(0)
    shape = (N_LAYERS, len(TOKENS))
    fields = {
        "prob": {stream: random.random(shape) for stream in STREAMS},
        "prob_std": {stream: random.random(shape) / 10 for stream in STREAMS},
        "clean_prob": 0.97638,
        "corrupted_prob": 0.026176,
        "corrupted_std": 0.01,
        "tokens": TOKENS,
        "token_ids": tuple(range(100, 107)),
        "span": (0, 4),
        "target": " Seattle",
        "target_id": 7312,
        "top": {
            "clean": ((7312, " Seattle", 0.97638), (11, ",", 0.0015)),
            "corrupted": ((5401, " Los", 0.033), (7312, " Seattle", 0.026176)),
        },
        "windows": {"block_output": 1, "mlp_activation": 10, "attention_output": 10},
        "cost": Cost(rows=70, token_blocks=123.5, full_token_blocks=700.0, flops=10**12),
        "metadata": {
            "model": "gpt2-xl",
            "prompt": "The Space Needle",
            "sigma": 0.13462981581687927,
            "seed": 1,
        },
    }
    return TraceResult(**{**fields, **changes})


def metric_grids(seed=0, std=True, streams=STREAMS, shape=SHAPE, **changes):
    """A metric beside prob, of numbers that float32 holds."""
    random = np.random.default_rng(seed)
    mean, spread = ({s: random.standard_normal(shape).astype(np.float32) for s in streams} for _ in range(2))
    fields = {"mean": mean, "std": spread if std else {}, "clean": 3.5, "corrupted": -1.25, "corrupted_std": 0.5}
    return MetricGrids(**{**fields, **changes})


def all_metrics(**changes):
    """A result with a foil and every metric."""
    names = [name for name in METRICS if name != "prob"]
    others = {name: metric_grids(seed, std=name not in SPREADLESS) for seed, name in enumerate(names)}
    return make_result(others=others, foil_ids=(11, 12), **changes)


def rewrite(path, change):
    table = pq.read_table(path)
    payload = json.loads(table.schema.metadata[b"fasttrace"])
    stored = change(payload)
    stored = stored if isinstance(stored, bytes) else json.dumps(payload).encode()
    pq.write_table(table.replace_schema_metadata({b"fasttrace": stored}), path)


def fact(name, **changes):
    return Fact(**{"id": str(name), "prompt": f"Fact {name} is in", "subject": f"Fact {name}"} | changes)


def result_of(name, **changes):
    probs = np.random.default_rng(sum(map(ord, str(name))))
    return make_result(**{"prob": {stream: probs.random((5, 7)) for stream in STREAMS}} | changes)


def traced(name, **changes):
    return Record(fact(name), result_of(name, **changes), correct=True)


def skipped(name):
    return Record(fact(name, target="Paris", foil="Rome", relation="P17"), reason="no subject", correct=None)


def new_store(path):
    return Store.open(path / "run", FINGERPRINT)


def flip(path, offset, bit=0):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)
