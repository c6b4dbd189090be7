"""Every engine on a tiny random model of every causal-LM type of transformers, against plain forward passes.

    python -m bench.families                          # all types and variants of tests/helpers/zoo.py
    python -m bench.families llama mamba falcon-alibi --engines wavefront rows
    python -m bench.families --out docs/families.md

An error is the largest difference of a cell from the reference engine, over the spread of the reference's grids.
The last line counts the engines that "auto" chose.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from fasttrace.engines import ENGINES
from fasttrace.engines import self_check as select
from fasttrace.engines.job import Job
from fasttrace.errors import FasttraceError
from fasttrace.experiment.cells import grid_cells
from fasttrace.experiment.corruption import draw, sigma_of
from fasttrace.models.anatomy import Anatomy, anatomy_of
from tests.helpers import zoo

N_POSITIONS = 7
SPAN = (2, 4)
SAMPLES = 2
WINDOW = 3
REFERENCE = "reference"
WRONG = 1e-3
"""An error above this is no rounding."""

WORDS = 140
"""Characters that the table gives to a reason."""


HEADER = (
    "# Families",
    "",
    "Written by `make families`. `auto` is the engine that the self-check chose. A number is an engine's largest",
    "difference from the reference engine on all cells, over the spread of the reference's grids; words say why an",
    "engine does not run. `spread` is how far the reference's probabilities lie apart. The last columns are paths in a",
    "block.",
    "",
)


@dataclass
class Examined:
    """One row of the table; `problems` has the reasons of the engines that did not run."""

    name: str
    chosen: str = "none"
    errors: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    spread: float | None = None
    attention: str = ""
    mlp: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether "auto" chose an engine that is wrong on the whole grids."""
        return not self.errors.get(self.chosen, 0.0) <= WRONG

    def cells(self, engines: Sequence[str]) -> list[str]:
        """The row's fields."""
        results = [
            f"{self.errors[name]:.0e}" if name in self.errors else self.problems.get(name, "") for name in engines
        ]
        spread = "" if self.spread is None else f"{self.spread:.2g}"
        return [f"`{self.name}`", self.chosen, *results, spread, self.attention, self.mlp]


def main(arguments: Sequence[str] | None = None) -> None:
    """Examine each type, print its row at once, write the table; exit code 1 where "auto" chose a wrong engine."""
    parser = argparse.ArgumentParser("python -m bench.families", description="Every engine on every type of model.")
    parser.add_argument(
        "types", nargs="*", metavar="TYPE", help="types or variants of tests/helpers/zoo.py (default: all)"
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="to compare")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(arguments)
    if unknown := set(options.types) - {*zoo.ALL, *zoo.VARIANTS}:
        parser.error(f"no tiny model of {', '.join(sorted(unknown))} in tests/helpers/zoo.py")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("fasttrace").setLevel(logging.ERROR)
    engines = [name for name in options.engines if name != REFERENCE]
    print(_about())
    lines = _heading(engines)
    print(*lines, sep="\n")
    found = []
    for name in options.types or dict.fromkeys([*zoo.ALL, *zoo.VARIANTS]):
        found.append(examine(name, engines))
        lines.append(_line(found[-1].cells(engines)))
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join([*HEADER, _about(), "", *lines, "", _counts(found), ""]))
    wrong = [row.name for row in found if row.is_wrong]
    print("wrong engine chosen:", ", ".join(wrong) or "nowhere")
    print(_counts(found))
    sys.exit(bool(wrong))


def examine(name: str, engines: Sequence[str]) -> Examined:
    """One type or variant on every engine; what fails is told in the row."""
    row = Examined(name)
    model_type, settings = zoo.VARIANTS.get(name, (name, {}))
    if model_type in zoo.UNBUILT:
        row.chosen = f"cannot be built: {zoo.UNBUILT[model_type]}"
        return row
    try:
        anatomy = anatomy_of(zoo.tiny_model(model_type, **settings))
        row.attention, row.mlp = _paths(anatomy, anatomy.parts.attention), _paths(anatomy, anatomy.parts.mlp)
        row.chosen = select.choose(anatomy).name
    except Exception as problem:  # the sweep goes on
        row.chosen = f"none: {_in_short(problem)}"
        return row
    try:
        _compare(row, anatomy, engines)
    except Exception as problem:
        row.problems = dict.fromkeys(engines, f"no plain passes: {_in_short(problem)}")
    return row


def _compare(row: Examined, anatomy: Anatomy, engines: Sequence[str]) -> None:
    job = _job(anatomy)
    expected = _run(REFERENCE, anatomy, job)
    row.spread = float(np.ptp(expected))
    for engine in engines:
        try:
            row.errors[engine] = float(np.abs(_run(engine, anatomy, job) - expected).max()) / row.spread
        except Exception as problem:  # the sweep goes on
            row.problems[engine] = _in_short(problem)


def _job(anatomy: Anatomy) -> Job:
    """All cells of the model's streams, on an arbitrary prompt."""
    ids = torch.arange(11, 11 + 5 * N_POSITIONS, 5)
    sigma = sigma_of("s3", anatomy.embedding, [ids[slice(*SPAN)].tolist()], anatomy.device)
    cells = tuple(cell for s in anatomy.streams for cell in grid_cells(s, WINDOW, anatomy.n_layers, N_POSITIONS))
    return Job(
        ids,
        draw(SPAN, anatomy.d_model, sigma=sigma, samples=SAMPLES, seed=1, neutral=anatomy.neutral_token),
        cells,
        None,
    )


def _run(engine: str, anatomy: Anatomy, job: Job) -> np.ndarray:
    run: Callable = ENGINES[engine]
    return run(anatomy, job, lambda: None).cells


def _paths(anatomy: Anatomy, modules: Sequence[nn.Module | None]) -> str:
    """Paths inside the blocks, each once."""
    paths = []
    for block, module in zip(anatomy.blocks, modules, strict=True):
        names = {inner: name for name, inner in block.named_modules()}
        paths.append("none" if module is None else f"`{names.get(module, '?')}`")
    return " or ".join(dict.fromkeys(paths))


def _in_short(problem: Exception) -> str:
    words = " ".join(str(problem).split()).partition("; ")[0] or type(problem).__name__
    # What the model's own code raises speaks of its insides: it is quoted as such.
    if not isinstance(problem, FasttraceError):
        words = f"the model's code does not take such a pass ({type(problem).__name__}: {words})"
    return words if len(words) <= WORDS else words[: WORDS - 3] + "..."


def _about() -> str:
    return (
        f"transformers {version('transformers')}, torch {version('torch')}; tiny random models in float32 on the CPU, "
        f"{N_POSITIONS} tokens, subject [{SPAN[0]}, {SPAN[1]}), samples {SAMPLES}, window {WINDOW}"
    )


def _heading(engines: Sequence[str]) -> list[str]:
    names = ["type", "auto", *engines, "spread", "attention", "MLP"]
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _counts(found: Sequence[Examined]) -> str:
    counted = Counter(row.chosen if row.chosen in ENGINES else "no engine" for row in found)
    return ", ".join(f"{name} {count}" for name, count in counted.most_common())


if __name__ == "__main__":
    main()
