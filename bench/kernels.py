"""The kernels on their own, at the sizes that traces of known models have: right first, then how near to the limit.

    PYTHONPATH=kernels python -m bench.kernels --dtypes float16,bfloat16

The limit of an operation is the larger of two times: the fewest bytes it can move over the bandwidth of a copy, and its
operations over the rate of the fastest matmul, both measured in the same run. Each backend is compared with float64
first; one that is wrong is told and not timed. Times are of calls whose inputs are not in the cache. On a CPU there is
no Triton, and the smallest sizes serve to check this module. The last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fasttrace_kernels.launch import Backend
from torch import Tensor

from bench.card import card, print_card
from bench.cases import DTYPES, STREAMS, WINDOW
from bench.report import new_report, path_of, write
from bench.timing import Timing, copy_bandwidth, default_device, matmul_ceiling, measure
from fasttrace.experiment.cells import grid_cells, windows_of
from fasttrace.planning.edits import Shape
from fasttrace.planning.plan import plan_cells

ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest norm of the error over the norm of the float64 result."""

SAMPLE = 64
"""Rows that are compared with float64."""


@dataclass(frozen=True)
class Heads:
    """Attention of one model."""

    query: int
    kv: int
    d_head: int


@dataclass(frozen=True)
class Attention:
    """The pack of one trace, and the heads that attend over it."""

    name: str
    heads: Heads
    n_layers: int
    n_positions: int
    span: tuple[int, int]
    samples: int = 1


TINY = Attention("tiny", Heads(4, 2, 16), 12, 7, (0, 4))
PACKS = (
    Attention("gpt2-xl T=7", Heads(25, 25, 64), 48, 7, (0, 4)),
    Attention("gpt2-xl T=7 N=10", Heads(25, 25, 64), 48, 7, (0, 4), samples=10),
    Attention("llama3-8b T=20", Heads(32, 8, 128), 32, 20, (4, 8)),
    Attention("gemma2-2b T=40", Heads(8, 4, 256), 26, 40, (8, 12)),
    Attention("gpt2 T=200", Heads(12, 12, 64), 12, 200, (40, 46)),
)
TOKENS = 4046
"""Of the pack that norms and products are measured on: GPT-2 XL's figure has about as many in its later blocks."""

WIDTHS = ((576, 1536, 9, 3, 64), (4096, 14336, 32, 8, 128))
"""(d_model, MLP, heads, kv heads, d_head) of SmolLM2 and Llama 3 8B."""


@dataclass(frozen=True)
class Task:
    """One operation on one set of inputs.

    Attributes:
        runs: by backend; each returns what `error` looks at.
        error: norm of the error over the norm of the truth, on a sample.
        moved: bytes of all inputs and outputs, once each.
        flops: operations.
    """

    name: str
    size: str
    runs: Mapping[str, Callable[[], Tensor]]
    error: Callable[[Tensor], float]
    moved: int
    flops: int


@dataclass(frozen=True)
class Timed:
    """One backend of one task.

    Attributes:
        limit: seconds that the task takes at the measured ceilings.
        bound: which of the two it is: "bytes" or "operations".
        share: limit over the median time.
    """

    task: str
    size: str
    dtype: str
    backend: str
    error: float
    timing: Timing
    limit: float
    bound: str
    share: float


def tasks(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Task]:
    """All operations; the backends are those that the device has."""
    backends: Sequence[Backend] = ("triton", "torch") if torch.device(device).type == "cuda" else ("torch",)
    make = partial(random, dtype=dtype, device=device)
    for pack in (TINY,) if quick else PACKS:
        yield attention(pack, make, backends)
    tokens = 64 if quick else TOKENS
    for d_model, mlp, n_heads, n_kv, d_head in WIDTHS[:1] if quick else WIDTHS:
        yield norm(tokens, d_model, make, backends)
        yield gated(tokens, mlp, make, backends)
        yield rotation(tokens, Heads(n_heads, n_kv, d_head), make, backends)
    yield growth(tokens, 64 if quick else 1600, make)


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Numbers around 0, never zeros: a multiplication by zeros is faster."""
    return torch.randn(shape, dtype=dtype, device=device)


def attention(pack: Attention, make: Callable[..., Tensor], backends: Sequence[Backend]) -> Task:
    """Attention over the largest pack of a trace, in one call."""
    from fasttrace_kernels import reference
    from fasttrace_kernels.suffix_attention import suffix_attention, tile_tokens

    from fasttrace.fusing.attention import layout_of

    shape = Shape(pack.n_layers, pack.n_positions, pack.span, pack.samples)
    widths = windows_of(STREAMS, WINDOW).items()
    cells = [cell for s, width in widths for cell in grid_cells(s, width, pack.n_layers, pack.n_positions)]
    block = max(plan_cells(shape, tuple(cells)).blocks, key=lambda block: block.n_tokens)
    heads = pack.heads
    sizes = heads.query * heads.d_head, heads.kv * heads.d_head, heads.kv * heads.d_head
    projected = make(block.n_tokens, sum(sizes)).split(sizes, dim=1)  # with the strides that models give them
    q, k, v = (x.unflatten(1, (-1, heads.d_head)) for x in projected)
    tile = tile_tokens(q.dtype, heads.d_head, heads.query // heads.kv, pack.n_positions)
    layout = layout_of(block, tile).to(q.device)
    _, length, first, _ = layout.rows
    pairs = int((length * first + length * (length + 1) // 2).sum())
    few = replace(layout, rows=layout.rows[:, :: max(1, layout.rows.shape[1] // SAMPLE)])
    truth = reference.suffix_attention(q, k, v, few)
    asked = truth.isfinite()
    runs = {name: partial(suffix_attention, q, k, v, layout, backend=name) for name in backends}
    return Task(
        "suffix_attention",
        f"{pack.name}: {block.n_tokens} tokens, {heads.query} to {heads.kv} heads of {heads.d_head}",
        runs,
        lambda out: relative_error(out[asked], truth[asked]),
        moved=q.element_size() * (2 * q.numel() + k.numel() + v.numel()),
        flops=4 * pairs * heads.query * heads.d_head,
    )


def norm(tokens: int, d_model: int, make: Callable[..., Tensor], backends: Sequence[Backend]) -> Task:
    """RMS norm."""
    from fasttrace_kernels import reference
    from fasttrace_kernels.rms_norm import rms_norm

    x, weight = make(tokens, d_model), make(d_model)
    runs = {name: partial(rms_norm, x, weight, 1e-6, backend=name) for name in backends}
    truth = reference.rms_norm(x[:SAMPLE], weight, 1e-6)
    return _tokenwise("rms_norm", f"{tokens} x {d_model}", runs, truth, 2 * x.nbytes, 4 * x.numel())


def gated(tokens: int, width: int, make: Callable[..., Tensor], backends: Sequence[Backend]) -> Task:
    """Activation of the gate times up."""
    from fasttrace_kernels import reference
    from fasttrace_kernels.swiglu import swiglu

    gate, up = make(tokens, width), make(tokens, width)
    runs = {name: partial(swiglu, gate, up, backend=name) for name in backends}
    truth = reference.swiglu(gate[:SAMPLE], up[:SAMPLE])
    return _tokenwise("swiglu", f"{tokens} x {width}", runs, truth, 3 * gate.nbytes, 5 * gate.numel())


def rotation(tokens: int, heads: Heads, make: Callable[..., Tensor], backends: Sequence[Backend]) -> Task:
    """Rotary embedding of queries and keys."""
    from fasttrace_kernels import reference
    from fasttrace_kernels.rotary import rotary

    fused = make(1, tokens, heads.query + heads.kv, heads.d_head).transpose(1, 2)
    q, k = fused[:, : heads.query], fused[:, heads.query :]
    cos, sin = make(1, tokens, heads.d_head), make(1, tokens, heads.d_head)
    runs = {name: partial(_rotated_queries, rotary, q, k, cos, sin, name) for name in backends}
    truth, _ = reference.rotary(q[:, :, :SAMPLE], k[:, :, :SAMPLE], cos[:, :SAMPLE], sin[:, :SAMPLE])
    size = f"{tokens} tokens, {heads.query} and {heads.kv} heads of {heads.d_head}"
    error = lambda out: relative_error(out[:, :, :SAMPLE], truth)  # noqa: E731
    return Task("rotary", size, runs, error, 2 * fused.nbytes + 2 * cos.nbytes, 3 * fused.numel())


def _rotated_queries(rotary: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: Backend) -> Tensor:
    return rotary(q, k, cos, sin, backend=backend)[0]


def growth(tokens: int, d_model: int, make: Callable[..., Tensor]) -> Task:
    """The pack's growth from block to block, one gather of whole tokens, half of them twice."""
    x = make(tokens, d_model)
    index = torch.arange(tokens, device=x.device) * 3 // 4
    moved = 2 * x.nbytes + index.nbytes
    return _tokenwise("index_select", f"{tokens} x {d_model}", {"torch": lambda: x[index]}, x[index[:SAMPLE]], moved, 0)


def _tokenwise(
    name: str, size: str, runs: Mapping[str, Callable[[], Tensor]], truth: Tensor, moved: int, flops: int
) -> Task:
    """A task whose truth is of the first rows."""
    return Task(name, size, runs, lambda out: relative_error(out[:SAMPLE], truth), moved, flops)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth; infinite where something is not finite."""
    found, truth = found.double(), truth.double()
    error = ((found - truth).norm() / truth.norm()).item()
    return error if error == error else float("inf")


def time_task(task: Task, dtype: torch.dtype, bandwidth: float, gflops: float, device: str) -> Iterator[Timed | str]:
    """Each backend's time, or why there is none."""
    by_bytes, by_work = task.moved / (1e9 * bandwidth), task.flops / (1e9 * gflops)
    limit, bound = max((by_bytes, "bytes"), (by_work, "operations"))
    for backend, run in task.runs.items():
        where = f"{task.name} {backend} {str(dtype).removeprefix('torch.')} ({task.size})"
        try:
            error = task.error(run())
        except Exception as problem:  # one backend that does not run on this machine is no reason to stop
            yield f"{where} does not run: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
            continue
        if not error <= ALLOWED[dtype]:
            yield f"{where} is wrong: error {error:.1e}, allowed {ALLOWED[dtype]:.0e}; not timed"
            continue
        timing = cold_timing(run, device)
        name = str(dtype).removeprefix("torch.")
        yield Timed(task.name, task.size, name, backend, error, timing, limit, bound, limit / timing.p50)


def cold_timing(run: Callable[[], object], device: str) -> Timing:
    """Of calls that find none of their inputs in the cache (on a GPU)."""
    if torch.device(device).type != "cuda":
        return measure(run, 3)
    from triton.testing import do_bench

    percentiles: Any = do_bench(run, warmup=10, rep=60, quantiles=[0.2, 0.5, 0.8])
    p20, p50, p80 = percentiles
    return Timing(p20 / 1e3, p50 / 1e3, p80 / 1e3, 0)


def print_timed(found: Timed) -> None:
    """One line of the table."""
    t = found.timing
    print(
        f"| {found.task} | {found.size} | {found.dtype} | {found.backend} | {found.error:.0e} | {1e6 * t.p50:.1f} "
        f"[{1e6 * t.p20:.1f}-{1e6 * t.p80:.1f}] | {1e6 * found.limit:.1f} ({found.bound}) | {found.share:.2f} |",
        flush=True,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench.kernels", description="Each operation against its limit.")
    parser.add_argument("--dtypes", default="float16,bfloat16", help=f"some of {','.join(DTYPES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="file for the report; default: one under bench/results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print; the last line is JSON.

    The exit code is 1 if a result was wrong or a backend of ours did not run.
    """
    options = parse(arguments)
    about = card(options.device)
    report = new_report("kernels", about) | {"kernels": [], "problems": []}
    print_card(about)
    bandwidth = copy_bandwidth(options.device)
    print(f"copy: {bandwidth:.1f} GB/s, read and written")
    for name in options.dtypes.split(","):
        dtype = DTYPES[name]
        ceiling = matmul_ceiling(dtype, options.device)
        print(f"matmul in {name}: {ceiling}\n")
        print("| operation | size | dtype | backend | error | us p50 [p20-p80] | limit us | share |")
        print("|---|---|---|---|---|---|---|---|")
        for task in tasks(dtype, options.device, options.quick):
            for found in time_task(task, dtype, bandwidth, ceiling.gflops, options.device):
                if isinstance(found, Timed):
                    print_timed(found)
                    report["kernels"].append(asdict(found))
                else:
                    print(found)
                    report["problems"].append(found)
            write(report, options.out or path_of(report))
    print(json.dumps(report))
    sys.exit(bool(report["problems"]))


if __name__ == "__main__":
    main()
