"""Small traces under pytest-benchmark: `pytest bench --benchmark-compare` shows what a change costs."""

from functools import partial

import pytest

import fasttrace
from bench.cases import CASES, Workload, build
from bench.gate import agree


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-llama"])
def workload(request: pytest.FixtureRequest) -> Workload:
    return build(CASES[request.param])


@pytest.mark.parametrize("engine", ["wavefront", "rows"])
def test_a_small_trace_agrees_and_is_timed(benchmark, workload: Workload, engine: str) -> None:
    tracer = fasttrace.Tracer(workload.model)
    trace = partial(tracer.trace, workload.prompt, engine=engine, **workload.trace_options())
    agree(trace(), workload)
    benchmark(trace)
