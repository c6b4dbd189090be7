"""What half precision costs in accuracy: the demo's trace in float32 and again in another dtype.

    python -m bench.precision --dtype bfloat16

The last line is JSON.
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np

import fasttrace
from bench.card import card, print_card
from fasttrace.models.embedded import CASE, MODEL_NAME

FLOOR = 1e-3
"""Relative differences are those of cells above this probability."""


def differences(exact: fasttrace.TraceResult, rounded: fasttrace.TraceResult) -> dict[str, dict[str, float]]:
    """Per stream, the largest absolute and relative difference of a cell, and the correlation of the grids."""
    found = {}
    for stream in exact.streams:
        truth, other = exact.grid(stream).ravel(), rounded.grid(stream).ravel()
        large = truth > FLOOR
        found[stream] = {
            "absolute": float(np.abs(other - truth).max()),
            "relative": float(np.abs(other[large] / truth[large] - 1).max()),
            "correlation": float(np.corrcoef(truth, other)[0, 1]),
        }
    return found


def traced(model: str, dtype: str, samples: int) -> fasttrace.TraceResult:
    """The demo's trace in one dtype."""
    tracer = fasttrace.Tracer.from_pretrained(model, dtype=dtype)
    return tracer.trace(CASE.prompt, subject=CASE.subject, target=CASE.target, samples=samples, noise=0.3663)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace twice, print the differences."""
    parser = argparse.ArgumentParser("python -m bench.precision", description="Half precision against float32.")
    parser.add_argument("--model", default=MODEL_NAME)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=1)
    options = parser.parse_args(arguments)
    about = card("cpu")
    print_card(about)
    exact = traced(options.model, "float32", options.samples)
    rounded = traced(options.model, options.dtype, options.samples)
    found = differences(exact, rounded)
    print(f"{options.model}, {CASE.prompt!r}, samples {options.samples}: {rounded.metadata['dtype']} against float32")
    print(f"  clean p {exact.clean_prob:.4f} and {rounded.clean_prob:.4f}", end=", ")
    print(f"corrupted p {exact.corrupted_prob:.5f} and {rounded.corrupted_prob:.5f}")
    for stream, difference in found.items():
        print(f"  {stream:<17}" + ", ".join(f"{name} {value:.3g}" for name, value in difference.items()))
    print(json.dumps({"card": about, "dtype": options.dtype, "samples": options.samples, "differences": found}))


if __name__ == "__main__":
    main()
