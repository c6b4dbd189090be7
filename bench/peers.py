"""fasttrace against other ways to compute the same grids, in one process, on one model object, in turns.

    python -m bench.peers --case gpt2-12 --rounds 3 --cells 18

Agreement comes first: a tool whose cells differ is not timed. A tool that works cell by cell is timed on a
spread of cells, the same number of each stream, and its time for all cells follows from each stream's mean;
the table says how many were measured, and `--full` measures all.

pyvene (0.1.8) runs the loop of its causal tracing tutorial. It installs with `pip install --no-deps
pyvene==0.1.8`: of its requirements the loop needs only matplotlib beside what fasttrace needs itself. It
removes every forward hook from a model that it is given, before and after each call.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from io import StringIO
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fasttrace
from bench.card import card, print_card
from bench.cases import CASES, STREAMS, Case, Cell, Workload, build
from bench.gate import (
    Plain,
    agree,
    check,
    draw_noise,
    editing,
    grid_values,
    relative_difference,
    restored_modules,
    spread_cells,
)
from bench.timing import Run, Section, interleave, ratios

MAX_DIFFERENCE = 1e-4
"""Largest relative difference at which two tools count as doing the same work (float32)."""

ROWS_PER_PASS = 64


class Peer(Protocol):
    """A way to compute cells."""

    cell_by_cell: bool
    """Whether the time for some cells tells the time for all."""

    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The mean probability of the target of each cell."""
        ...


class Pyvene:
    """The loop of pyvene's tutorial: a new IntervenableModel per cell, one source run per restored block.

    Attributes:
        grouped: put all restored blocks into one group, which takes one source run; the tutorial does not.
    """

    cell_by_cell = True

    def __init__(self, workload: Workload, grouped: bool = False) -> None:
        pyvene = _import_pyvene()
        self.pyvene, self.workload, self.grouped = pyvene, workload, grouped
        self.noise = _pyvene_noise(pyvene, workload)
        # The tutorial works on the model without its head and multiplies by the embedding matrix itself.
        self.headless = workload.case.is_gpt2
        self.model = workload.model.get_submodule("transformer") if self.headless else workload.model
        rows = torch.tensor([workload.prompt] * workload.case.samples, device=workload.device)
        self.inputs = {"input_ids": rows}

    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The cells, one after the other."""
        return [self._prob(cell) for cell in cells]

    def _prob(self, cell: Cell) -> float:
        samples, blocks = self.workload.case.samples, self.workload.case.window(cell.stream, cell.layer)
        intervenable = self.pyvene.IntervenableModel(self._config(cell, blocks), self.model)
        restored = [[[cell.position]] * samples] * len(blocks)
        subject = [list(range(*self.workload.case.subject))] * samples
        n_sources = 1 if self.grouped else len(blocks)
        _, output = intervenable(
            self.inputs,
            [None] + [self.inputs] * n_sources,
            {"sources->base": ([None, *restored], [subject, *restored])},
        )
        return self._target_prob(output)

    def _config(self, cell: Cell, blocks: range) -> Any:
        stream, pyvene = self._component(cell.stream), self.pyvene
        groups = (0, 1) if self.grouped else (None, None)
        return pyvene.IntervenableConfig(
            representations=[
                pyvene.RepresentationConfig(0, "block_input", group_key=groups[0]),
                *(pyvene.RepresentationConfig(block, stream, group_key=groups[1]) for block in blocks),
            ],
            intervention_types=[self.noise] + [pyvene.VanillaIntervention] * len(blocks),
        )

    def _component(self, stream: str) -> str:
        """The name in pyvene, whose `mlp_activation` is another thing on gated MLPs; their output serves."""
        return "mlp_output" if stream == "mlp_activation" and not self.headless else stream

    def _target_prob(self, output: Any) -> float:
        if self.headless:
            distribution = self.pyvene.embed_to_distrib(self.model, output.last_hidden_state, logits=False)
        else:
            distribution = output.logits.softmax(-1)
        return distribution[:, -1, self.workload.target].mean().item()


def _import_pyvene() -> Any:
    try:
        with redirect_stdout(StringIO()):  # it prints about a backend that is not installed
            import pyvene
    except ImportError as missing:
        raise SystemExit(
            f"pyvene cannot be imported ({missing}): pip install --no-deps pyvene==0.1.8, "
            "or leave it out with --peers rome,rows"
        ) from missing
    return pyvene


def _pyvene_noise(pyvene: Any, workload: Workload) -> type:
    """The intervention that adds the case's noise, drawn whenever one is made, as in the tutorial."""

    class NoiseIntervention(pyvene.ConstantSourceIntervention, pyvene.LocalistRepresentationIntervention):
        def __init__(self, embed_dim: int, **_: Any) -> None:
            super().__init__()
            self.noise = torch.from_numpy(draw_noise(workload.case, int(embed_dim))).to(workload.device)

        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **_: Any) -> Tensor:
            base += self.noise
            return base

    return NoiseIntervention


class OneCellPerPass:
    """A forward pass per cell, of the clean row and the corrupted ones, as ROME's script does it."""

    cell_by_cell = True

    def __init__(self, workload: Workload) -> None:
        self.plain = Plain(workload)

    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The cells, one after the other."""
        return [self.plain.cell(cell) for cell in cells]


@dataclass(frozen=True)
class FullRows:
    """Many cells in one batch of full rows: one indexed write per module, the head at the last token only."""

    workload: Workload
    cell_by_cell = False

    def probs(self, cells: Sequence[Cell]) -> list[float]:
        """The cells, `ROWS_PER_PASS` rows at a time."""
        size = max(1, ROWS_PER_PASS // self.workload.case.samples)
        chunks = (cells[start : start + size] for start in range(0, len(cells), size))
        return [prob for chunk in chunks for prob in self._batch(chunk)]

    @torch.no_grad()
    def _batch(self, cells: Sequence[Cell]) -> list[float]:
        """Row 0 is clean; the samples of cell i are rows 1 + i * samples onwards."""
        model, samples = self.workload.model, self.workload.case.samples
        prompt = torch.tensor([self.workload.prompt], device=self.workload.device)
        rows = prompt.expand(1 + len(cells) * samples, -1)
        with ExitStack() as hooks:
            hooks.enter_context(editing(model.get_input_embeddings(), self._corrupt))
            for module, index in self._writes(cells):
                hooks.enter_context(editing(module, partial(_write_clean, index=index)))
            logits = model(rows, use_cache=False, logits_to_keep=1).logits[1:, -1]
        probs = logits.float().softmax(-1)[:, self.workload.target]
        return probs.view(-1, samples).mean(1).tolist()

    def _corrupt(self, embedded: Tensor) -> Tensor:
        begin, end = self.workload.case.subject
        embedded = embedded.clone()
        subject = embedded[1:, begin:end].unflatten(0, (-1, self.workload.case.samples))
        subject.copy_((subject.double() + self._noise.to(embedded.device)).to(embedded.dtype))
        return embedded

    @cached_property
    def _noise(self) -> Tensor:
        return torch.from_numpy(draw_noise(self.workload.case, self.workload.model.config.hidden_size))

    def _writes(self, cells: Sequence[Cell]) -> Iterator[tuple[nn.Module, tuple[Tensor, Tensor]]]:
        """Each restored module with the (row, position) pairs written to in its output."""
        samples, device = self.workload.case.samples, self.workload.device
        written: dict[nn.Module, list[tuple[int, int]]] = {}
        for number, cell in enumerate(cells):
            rows = range(1 + number * samples, 1 + (number + 1) * samples)
            for module in restored_modules(self.workload, cell):
                written.setdefault(module, []).extend((row, cell.position) for row in rows)
        for module, pairs in written.items():
            rows, positions = torch.tensor(pairs, device=device).unbind(1)
            yield module, (rows, positions)


def _write_clean(hidden: Tensor, index: tuple[Tensor, Tensor]) -> Tensor:
    rows, positions = index
    hidden = hidden.clone()
    hidden[rows, positions] = hidden[0, positions]
    return hidden


PEERS: dict[str, Callable[[Workload], Peer]] = {
    "pyvene": Pyvene,
    "pyvene-grouped": partial(Pyvene, grouped=True),
    "rome": OneCellPerPass,
    "rows": FullRows,
}


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        seconds: median over the rounds of the time for all cells, extrapolated if fewer were measured.
        ratio, ratio_min, ratio_max: that over fasttrace's time in the same round.
        fasttrace_seconds: fasttrace's own median in the rounds with this peer.
        max_relative_difference: between the two tools' probabilities, over the measured cells.
        others: share of the machine's CPU time that other processes took meanwhile.
    """

    tool: str
    seconds: float
    fasttrace_seconds: float
    ratio: float
    ratio_min: float
    ratio_max: float
    max_relative_difference: float
    cells_measured: int
    cells: int
    others: float


def compare(name: str, workload: Workload, trace: Run, result: Any, cells: list[Cell], rounds: int) -> Comparison:
    """Check one peer's cells against fasttrace's grids, then time it and fasttrace in turns."""
    peer, everything = PEERS[name](workload), workload.case.cells()
    measured = cells if peer.cell_by_cell else everything
    difference = relative_difference(peer.probs(measured), grid_values(result, measured))
    check(name, difference, MAX_DIFFERENCE)
    shares = _by_stream(measured)
    runs: dict[str, Run] = {"fasttrace": trace}
    runs |= {stream: partial(peer.probs, some) for stream, some in shares.items()}
    with Section(workload.device) as section:
        seconds = interleave(runs, rounds, workload.device)
    ours, theirs = seconds["fasttrace"], _for_all_cells(workload.case, shares, seconds)
    times = median(theirs), median(ours), *ratios(theirs, ours)
    return Comparison(name, *times, difference, len(measured), len(everything), section.others)


def _by_stream(cells: list[Cell]) -> dict[str, list[Cell]]:
    return {stream: [cell for cell in cells if cell.stream == stream] for stream in STREAMS}


def _for_all_cells(case: Case, shares: dict[str, list[Cell]], seconds: dict[str, list[float]]) -> list[float]:
    """Each round's time for the whole grids, from the time for some cells of each stream."""
    scale = {stream: case.n_layers * case.tokens / len(cells) for stream, cells in shares.items()}
    return [sum(round_) for round_ in zip(*([t * scale[s] for t in seconds[s]] for s in shares), strict=True)]


def print_table(comparisons: list[Comparison]) -> None:
    """The comparisons as a Markdown table; fasttrace's seconds are those of the same rounds."""
    print("| tool | seconds | fasttrace | ratio [min-max] | max rel. difference | cells measured | other load |")
    print("|---|---|---|---|---|---|---|")
    for c in comparisons:
        print(
            f"| {c.tool} | {c.seconds:.2f} | {c.fasttrace_seconds:.3f} "
            f"| {c.ratio:.1f} [{c.ratio_min:.1f}-{c.ratio_max:.1f}] "
            f"| {c.max_relative_difference:.1e} | {c.cells_measured} of {c.cells} | {c.others:.0%} |"
        )


def _float32_cases() -> list[str]:
    return [name for name, case in CASES.items() if case.dtype == torch.float32]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.peers", description="Agreement, then time, then ratio.")
    parser.add_argument("--case", default="gpt2-12", choices=_float32_cases())
    parser.add_argument("--samples", type=int, help="noise samples; default: the case's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", type=int, default=18, help="measured of a tool that works cell by cell")
    parser.add_argument("--full", action="store_true", help="measure all cells of every tool")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--engine", default="wavefront")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.peers = options.peers.split(",")
    if unknown := [name for name in options.peers if name not in PEERS]:
        parser.error(f"unknown peer {unknown[0]!r}; choose from {', '.join(PEERS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print; the last line is JSON."""
    options = parse(arguments)
    case = CASES[options.case].with_samples(options.samples)
    about = card(options.device)
    print_card(about)
    print(case.summary())
    workload = build(case, options.device)
    tracer = fasttrace.Tracer(workload.model)
    trace = partial(tracer.trace, workload.prompt, engine=options.engine, **workload.trace_options())
    result = trace()
    print(f"gate: fasttrace agrees with plain passes to {agree(result, workload):.1e} relative")
    cells = case.cells() if options.full else spread_cells(case, options.cells)
    lines = [compare(name, workload, trace, result, cells, options.rounds) for name in options.peers]
    print_table(lines)
    report = {"card": about, "case": case.name, "samples": case.samples, "peers": [asdict(c) for c in lines]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
