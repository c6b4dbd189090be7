"""fasttrace's own numbers on this machine: what it costs, how fast it is, and how far from the ceiling.

    python -m bench.run --cases gpt2-12,gpt2-xl

Every case passes the gate before it is timed, and its matmul ceiling is measured right before its time. The
last line is JSON, and the same goes to a file under bench/results.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import fasttrace
from bench.card import card, print_card, slug
from bench.cases import CASES, STREAMS, WINDOW, Case, Workload, build
from bench.gate import agree
from bench.split import time_split
from bench.timing import (
    Ceiling,
    Run,
    Section,
    Timing,
    copy_bandwidth,
    matmul_ceiling,
    measure,
    seconds_of,
    sustained_rate,
)
from fasttrace.cells import grid_cells, windows_of
from fasttrace.edits import Shape
from fasttrace.plan import plan_cells

DEFAULT_CASES = ("gpt2-12", "gpt2-12-n10", "smollm2", "gpt2-xl", "gpt2-xl-bf16")
QUICK_CASES = ("tiny-gpt2", "tiny-llama", "gpt2-12")


@dataclass(frozen=True)
class Measured:
    """One case's numbers.

    Attributes:
        gate: largest relative difference from plain passes.
        saving: token-blocks of one full row per cell over those computed.
        gflops: 1e9 floating-point operations of all matmuls per second, at the median.
        share: that over the ceiling's rate.
        ceiling: the fastest single matmul call of the same dtype, measured right before.
        sustained: that matmul's rate when kept up for a second and a half, median over the gaps between rounds.
        sustained_share: median over rounds of the round's rate over the mean of the two gaps beside it.
        peak_bytes: peak memory of the timed calls, weights included.
        peak_exact: whether the peak is that of the timed calls alone, not of all the process did before.
        others: share of the machine's CPU time that other processes took meanwhile.
    """

    case: str
    dtype: str
    engine: str
    gate: float
    timing: Timing
    cells_per_second: float
    rows: int
    token_blocks: float
    saving: float
    gflops: float
    share: float
    ceiling: Ceiling
    sustained: float
    sustained_share: float
    peak_bytes: int
    peak_exact: bool
    others: float
    split: dict[str, float]


def measure_case(case: Case, options: argparse.Namespace) -> Measured:
    """Build, gate, time, and profile if asked to."""
    workload = build(case, options.device)
    tracer = fasttrace.Tracer(workload.model)
    trace = partial(tracer.trace, workload.prompt, engine=options.engine, **workload.trace_options())
    result = trace()
    difference = agree(result, workload)
    ceiling = matmul_ceiling(case.dtype, options.device)
    seconds, gaps = [], [sustained_rate(ceiling, case.dtype, options.device)]
    with Section(options.device) as section:
        for _ in range(options.rounds):  # the gate's call warmed up
            seconds.append(seconds_of(trace, options.device))
            gaps.append(sustained_rate(ceiling, case.dtype, options.device))
    split = _split(trace, workload, options) if options.profile else {}
    return _measured(workload, result.cost, seconds, gaps, difference, ceiling, options.engine, section, split)


def _measured(
    workload: Workload,
    cost: Any,
    seconds: list[float],
    gaps: list[float],
    difference: float,
    ceiling: Ceiling,
    engine: str,
    section: Section,
    split: dict[str, float],
) -> Measured:
    case, timing = workload.case, Timing.of(seconds)
    gflops = 1e-9 * cost.flops / timing.p50
    shares = [
        2e-9 * cost.flops / s / (before + after) for s, before, after in zip(seconds, gaps[:-1], gaps[1:], strict=True)
    ]
    return Measured(
        case=case.name,
        dtype=case.dtype_name,
        engine=engine,
        gate=difference,
        timing=timing,
        cells_per_second=len(case.cells()) / timing.p50,
        rows=cost.rows,
        token_blocks=cost.token_blocks,
        saving=cost.full_token_blocks / cost.token_blocks,
        gflops=gflops,
        share=gflops / ceiling.gflops,
        ceiling=ceiling,
        sustained=median(gaps),
        sustained_share=median(shares),
        peak_bytes=section.peak,
        peak_exact=section.exact,
        others=section.others,
        split=split,
    )


def _split(trace: Run, workload: Workload, options: argparse.Namespace) -> dict[str, float]:
    return time_split(trace, workload.model.config.vocab_size, options.device)


def print_case(case: Case, m: Measured) -> None:
    """One case's numbers, for people."""
    bound = "" if m.peak_exact else " (of the whole process)"
    print(f"\n{case.summary()}, engine {m.engine}")
    print(f"  gate           {m.gate:.1e} relative")
    print(f"  time           {m.timing} over {m.timing.rounds} rounds, {m.cells_per_second:.0f} cells/s")
    print(f"  work           {m.rows} rows, {m.token_blocks:.0f} token-blocks, saving {m.saving:.2f}x")
    print(f"  speed          {m.gflops:.1f} GFLOP/s")
    print(f"  of peak        {m.sustained_share:.2f} of that matmul kept up between rounds ({m.sustained:.0f} GFLOP/s)")
    print(f"  of one call    {m.share:.2f} of the fastest single matmul call")
    print(f"  fastest call   {m.ceiling}")
    print(f"  peak memory    {m.peak_bytes / 1e9:.2f} GB{bound}")
    print(f"  other load     {m.others:.0%} of the machine")
    total = sum(m.split.values())
    for kind, seconds in m.split.items():
        print(f"  {kind:<14} {seconds:.3f} s  {seconds / total:.0%}")


def measure_planner(rounds: int = 11) -> dict[str, Timing]:
    """Time to list and plan the cells of three grids of 48 blocks x 7 tokens, from nothing and again."""
    shape = Shape(n_layers=48, n_positions=7, span=(0, 4), samples=1)

    def plan() -> None:
        grids = (grid_cells(stream, width, 48, 7) for stream, width in windows_of(STREAMS, WINDOW).items())
        plan_cells(shape, tuple(cell for grid in grids for cell in grid))

    def cold() -> None:
        grid_cells.cache_clear()
        plan_cells.cache_clear()
        plan()

    return {"cold": measure(cold, rounds), "cached": measure(plan, rounds)}


def print_planner(planner: dict[str, Timing]) -> None:
    """The planner's times, for people."""
    for name, timing in planner.items():
        p20, p50, p80 = (1000 * seconds for seconds in (timing.p20, timing.p50, timing.p80))
        print(f"planner: 48 x 7 x 3 streams, {name}: {p50:.2f} ms [{p20:.2f}-{p80:.2f}]")


def write_results(report: dict[str, Any], folder: Path) -> Path:
    """Write the report to <folder>/<device>/<date and time>-<commit>.json."""
    about = report["card"]
    path = folder / slug(about) / f"{report['date'][:16].replace(':', '')}-{about['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.run", description="What a trace costs on this machine.")
    parser.add_argument("--cases", help=f"some of {','.join(CASES)}; default {','.join(DEFAULT_CASES)}")
    parser.add_argument("--quick", action="store_true", help=f"only {','.join(QUICK_CASES)}, three rounds")
    parser.add_argument("--rounds", type=int, help="timed calls per case; default 5")
    parser.add_argument("--engine", default="wavefront")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="also split the time by kind of operation")
    parser.add_argument("--json-dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (3 if options.quick else 5)
    default = QUICK_CASES if options.quick else DEFAULT_CASES
    options.cases = options.cases.split(",") if options.cases else default
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; the last line is JSON."""
    options = parse(arguments)
    cases = [CASES[name] for name in options.cases]
    about = card(options.device)
    print_card(about)
    bandwidth = copy_bandwidth(options.device)
    print(f"copy: {bandwidth:.1f} GB/s, read and written")
    planner = measure_planner()
    print_planner(planner)
    measured = []
    for case in cases:
        measured.append(measure_case(case, options))
        print_case(case, measured[-1])
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": about,
        "copy_gb_per_second": bandwidth,
        "planner_seconds": {name: asdict(timing) for name, timing in planner.items()},
        "cases": [asdict(m) for m in measured],
    }
    write_results(report, options.json_dir)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
