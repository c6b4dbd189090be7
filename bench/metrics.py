"""What all metrics cost over prob alone: the same job, in turns, on the engine that the model gets.

Seconds are those of the process's own CPU time, which other programs on the machine move less than the clock's.

python -m bench.metrics --cases smollm2,gpt2-12 --rounds 9
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from unittest.mock import patch

import torch

from bench.cases import CASES, build
from bench.jobs import Runner
from bench.timing import Timing
from fasttrace.engines import metrics
from fasttrace.experiment.metrics import METRICS


def cost_of(name: str, rounds: int) -> dict[str, object]:
    """Seconds of one case with prob alone, and with every metric and a foil."""
    runner = Runner(build(CASES[name]))
    job = runner.job()

    def with_metrics(names: tuple[str, ...], foil: tuple[int, ...]) -> None:
        with patch.object(metrics, "METRICS", names):
            found, _ = runner.run(replace(job, foil=foil))
        assert found.names == names

    runs = {"prob": lambda: with_metrics(("prob",), ()), "all": lambda: with_metrics(METRICS, (5,))}
    seconds: dict[str, list[float]] = {each: [] for each in runs}
    for number in range(1 + rounds):
        for each in sorted(runs, reverse=bool(number % 2)):  # who goes first takes turns too
            start = time.process_time()
            runs[each]()
            if number:  # the first round chooses the engine and fills caches
                seconds[each].append(time.process_time() - start)
    alone, everything = (Timing.of(seconds[each]) for each in ("prob", "all"))
    paired = sorted(all_ / one for one, all_ in zip(seconds["prob"], seconds["all"], strict=True))
    print(f"{name}: prob alone {alone}, all {everything}, ratio of pairs {paired[len(paired) // 2]:.3f}", flush=True)
    return {"case": name, "prob": alone.p50, "all": everything.p50, "ratio": paired[len(paired) // 2]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="smollm2,gpt2-12")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(json.dumps([cost_of(name, options.rounds) for name in options.cases.split(",")]))


if __name__ == "__main__":
    main()
