"""fasttrace against other ways to compute the same grids, in one process, in turns.

    python -m bench.peers --case gpt2-12 --rounds 3 --cells 18

Agreement comes first: a tool whose cells differ is not timed. A tool that works cell by cell is timed on a
spread of cells, the same number of each stream, and its time for all cells follows from each stream's mean;
the table says how many were measured, and `--full` measures all. The modules of `bench/others` say what each
tool does and how it is installed; one that is not installed is named and left out. The last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import fasttrace
from bench.card import card, print_card
from bench.cases import CASES, DTYPES, STREAMS, Case, Cell, Workload, build, fitted
from bench.gate import TOLERANCE, DisagreementError, agree, check, grid_values, relative_difference, spread_cells
from bench.others import MissingError, Peer
from bench.others.lens import Lens
from bench.others.nnsight_invokes import Invokes
from bench.others.plain import FullRows, OneCellPerPass
from bench.others.pyvene_loop import Pyvene
from bench.report import new_report, path_of, write
from bench.timing import Run, Section, default_device, interleave, ratios

PEERS: dict[str, Callable[[Workload], Peer]] = {
    "pyvene": Pyvene,
    "pyvene-grouped": partial(Pyvene, grouped=True),
    "rome": OneCellPerPass,
    "transformer-lens": Lens,
    "nnsight": Invokes,
    "rows": FullRows,
}


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        work: what both computed.
        seconds: median over the rounds of the time for all cells, extrapolated if fewer were measured.
        ratio, ratio_min, ratio_max: that over fasttrace's time in the same round.
        fasttrace_seconds: fasttrace's own median in the rounds with this peer.
        max_relative_difference: between the two tools' probabilities, over the measured cells.
        others: share of the machine's CPU time that other processes took meanwhile.
    """

    tool: str
    work: str
    seconds: float
    fasttrace_seconds: float
    ratio: float
    ratio_min: float
    ratio_max: float
    max_relative_difference: float
    cells_measured: int
    cells: int
    others: float


@dataclass(frozen=True)
class Ours:
    """fasttrace on the case.

    Attributes:
        trace: what is timed beside a peer whose work is the case.
        result: what it found.
    """

    engine: str
    trace: Run
    result: Any


def compare(name: str, workload: Workload, ours: Ours, cells: list[Cell], rounds: int) -> Comparison:
    """Check one peer's cells against fasttrace's grids, then time it and fasttrace in turns.

    Raises:
        MissingError: its package is not installed.
        DisagreementError: the cells differ.
    """
    peer, everything = PEERS[name](workload), workload.case.cells()
    measured = cells if peer.cell_by_cell else everything
    trace, expected = _same_work(peer, ours, measured)
    difference = relative_difference(peer.probs(measured), expected)
    check(name, difference, TOLERANCE[workload.case.dtype])
    shares = _by_stream(measured) if peer.cell_by_cell else {"all": measured}
    runs: dict[str, Run] = {"fasttrace": trace}
    runs |= {stream: partial(peer.probs, some) for stream, some in shares.items()}
    with Section(workload.device) as section:
        seconds = interleave(runs, rounds, workload.device)
    own, theirs = seconds["fasttrace"], _for_all_cells(workload.case, shares, seconds)
    times = median(theirs), median(own), *ratios(theirs, own)
    return Comparison(name, peer.work, *times, difference, len(measured), len(everything), section.others)


def _same_work(peer: Peer, ours: Ours, measured: list[Cell]) -> tuple[Run, list[float]]:
    """What of fasttrace is timed beside a peer, and the probabilities that the peer's are compared with."""
    run = peer.same_work(ours.engine)
    if run is None:
        return ours.trace, grid_values(ours.result, measured)
    found = dict(zip(peer.workload.case.cells(), run(), strict=True))
    return run, [found[cell] for cell in measured]


def _by_stream(cells: list[Cell]) -> dict[str, list[Cell]]:
    return {stream: [cell for cell in cells if cell.stream == stream] for stream in STREAMS}


def _for_all_cells(case: Case, shares: dict[str, list[Cell]], seconds: dict[str, list[float]]) -> list[float]:
    """Each round's time for the whole grids, from the time for some cells, stream by stream or of all."""
    in_grid = case.n_layers * case.tokens
    scale = {name: len({cell.stream for cell in cells}) * in_grid / len(cells) for name, cells in shares.items()}
    return [sum(round_) for round_ in zip(*([t * scale[s] for t in seconds[s]] for s in shares), strict=True)]


def print_table(comparisons: Sequence[dict[str, Any]]) -> None:
    """The comparisons as a Markdown table; fasttrace's seconds are those of the same rounds."""
    print("| tool | work | seconds | fasttrace | ratio [min-max] | max rel. difference | cells measured | other load |")
    print("|---|---|---|---|---|---|---|---|")
    for c in comparisons:
        print(
            f"| {c['tool']} | {c['work']} | {c['seconds']:.3g} | {c['fasttrace_seconds']:.3g} "
            f"| {c['ratio']:.1f} [{c['ratio_min']:.1f}-{c['ratio_max']:.1f}] "
            f"| {c['max_relative_difference']:.1e} | {c['cells_measured']} of {c['cells']} | {c['others']:.0%} |"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.peers", description="Agreement, then time, then ratio.")
    parser.add_argument(
        "--case", default="gpt2-12", choices=[name for name, case in CASES.items() if case.prompts == 1]
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the model; default: the case's own")
    parser.add_argument("--samples", type=int, help="noise samples; default: the case's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", type=int, default=18, help="measured of a tool that works cell by cell")
    parser.add_argument("--full", action="store_true", help="measure all cells of every tool")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--engine", default="wavefront")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file for the report; default: one under bench/results")
    options = parser.parse_args(arguments)
    options.peers = options.peers.split(",")
    if unknown := [name for name in options.peers if name not in PEERS]:
        parser.error(f"unknown peer {unknown[0]!r}; choose from {', '.join(PEERS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print; the last line is JSON. The exit code is 1 if a tool disagreed."""
    options = parse(arguments)
    case = fitted(CASES[options.case].with_dtype(options.dtype).with_samples(options.samples), options.device)
    report = new_report("peers", card(options.device))
    print_card(report["card"])
    print(case.summary())
    workload = build(case, options.device)
    tracer = fasttrace.Tracer(workload.model)
    trace = partial(tracer.trace, workload.prompt, engine=options.engine, **workload.trace_options())
    ours = Ours(options.engine, trace, trace())
    gate = agree(ours.result, workload)
    print(f"gate: fasttrace agrees with plain passes to {gate:.1e} relative")
    cells = case.cells() if options.full else spread_cells(case, options.cells)
    report |= {"case": case.name, "dtype": case.dtype_name, "samples": case.samples, "gate": gate}
    report |= {"engine": options.engine}
    report |= {"peers": [], "left_out": {}}
    for name in options.peers:
        try:
            found = compare(name, workload, ours, cells, options.rounds)
        except (MissingError, DisagreementError) as problem:
            print(f"{name}: left out: {problem}")
            report["left_out"][name] = f"{type(problem).__name__}: {problem}"
        else:
            report["peers"].append(asdict(found))
        write(report, options.out or path_of(report))
    print_table(report["peers"])
    print(json.dumps(report))
    sys.exit(any("Disagreement" in why for why in report["left_out"].values()))


if __name__ == "__main__":
    main()
