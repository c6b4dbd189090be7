"""One case measured: gate, ceiling, time, memory, profile."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import monotonic
from typing import Any

import fasttrace
from bench.cases import STREAMS, WINDOW, Case, Workload, build_all, fitted, weight_bytes
from bench.gate import HalfError, agree, half_error
from bench.split import Split, time_split
from bench.timing import Ceiling, Run, Section, Timing, seconds_of, sustained_rate
from fasttrace.experiment.settings import Settings
from fasttrace.facts.dataset import Fact
from fasttrace.planning.cost import Cost, total
from fasttrace.study import Encoded

GATE_CELLS = 12
"""Of one prompt; of several prompts three each, one of every stream."""


@dataclass(frozen=True)
class Options:
    """How cases are measured.

    Attributes:
        rounds: timed calls of a case, at most.
        seconds: after which no further round of a case begins; there are two at least.
        profile: also split the time by kind of operation.
        fuse: with fused operations and kernels, see `fasttrace.fusing.choose`.
    """

    device: str = "cpu"
    engine: str = "wavefront"
    fuse: bool = True
    rounds: int = 5
    seconds: float = 120.0
    profile: bool = False


@dataclass(frozen=True)
class Measured:
    """One case's numbers.

    Attributes:
        case, dtype: what was measured; `shape` has its sizes in words.
        n_blocks: the model's; of a case that is cut to the memory there is, those that fit.
        whole_blocks: what the whole model would have.
        gate: largest relative difference from plain passes.
        half: of a model in half precision, differences from float32.
        cells: of all prompts.
        cells_per_second: of a round at the median, as all rates here.
        rows: restored rows that reach the readout.
        token_blocks: blocks computed for one token of a restored row, see `fasttrace.planning.cost`.
        saving: token-blocks of one full row per cell over those computed.
        gflops: 1e9 floating-point operations of all matmuls per second.
        share: that over the ceiling's rate.
        ceiling: the fastest single matmul call of the same dtype, measured in the same run.
        sustained: that matmul's rate when kept up, median over the gaps between rounds.
        sustained_share: median over rounds of the round's rate over the mean of the two gaps beside it.
        peak_bytes: peak memory of the timed calls, weights included.
        peak_exact: whether the peak is that of the timed calls alone, not of all the process did before.
        weight_bytes: of the model's parameters.
        others: share of the machine's CPU time that other processes took meanwhile.
        split: from the profiler, in a call of its own.
    """

    case: str
    shape: str
    dtype: str
    engine: str
    fuse: bool
    prompts: int
    samples: int
    n_blocks: int
    whole_blocks: int
    gate: float
    half: HalfError | None
    timing: Timing
    cells: int
    cells_per_second: float
    rows: int
    token_blocks: float
    token_blocks_per_second: float
    saving: float
    gflops: float
    share: float
    ceiling: Ceiling
    sustained: float
    sustained_share: float
    peak_bytes: int
    peak_exact: bool
    weight_bytes: int
    others: float
    split: Split | None


def trace_all(tracer: fasttrace.Tracer, workloads: list[Workload], engine: str) -> list[fasttrace.TraceResult]:
    """The grids of a prompt, or of several that share passes as those of `Tracer.trace_many` do."""
    if len(workloads) == 1:
        return [tracer.trace(workloads[0].prompt, engine=engine, **workloads[0].trace_options())]
    case, windows = workloads[0].case, tracer.windows(STREAMS, WINDOW)
    settings = Settings(noise=case.noise, samples=case.samples, seed=case.seed, engine=engine, strict=True)
    study = tracer._study(settings, windows, ())
    prompts = [tracer.encode(each.prompt, each.case.subject, each.target) for each in workloads]
    encoded = [Encoded(Fact(str(number), "", ""), prompt) for number, prompt in enumerate(prompts)]
    found = {int(record.fact.id): record.result for pack in study.run(study.packed(encoded)) for record in pack}
    return [result for _, result in sorted(found.items()) if result is not None]


def measure_case(case: Case, ceiling: Ceiling, options: Options) -> Measured:
    """Build, gate, time, and profile if asked to.

    Raises:
        DisagreementError: the grids are wrong; nothing was timed.
        MemoryError: not one block of the model fits.
    """
    built = fitted(case, options.device)
    workloads = build_all(built, options.device)
    tracer = fasttrace.Tracer(workloads[0].model, fuse=options.fuse)
    trace = partial(trace_all, tracer, workloads, options.engine)
    results = trace()
    each = GATE_CELLS if len(workloads) == 1 else 3
    gate = max(agree(result, workload, each) for result, workload in zip(results, workloads, strict=True))
    half = half_error(results[0], workloads[0])
    sustained = partial(sustained_rate, ceiling, case.dtype, options.device)
    seconds, gaps, section = _rounds(trace, sustained, options)
    split = time_split(trace, workloads[0].model, options.device) if options.profile else None
    cost, timing = total(result.cost for result in results), Timing.of(seconds)
    gflops = 1e-9 * cost.flops / timing.p50
    n_cells = sum(len(workload.case.cells()) for workload in workloads)
    return Measured(
        case=case.name,
        shape=built.summary(),
        dtype=case.dtype_name,
        engine=options.engine,
        fuse=options.fuse,
        prompts=len(workloads),
        samples=case.samples,
        n_blocks=built.n_layers,
        whole_blocks=case.n_layers,
        gate=gate,
        half=half,
        timing=timing,
        cells=n_cells,
        cells_per_second=n_cells / timing.p50,
        rows=cost.rows,
        token_blocks=cost.token_blocks,
        token_blocks_per_second=cost.token_blocks / timing.p50,
        saving=cost.full_token_blocks / cost.token_blocks,
        gflops=gflops,
        share=gflops / ceiling.gflops,
        ceiling=ceiling,
        sustained=median(gaps),
        sustained_share=_sustained_share(cost, seconds, gaps),
        peak_bytes=section.peak,
        peak_exact=section.exact,
        weight_bytes=weight_bytes(workloads[0].model),
        others=section.others,
        split=split,
    )


def _rounds(trace: Run, sustained: Callable[[], float], options: Options) -> tuple[list[float], list[float], Section]:
    """Seconds of each round, and the matmul's rate before, between and after them; the gate's call warmed up."""
    end = monotonic() + options.seconds
    seconds, gaps = [], [sustained()]
    with Section(options.device) as section:
        while len(seconds) < min(2, options.rounds) or (len(seconds) < options.rounds and monotonic() < end):
            seconds.append(seconds_of(trace, options.device))
            gaps.append(sustained())
    return seconds, gaps, section


def _sustained_share(cost: Cost, seconds: list[float], gaps: list[float]) -> float:
    rounds = zip(seconds, gaps[:-1], gaps[1:], strict=True)
    return median(2e-9 * cost.flops / s / (before + after) for s, before, after in rounds)


def print_measured(m: Measured) -> None:
    """One case's numbers, for people."""
    print(f"\n{m.shape}, engine {m.engine}{'' if m.fuse else ', nothing fused'}")
    for label, text in _lines(m):
        print(f"  {label:<14} {text}")


def _lines(m: Measured) -> list[tuple[str, Any]]:
    blocks = f"{m.n_blocks}" if m.n_blocks == m.whole_blocks else f"{m.n_blocks} of {m.whole_blocks}, which fit"
    bound = "" if m.peak_exact else " (of the whole process)"
    lines = [("blocks", blocks), ("gate", f"{m.gate:.1e} relative")]
    if m.half is not None:
        lines += [("from float32", f"{m.half.engine:.1e} relative, plain passes {m.half.plain:.1e}")]
    lines += [
        ("time", f"{m.timing} over {m.timing.rounds} rounds, {m.cells_per_second:.0f} cells/s"),
        ("work", f"{m.rows} rows, {m.token_blocks:.0f} token-blocks, saving {m.saving:.2f}x"),
        ("speed", f"{m.gflops / 1e3:.3g} TFLOP/s, {m.token_blocks_per_second:.0f} token-blocks/s"),
        ("of peak", f"{m.sustained_share:.2f} of that matmul kept up between rounds ({m.sustained:.0f} GFLOP/s)"),
        ("of one call", f"{m.share:.2f} of the fastest single matmul call"),
        ("fastest call", m.ceiling),
        ("peak memory", f"{m.peak_bytes / 1e9:.2f} GB{bound}, weights {m.weight_bytes / 1e9:.2f} GB"),
        ("other load", f"{m.others:.0%} of the CPU"),
    ]
    return lines if m.split is None else [*lines, *_split_lines(m.split)]


def _split_lines(split: Split) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = [("profiled", f"{split.wall:.3f} s, of which")]
    lines += [(f"  {kind}", f"{s:.4f} s  {s / split.wall:.0%}") for kind, s in split.seconds.items()]
    if split.launches is not None:
        lines += [("  launches", split.launches), ("  waits in it", split.waits or "none")]
    return lines
