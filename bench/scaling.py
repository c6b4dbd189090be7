"""How the cost grows with noise samples, with cells and with prompts: measured time and counted operations.

    python -m bench.scaling --quick

Each axis doubles from line to line. An exponent is the slope of a straight line through the logarithms: 1 is a cost in
proportion. Cells are counted by their token-blocks (`fasttrace.planning.cost`), since a cell near the end of the model
costs less than one at its start, and are taken at random, so that every part of the grids is in every share. Several
prompts run one after the other. The sizes of an axis take turns, so that a slow minute hits all. The last line is JSON.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

import fasttrace
from bench.card import card, print_card
from bench.cases import CASES, DTYPES, Case, Workload, build_all
from bench.gate import agree
from bench.jobs import Runner
from bench.report import new_report, path_of, write
from bench.timing import Timing, default_device, interleave
from fasttrace.engines.job import Job
from fasttrace.planning.cost import Cost, total

SAMPLES = (1, 2, 4, 8)
SHARES = (1 / 4, 1 / 2, 1.0)
PROMPTS = (1, 2, 4)
QUICK = replace(CASES["gpt2-12"], name="gpt2-12-narrow", config=CASES["gpt2-12"].config | {"n_embd": 192, "n_head": 3})
"""A quarter of GPT-2's width: a sixteenth of the work."""

Load = list[tuple[Runner, Job]]
"""What one line of the table runs."""


@dataclass(frozen=True)
class Line:
    """One size of one axis.

    Attributes:
        size: samples, token-blocks of the cells, or prompts.
        flops: counted operations of all matmuls, base rows included.
    """

    axis: str
    size: float
    cells: int
    token_blocks: float
    flops: int
    timing: Timing


@dataclass(frozen=True)
class Exponents:
    """Slopes of one axis on a log-log scale."""

    axis: str
    time: float
    flops: float


def loads(workloads: Sequence[Workload], engine: str) -> dict[str, list[tuple[float, Load]]]:
    """What each axis runs, by size; the size of a share of the cells is found when it has run."""
    runners = [Runner(workload, engine) for workload in workloads]
    first = runners[0]
    everything = first.cells()
    order = np.random.RandomState(0).permutation(len(everything))
    shares = ([everything[i] for i in sorted(order[: round(share * len(everything))])] for share in SHARES)
    return {
        "samples": [(n, [(first, first.job(runs=first.runs(n)))]) for n in SAMPLES],
        "cells' token-blocks": [(0, [(first, first.job(share))]) for share in shares],
        "prompts": [(n, [(runner, runner.job()) for runner in runners[:n]]) for n in PROMPTS],
    }


def run_load(load: Load) -> Cost:
    """Runs the jobs, one after the other."""
    return total(runner.run(job)[1] for runner, job in load)


def measure_axis(axis: str, sizes: list[tuple[float, Load]], rounds: int, device: str) -> list[Line]:
    """Times the sizes of one axis in turns."""
    costs = [run_load(load) for _, load in sizes]  # warms up, too
    runs: dict[str, Callable[[], object]] = {str(n): partial(run_load, load) for n, (_, load) in enumerate(sizes)}
    seconds = interleave(runs, rounds, device)
    return [
        Line(axis, size or cost.token_blocks, _n_cells(load), cost.token_blocks, cost.flops, Timing.of(times))
        for (size, load), cost, times in zip(sizes, costs, seconds.values(), strict=True)
    ]


def _n_cells(load: Load) -> int:
    return sum(len(job.cells) for _, job in load)


def exponents(axis: str, lines: Sequence[Line]) -> Exponents:
    """The slopes of an axis."""
    sizes = [line.size for line in lines]
    return Exponents(
        axis, slope(sizes, [line.timing.p50 for line in lines]), slope(sizes, [float(line.flops) for line in lines])
    )


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent k of the best fit cost = c * size ** k, by least squares of logarithms.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 3)
    2.0
    """
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def print_lines(lines: Sequence[Line]) -> None:
    """The lines as a Markdown table; `x` is the factor to the line above."""
    print("| axis | size | x | cells | token-blocks | GFLOP | x | seconds p50 [p20-p80] | x |")
    print("|---|---|---|---|---|---|---|---|---|")
    before = None
    for line in lines:
        above = before if before is not None and before.axis == line.axis else None
        print(
            f"| {line.axis} | {line.size:.0f} | {_factor(line.size, above and above.size)} | {line.cells} "
            f"| {line.token_blocks:.0f} | {line.flops / 1e9:.4g} | {_factor(line.flops, above and above.flops)} "
            f"| {line.timing} | {_factor(line.timing.p50, above and above.timing.p50)} |"
        )
        before = line


def _factor(value: float, above: float | None) -> str:
    return "" if not above else f"{value / above:.2f}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.scaling", description="How time grows with the work.")
    parser.add_argument("--case", default="gpt2-12", choices=CASES, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model; default: the case's own")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.name} in place of a case, three rounds")
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--engine", default="wavefront")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file for the report; default: one under bench/results")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 5)
    return options


def _case(options: argparse.Namespace) -> Case:
    case = QUICK if options.quick else CASES[options.case]
    return replace(case.with_dtype(options.dtype), prompts=max(PROMPTS), longest=0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print; the last line is JSON."""
    options = parse(arguments)
    report = new_report("scaling", card(options.device))
    print_card(report["card"])
    case = _case(options)
    print(case.summary())
    workloads = build_all(case, options.device)
    whole = fasttrace.Tracer(workloads[0].model).trace(
        workloads[0].prompt, engine=options.engine, **workloads[0].trace_options()
    )
    gate = agree(whole, workloads[0])
    print(f"gate: agrees with plain passes to {gate:.1e} relative\n")
    lines, slopes = [], []
    for axis, sizes in loads(workloads, options.engine).items():
        found = measure_axis(axis, sizes, options.rounds, options.device)
        lines += found
        slopes.append(exponents(axis, found))
    print_lines(lines)
    for found in slopes:
        print(f"exponent of {found.axis}: time {found.time:.2f}, counted operations {found.flops:.2f}")
    report |= {
        "case": case.name,
        "dtype": case.dtype_name,
        "engine": options.engine,
        "gate": gate,
        "lines": [asdict(line) for line in lines],
        "exponents": [asdict(found) for found in slopes],
    }
    write(report, options.out or path_of(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
