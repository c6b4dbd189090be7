"""What the host does for a pass, in CPU seconds: Python beside the plain forward's, and the planner's work.

    python -m bench.host

The first table is of a model so narrow that arithmetic is little; what there is of it is in the plain forward of as
many tokens too. The pass is the one a GPU gets: the attention kernel is a stand-in that returns memory, and modules
compute as they are. Rounds take turns. A second trace of a known shape is meant: plans and packs are kept. The second
table is of plans, packs, tables and layouts that nothing has been kept of. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers.activations import NewGELUActivation

import fasttrace
from bench.card import card, print_card
from bench.cases import CASES, STREAMS, WINDOW, build_model
from bench.report import new_report, path_of, write
from fasttrace import memories
from fasttrace.engines import readout, wavefront
from fasttrace.engines.blocks import LastBlock
from fasttrace.experiment.cells import grid_cells, windows_of
from fasttrace.fusing import attention, choose
from fasttrace.models.hooks import replaced_forward
from fasttrace.planning.edits import Shape
from fasttrace.planning.on_device import tables_of
from fasttrace.planning.packs import pack_of
from fasttrace.planning.plan import plan_cells

BLOCKS, D_MODEL, PROMPT = 48, 16, [5, 6, 7]
PLAIN, AS_MANY = "plain forward", "plain forward of as many tokens"
TILE = 64
"""Tokens of a tile of the attention kernel in half precision."""

PACKS = (
    ("GPT-2 XL, one prompt", 48, 1, 1, (7, 7)),
    ("GPT-2 XL, one prompt, ten samples", 48, 1, 10, (7, 7)),
    ("GPT-2 XL, 8 prompts, ten samples", 48, 8, 10, (5, 14)),
    ("GPT-2 XL, 32 prompts", 48, 32, 1, (5, 14)),
)
"""(name, blocks, prompts, samples, tokens of the shortest and the longest prompt)."""


@dataclass(frozen=True)
class Host:
    """CPU time of one thing.

    Attributes:
        seconds: median over rounds.
        over_plain: that over the plain forward's.
    """

    name: str
    seconds: float
    over_plain: float


@dataclass(frozen=True)
class Planned:
    """CPU seconds of all that is made before a pass, by part."""

    name: str
    token_blocks: int
    plan: float
    pack: float
    tables: float
    layouts: float

    @property
    def per_million(self) -> float:
        """CPU seconds for a million token-blocks."""
        return 1e6 * (self.plan + self.pack + self.tables + self.layouts) / self.token_blocks


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """While open, passes on a CPU do what they would do on a GPU, but for the kernels."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(choose, "_fuse_on_cpu", lambda *_: None))
        stack.enter_context(patch.object(choose, "kernel_compiler", lambda _: "triton"))
        stack.enter_context(patch.object(attention, "suffix_attention", _memory))
        stack.enter_context(patch.object(readout, "CPU_CHUNK", readout.CHUNK_BYTES))
        yield


def _memory(q: Tensor, _k: Tensor, v: Tensor, _layout: Any, **_: Any) -> Tensor:
    return q.new_zeros((*q.shape[:2], v.shape[2]))


def host_times(n_blocks: int, rounds: int) -> list[Host]:
    """Of a narrow GPT-2."""
    sizes = {"n_layer": n_blocks, "n_embd": D_MODEL, "n_head": 1, "vocab_size": 101}
    case = replace(CASES["gpt2-xl"], config=CASES["gpt2-xl"].config | sizes, weight_std=0.2, fits=False)
    model = build_model(case)
    tracer = fasttrace.Tracer(model)
    options = {"subject": (0, 1), "target": 5, "streams": STREAMS, "window": WINDOW, "noise": 0.5, "samples": 1}

    def plain(rows: int) -> None:
        ids = torch.tensor([PROMPT] * rows)
        with ExitStack() as stack, torch.no_grad():
            for module in gelus:
                stack.enter_context(replaced_forward(module, choose.gelu_tanh))
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def trace() -> None:
        tracer.trace(PROMPT, **options, engine="wavefront")

    shape = Shape(n_blocks, len(PROMPT), options["subject"], options["samples"])
    widths = windows_of(STREAMS, WINDOW).items()
    cells = tuple(cell for s, width in widths for cell in grid_cells(s, width, n_blocks, len(PROMPT)))
    as_many = round(plan_cells(shape, cells).n_tokens.mean() / len(PROMPT))
    gelus = [module for module in model.modules() if isinstance(module, NewGELUActivation)]
    trace()  # the self-check, with what really computes
    seconds: dict[str, list[float]] = {PLAIN: [], AS_MANY: [], "pass up to the readout": [], "pass": [], "trace": []}
    with as_on_a_gpu(), patch.object(wavefront, "_run", _timed(wavefront._run, seconds["pass"])):
        begin: list[float] = []
        scores = LastBlock.scores

        def read_out(self: LastBlock, *args: Any) -> Any:
            seconds["pass up to the readout"].append(time.process_time() - begin.pop())
            return scores(self, *args)

        run = wavefront._run

        def begun(*args: Any) -> Any:
            begin[:] = [time.process_time()]
            return run(*args)

        with patch.object(LastBlock, "scores", read_out), patch.object(wavefront, "_run", begun), _no_check(tracer):
            for _ in range(2):
                trace()
            for found in seconds.values():
                found.clear()
            for _ in range(rounds):
                _timed(plain, seconds[PLAIN])(2)
                _timed(plain, seconds[AS_MANY])(as_many)
                _timed(trace, seconds["trace"])()
    base = median(seconds[PLAIN])
    return [Host(name, median(found), median(found) / base) for name, found in seconds.items()]


@contextmanager
def _no_check(tracer: fasttrace.Tracer) -> Iterator[None]:
    """While open, the engine is the one that was chosen: it would not stand a check of its stand-in."""
    choice = tracer.choose_engine("wavefront")
    with patch("fasttrace.api.choose", lambda *_, **__: choice):
        yield


def _timed(work: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        begin = time.process_time()
        try:
            return work(*args)
        finally:
            into.append(time.process_time() - begin)

    return run


def planned(name: str, n_layers: int, prompts: int, samples: int, lengths: tuple[int, int]) -> Planned:
    """Plans a pack of prompts of random lengths."""
    random, shapes = np.random.RandomState(0), []
    for _ in range(prompts):
        length = int(random.randint(lengths[0], lengths[1] + 1))
        begin = int(random.randint(0, length - 2))
        shapes.append(Shape(n_layers, length, (begin, begin + 2), samples))
    widths = windows_of(STREAMS, WINDOW).items()
    cells = {
        t: [c for s, w in widths for c in grid_cells(s, w, n_layers, t)]
        for t in {shape.n_positions for shape in shapes}
    }
    memories.clear("plans", "packs")
    plan, plans = _seconds(lambda: [plan_cells(shape, tuple(cells[shape.n_positions])) for shape in shapes])
    pack, packed = _seconds(lambda: pack_of(plans))
    tables, _ = _seconds(lambda: tables_of(packed, torch.device("cpu")))
    born = [block for number, block in enumerate(packed.blocks) if number == 0 or block.source is not None]
    layouts, _ = _seconds(lambda: [attention.layout_of(block, TILE) for block in born])
    return Planned(name, sum(block.n_tokens for block in packed.blocks), plan, pack, tables, layouts)


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.host", description="CPU time of the host's part.")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the narrow model; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--packs", type=int, default=len(PACKS), help="of the planner's table; default: all")
    parser.add_argument("--out", type=Path, help="file for the report; default: one under bench/results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print; the last line is JSON."""
    options = parse(arguments)
    torch.set_num_threads(1)
    about = card("cpu")
    report = new_report("host", about)
    print_card(about)
    print(f"\n| GPT-2, {options.blocks} blocks of width {D_MODEL} | CPU ms | over the plain forward |\n|---|---|---|")
    hosts = host_times(options.blocks, options.rounds)
    for found in hosts:
        print(f"| {found.name} | {1e3 * found.seconds:.1f} | {found.over_plain:.2f} |", flush=True)
    print("\n| pack | million token-blocks | plan s | pack s | tables s | layouts s | s a million |")
    print("|---|---|---|---|---|---|---|")
    plans = []
    for pack in PACKS[: options.packs]:
        plans.append(each := planned(*pack))
        parts = " | ".join(f"{part:.2f}" for part in (each.plan, each.pack, each.tables, each.layouts))
        print(f"| {each.name} | {each.token_blocks / 1e6:.2f} | {parts} | {each.per_million:.2f} |", flush=True)
    report |= {"host": [asdict(found) for found in hosts]}
    report |= {"planner": [asdict(each) | {"per_million": each.per_million} for each in plans]}
    write(report, options.out or path_of(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
