"""Sets of facts: packed against prompt by prompt, how near to the matmul ceiling, and memory against the budget.

    python -m bench.facts --facts known_1000.json --count 20 --samples 1 --dtypes float32

The first facts that the model knows are traced, three streams. Each pack is timed in turn with the same prompts one
after the other, so that both see the same minutes of the machine; their grids have to agree first. The last line is
JSON.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import fasttrace
from bench.card import card, print_card
from bench.gate import DisagreementError
from bench.report import new_report, path_of, write
from bench.timing import Ceiling, Section, default_device, matmul_ceiling, seconds_of, sustained_rate
from fasttrace.engines.memory import READOUT_BYTES, Budget, bytes_per_token
from fasttrace.experiment.settings import Settings
from fasttrace.study import Encoded, Study

ALLOWED = {torch.float32: 1e-3, torch.float64: 1e-9}
HALF_ALLOWED = 0.1
"""Largest difference of a probability between packed and alone, in half precision."""


@dataclass(frozen=True)
class Speed:
    """One run of packs.

    Attributes:
        packs: how many facts shared each pass.
        tokens: of the largest pack.
        gflops: 1e9 floating-point operations of all matrix products a second, packed.
        share: that over the fastest single matmul call of the same run.
        sustained_share: that over the matmul rate kept up between packs.
        alone: how many times as long the same prompts take one after the other.
        error: largest difference of a probability between the two.
    """

    dtype: str
    samples: int
    facts: int
    budget: int
    packs: list[int]
    tokens: int
    seconds: float
    seconds_alone: float
    facts_per_second: float
    cells_per_second: float
    gflops: float
    share: float
    sustained_share: float
    alone: float
    error: float
    others: float


@dataclass(frozen=True)
class Peak:
    """Memory of one run of packs.

    Attributes:
        budget: most tokens of a pack.
        tokens: of the largest pack.
        allowed: bytes that the budget stands for.
        bytes: peak of the pass above what was there before.
    """

    budget: int
    tokens: int
    allowed: int
    bytes: int


def known_facts(tracer: fasttrace.Tracer, facts: Any, count: int, **options: Any) -> tuple[Study, list[Encoded]]:
    """A study, and the first facts that the model knows."""
    settings = Settings(first_target_token=True, require_correct=True, **options)
    study, encoded, _ = tracer.study_of(fasttrace.read_facts(facts), settings)
    known: list[Encoded] = []
    for begin in range(0, len(encoded), 64):
        known += study.known(encoded[begin : begin + 64])[0]
        if len(known) >= count:
            break
    return study, known[:count]


def measure_speed(study: Study, known: Sequence[Encoded], ceiling: Ceiling, device: str) -> Speed:
    """Packs and single prompts in turn; which of them meets a shape first, and plans it, changes from pack to pack."""
    anatomy = study.anatomy
    packs = study.packed(known)
    together: list[float] = []
    alone: list[float] = []
    rates = [sustained_rate(ceiling, anatomy.dtype, device)]
    errors, flops, cells = [], 0, 0
    with Section(device) as section:
        for number, pack in enumerate(packs):
            found: list[fasttrace.TraceResult] = []
            single: list[fasttrace.TraceResult] = []
            ways = [(found, [pack], together), (single, [[each] for each in pack], alone)]
            for into, chosen, seconds in reversed(ways) if number % 2 else ways:
                seconds.append(seconds_of(lambda into=into, chosen=chosen: into.extend(results(study, chosen)), device))
            rates.append(sustained_rate(ceiling, anatomy.dtype, device))
            errors.append(agreement(found, single, anatomy.dtype))
            flops += sum(result.cost.flops for result in found)
            cells += sum(grid.size for result in found for grid in result.prob.values())
    gflops = 1e-9 * flops / sum(together)
    return Speed(
        dtype=str(anatomy.dtype).removeprefix("torch."),
        samples=study.settings.samples,
        facts=len(known),
        budget=study.budget.tokens,
        packs=[len(pack) for pack in packs],
        tokens=largest_pack(study, packs),
        seconds=sum(together),
        seconds_alone=sum(alone),
        facts_per_second=len(known) / sum(together),
        cells_per_second=cells / sum(together),
        gflops=gflops,
        share=gflops / ceiling.gflops,
        sustained_share=gflops / median(rates),
        alone=sum(alone) / sum(together),
        error=max(errors),
        others=section.others,
    )


def results(study: Study, packs: Sequence[Sequence[Encoded]]) -> list[fasttrace.TraceResult]:
    """The grids of packs, in their order."""
    records = [record for found in study.run(packs) for record in found]
    return [record.result for record in records if record.result is not None]


def agreement(
    found: Sequence[fasttrace.TraceResult], single: Sequence[fasttrace.TraceResult], dtype: torch.dtype
) -> float:
    """Largest difference of a probability.

    Raises:
        DisagreementError: more than rounding.
    """
    pairs = zip(found, single, strict=True)
    error = max(float(np.abs(one.prob[stream] - two.prob[stream]).max()) for one, two in pairs for stream in one.prob)
    if not error <= ALLOWED.get(dtype, HALF_ALLOWED):
        raise DisagreementError(f"packed and single prompts differ by {error:.1e}: nothing is reported")
    return error


def largest_pack(study: Study, packs: Sequence[Sequence[Encoded]]) -> int:
    """Tokens of the largest pack that runs; of a prompt that is split, the budget."""
    jobs = [[study.job(each.prompt) for each in pack] for pack in packs]
    sizes = [study.engine.tokens(study.anatomy, pack) for pack in jobs]
    return min(study.budget.tokens, max(sizes))


def measure_peaks(study: Study, known: Sequence[Encoded], budgets: Sequence[int], device: str) -> list[Peak]:
    """Peak memory of the same facts under several budgets; their grids have to agree."""
    peaks, first = [], None
    for budget in budgets:
        limited = replace(study, budget=Budget(budget))
        packs = limited.packed(known)
        with Section(device) as before:
            pass
        with Section(device) as section:
            found = results(limited, packs)
        first = first or found
        agreement(found, first, study.anatomy.dtype)
        allowed = budget * bytes_per_token(study.anatomy) + READOUT_BYTES
        peaks.append(Peak(budget, largest_pack(limited, packs), allowed, section.peak - before.peak))
    return peaks


def print_speed(speed: Speed) -> None:
    """For people."""
    print(f"\n{speed.facts} facts, N = {speed.samples}, {speed.dtype}, passes of at most {speed.budget} tokens")
    sizes = f"of {min(speed.packs)} to {max(speed.packs)} facts, {speed.tokens} tokens"
    rates = f"{speed.facts_per_second:.3f} facts/s, {speed.cells_per_second:.0f} cells/s"
    print(f"  packs          {len(speed.packs)}, {sizes}")
    print(f"  time           {speed.seconds:.1f} s, {rates}")
    print(
        f"  one by one     {speed.seconds_alone:.1f} s, {speed.alone:.2f} times as long; difference {speed.error:.1e}"
    )
    print(
        f"  speed          {speed.gflops:.0f} GFLOP/s, {speed.sustained_share:.2f} of the matmul kept up between packs"
    )
    print(f"  of one call    {speed.share:.2f} of the fastest single matmul call")
    print(f"  other load     {speed.others:.0%} of the CPU", flush=True)


def print_peaks(peaks: Sequence[Peak]) -> None:
    """For people."""
    print("\n| budget, tokens | largest pack, tokens | allowed, MB | peak above before, MB |\n|---|---|---|---|")
    for peak in peaks:
        print(f"| {peak.budget} | {peak.tokens} | {peak.allowed / 1e6:.0f} | {peak.bytes / 1e6:.0f} |", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.facts", description="What a set of facts costs.")
    parser.add_argument("--facts", default="builtin", help="a file of facts; default: the built-in set")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--count", type=int, default=20, help="facts that the model knows; default: 20")
    parser.add_argument("--samples", default="1", help="noise samples, several with commas")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--budget", default="auto")
    parser.add_argument("--budgets", help="budgets in tokens whose memory is measured instead, with commas")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, help="file for the report; default: one under bench/results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; the last line is JSON."""
    options = parse(arguments)
    about = card(options.device)
    report = new_report("facts", about) | {"facts": Path(options.facts).name, "speed": [], "memory": []}
    print_card(about)
    budget = int(options.budget) if options.budget.isdecimal() else options.budget
    for dtype in options.dtypes.split(","):
        tracer = fasttrace.Tracer.from_pretrained(options.model, dtype=dtype, device=options.device)
        ceiling = matmul_ceiling(tracer.dtype, options.device)
        print(f"matmul in {dtype}: {ceiling}", flush=True)
        for samples in map(int, options.samples.split(",")):
            study, known = known_facts(tracer, options.facts, options.count, samples=samples, budget=budget)
            if options.budgets:
                peaks = measure_peaks(study, known, [int(size) for size in options.budgets.split(",")], options.device)
                print_peaks(peaks)
                report["memory"] += [asdict(peak) | {"dtype": dtype, "samples": samples} for peak in peaks]
            else:
                speed = measure_speed(study, known, ceiling, options.device)
                print_speed(speed)
                report["speed"].append(asdict(speed))
            write(report, options.out or path_of(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
