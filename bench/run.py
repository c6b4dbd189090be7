"""fasttrace's own numbers on this machine: what it costs, how fast it is, and how far from the ceiling.

    python -m bench.run --cases gpt2-12,gpt2-xl --profile

The matmul ceilings come first, one per dtype. Every case passes the gate before it is timed, and a matmul runs before
and after each of its rounds. A case whose grids are wrong, or that does not fit, is told and left out; the exit code is
then 1. The last line is JSON, and the same goes to a file under bench/results.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.card import card, print_card
from bench.cases import CASES, DTYPES, STREAMS, WINDOW, Case
from bench.gate import DisagreementError
from bench.measured import Options, measure_case, print_measured
from bench.report import new_report, path_of, write
from bench.timing import Ceiling, Timing, copy_bandwidth, default_device, matmul_ceiling, measure
from fasttrace import memories
from fasttrace.experiment.cells import grid_cells, windows_of
from fasttrace.fusing.measure import choices
from fasttrace.planning.edits import Shape
from fasttrace.planning.plan import plan_cells

CPU_CASES = ("gpt2-12", "gpt2-12-n10", "gpt2-12-t25", "gpt2-12-mixed32", "smollm2", "llama3-8b", "gpt2-xl")
GPU_CASES = (*CPU_CASES, "gpt2-12-t200", "gpt2-xl-n10", "gpt2-xl-t25")
QUICK_CASES = ("tiny-gpt2", "tiny-llama", "tiny-mixed3", "gpt2-12")
REFUSED = (DisagreementError, MemoryError, torch.OutOfMemoryError)


def measure_planner(rounds: int = 11) -> dict[str, Timing]:
    """Time to list and plan the cells of three grids of 48 blocks x 7 tokens, from nothing and again."""
    shape = Shape(n_layers=48, n_positions=7, span=(0, 4), samples=1)

    def plan() -> None:
        grids = (grid_cells(stream, width, 48, 7) for stream, width in windows_of(STREAMS, WINDOW).items())
        plan_cells(shape, tuple(cell for grid in grids for cell in grid))

    def cold() -> None:
        memories.clear("plans")
        plan()

    return {"cold": measure(cold, rounds), "cached": measure(plan, rounds)}


def print_planner(planner: dict[str, Timing]) -> None:
    """The planner's times, for people."""
    for name, timing in planner.items():
        p20, p50, p80 = (1000 * seconds for seconds in (timing.p20, timing.p50, timing.p80))
        print(f"planner: 48 x 7 x 3 streams, {name}: {p50:.2f} ms [{p20:.2f}-{p80:.2f}]")


def measure_ceilings(cases: Sequence[Case], device: str) -> dict[torch.dtype, Ceiling]:
    """The fastest matmul of every dtype that the cases have."""
    return {dtype: matmul_ceiling(dtype, device) for dtype in dict.fromkeys(case.dtype for case in cases)}


def chosen_cases(names: Sequence[str], dtypes: Sequence[str | None]) -> Iterator[Case]:
    """Cases by name, in each of the dtypes; `name:dtype` is in that one.

    Raises:
        KeyError: an unknown name or dtype.
    """
    for name in names:
        name, _, own = name.partition(":")
        for dtype in [own] if own else dtypes:
            yield CASES[name].with_dtype(dtype)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.run", description="What a trace costs on this machine.")
    known = ",".join(CASES)
    parser.add_argument("--cases", help=f"some of {known}; default {','.join(CPU_CASES)}, more on a GPU; case:dtype")
    parser.add_argument("--dtypes", help=f"some of {','.join(DTYPES)}; default: a case's own, half precision on a GPU")
    parser.add_argument("--quick", action="store_true", help=f"only {','.join(QUICK_CASES)}, three rounds")
    parser.add_argument("--rounds", type=int, help="timed calls per case, at most; default 5")
    parser.add_argument("--seconds", type=float, default=120.0, help="no further round of a case begins after these")
    parser.add_argument("--engine", default="wavefront")
    parser.add_argument("--no-fuse", action="store_true", help="without fused operations and kernels")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--profile", action="store_true", help="also split the time by kind of operation")
    parser.add_argument("--out", type=Path, help="file for the report; default: one under bench/results")
    options = parser.parse_args(arguments)
    on_gpu = torch.device(options.device).type == "cuda"
    options.rounds = options.rounds or (3 if options.quick else 5)
    default = QUICK_CASES if options.quick else GPU_CASES if on_gpu else CPU_CASES
    names = options.cases.split(",") if options.cases else default
    dtypes = options.dtypes.split(",") if options.dtypes else ["float16", "bfloat16"] if on_gpu else [None]
    try:
        options.cases = list(chosen_cases(names, dtypes))
    except KeyError as unknown:
        parser.error(f"unknown case or dtype {unknown}; choose from {known} and {', '.join(DTYPES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; the last line is JSON."""
    options = parse(arguments)
    cases: list[Case] = options.cases
    report = new_report("run", card(options.device))
    print_card(report["card"])
    bandwidth = copy_bandwidth(options.device)
    print(f"copy: {bandwidth:.1f} GB/s, read and written")
    ceilings = measure_ceilings(cases, options.device)
    for dtype, ceiling in ceilings.items():
        print(f"matmul in {str(dtype).removeprefix('torch.')}: {ceiling}")
    planner = measure_planner()
    print_planner(planner)
    report |= {
        "copy_gb_per_second": bandwidth,
        "matmul": {str(dtype).removeprefix("torch."): asdict(ceiling) for dtype, ceiling in ceilings.items()},
        "planner_seconds": {name: asdict(timing) for name, timing in planner.items()},
        "cases": [],
        "refused": [],
    }
    how = Options(options.device, options.engine, not options.no_fuse, options.rounds, options.seconds, options.profile)
    path = options.out or path_of(report)
    for case in cases:
        try:
            measured = measure_case(case, ceilings[case.dtype], how)
        except Exception as refused:  # one case that does not run is no reason to lose the others
            why = str(refused) if isinstance(refused, REFUSED) else f"{type(refused).__name__}: {refused}"
            print(f"\n{case.summary()}\n  refused        {why}", flush=True)
            report["refused"].append({"case": case.name, "dtype": case.dtype_name, "why": why})
        else:
            print_measured(measured)
            report["cases"].append(asdict(measured))
        report["glue_kernels"] = {str(kernel): taken for kernel, taken in choices().items()}
        write(report, path)  # after each case: a run that is cut short keeps what it has
        _free_memory()
    for kernel, taken in report.get("glue_kernels", {}).items():
        print(f"kernel {kernel}: {'taken' if taken else 'left out'}")
    print(json.dumps(report))
    sys.exit(bool(report["refused"]))


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
