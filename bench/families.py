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
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    "Written by `make families`: every engine on a tiny random model of every causal type that transformers has,",
    "compared with plain forward passes. [How it works](how-it-works.md) says what the engines are.",
)
LEGEND = (
    "`auto` is the engine that the self-check chose. A number is an engine's largest difference from the reference",
    "engine on all cells, divided by the spread of the reference's grids. Words say why an engine does not run",
    "(`make families` prints the exceptions). `spread` is how far the reference's probabilities lie apart. The last",
    "columns are paths in a block.",
)
ENGINE_WORDS = {
    "wavefront": "all cells in one packed pass",
    "fork": "the same, attention called per group of rows",
    "rows": "one pass of whole rows",
    "reference": "one cell at a time",
    "no engine": "cannot be traced, or no tiny model can be built",
}
KNOWN = {
    "GPT-2, DistilGPT-2": "gpt2",
    "GPT-J": "gptj",
    "GPT-NeoX, Pythia": "gpt_neox",
    "OPT": "opt",
    "BLOOM": "bloom",
    "Falcon": "falcon",
    "MPT": "mpt",
    "Llama 1, 2, 3; SmolLM, SmolLM2": "llama",
    "Llama 4": "llama4_text",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "Qwen 2, 2.5": "qwen2",
    "Qwen 3": "qwen3",
    "Qwen 3, experts": "qwen3_moe",
    "Gemma": "gemma",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3_text",
    "Gemma 3n": "gemma3n_text",
    "Phi-1.5, Phi-2": "phi",
    "Phi-3, Phi-4": "phi3",
    "OLMo 2": "olmo2",
    "SmolLM3": "smollm3",
    "gpt-oss": "gpt_oss",
    "DeepSeek V3, R1": "deepseek_v3",
    "Command R": "cohere",
    "Granite 3": "granite",
    "StarCoder2": "starcoder2",
    "StableLM": "stablelm",
    "GLM-4": "glm4",
    "Mamba": "mamba",
    "Jamba": "jamba",
}
"""Names that people know -> type of transformers."""

REASONS = (
    ("no attribute 'update_indexer'", "sparse attention chooses its keys"),
    ("no attribute 'get_conv_state'", "recurrent blocks pass on no keys and values"),
    ("takes no cache of earlier keys and values", "recurrent blocks pass on no keys and values"),
    ("blocks attended through the pack", "some blocks attend in another way, or not at all"),
    ("does not take its attention from transformers' interface", "has attention code of its own"),
    ("has no attention_output", "attention is not a module of its own"),
    ("no single input embedding", "no single input embedding to add noise to"),
    ("gets hidden states of shape", "its positions are not the prompt's tokens"),
    ("no list of", "no list of blocks is found"),
    ("does not keep hidden states as", "hidden states are not [row, position, d_model]"),
    ("is never computed", "a part of its blocks is never called"),
    ("does not take such a pass", "its code expects whole prompts"),
)
"""What a reason contains -> what the table says in its place; the first that fits."""


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
        return self._fields(self.chosen, {name: self.problems.get(name, "") for name in engines})

    def written(self, engines: Sequence[str]) -> list[str]:
        """The row's fields with reasons in words, as the file has them."""
        # One engine's exception may name the cause of another's.
        problems = {name: in_words(self.problems.get(name, ""), self.problems.values()) for name in engines}
        return self._fields(in_words(self.chosen, ()), problems)

    def _fields(self, chosen: str, problems: Mapping[str, str]) -> list[str]:
        results = [f"{self.errors[name]:.0e}" if name in self.errors else problems[name] for name in problems]
        spread = "" if self.spread is None else f"{self.spread:.2g}"
        return [f"`{self.name}`", chosen, *results, spread, self.attention, self.mlp]


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
    print(_about(), *_heading(engines), sep="\n")
    found = []
    for name in options.types or dict.fromkeys([*zoo.ALL, *zoo.VARIANTS]):
        found.append(examine(name, engines))
        print(_line(found[-1].cells(engines)), flush=True)
    if options.out:
        options.out.write_text(page(found, engines))
    wrong = [row.name for row in found if row.is_wrong]
    print("wrong engine chosen:", ", ".join(wrong) or "nowhere")
    print(_counts(found))
    sys.exit(bool(wrong))


def page(found: Sequence[Examined], engines: Sequence[str]) -> str:
    """The file: how many types get which engine, models that people know, then every type."""
    counts = _counted(found)
    chosen = {row.name: row.chosen for row in found}
    known = [(names, f"`{kind}`", in_words(chosen[kind], ())) for names, kind in KNOWN.items() if kind in chosen]
    parts = (
        ["# Families", "", *HEADER, "", _about(), "", _counts(found)],
        [_line(("engine", "types", "what it is")), _line(["---"] * 3)]
        + [_line((name, str(count), ENGINE_WORDS[name])) for name, count in counts.most_common()],
        ["## Models that people know", "", _line(("model", "type", "engine")), _line(["---"] * 3), *map(_line, known)],
        ["## Every type", "", *LEGEND],
        [*_heading(engines), *(_line(row.written(engines)) for row in found)],
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def in_words(reason: str, others: Iterable[str]) -> str:
    """A reason as the table says it; engines' names, empty reasons and those without other words stay."""
    if reason in ENGINES or not reason:
        return reason
    if "does not take such a pass" in reason:
        reason = " ".join([*others, reason])
    start = next((start for start in ("none: ", "cannot be built: ") if reason.startswith(start)), "")
    return start + next((words for part, words in REASONS if part in reason), reason.removeprefix(start))


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
    return ", ".join(f"{name} {count}" for name, count in _counted(found).most_common())


def _counted(found: Sequence[Examined]) -> Counter:
    return Counter(row.chosen if row.chosen in ENGINES else "no engine" for row in found)


if __name__ == "__main__":
    main()
