"""Where the time of one run goes, by kind of operation, and where it waits, from torch's profiler.

The profiler's trace is read event by event. An operation, or a GPU kernel by the place it was launched from, belongs to
the innermost thing around it that says a kind: a range that `marked` opens, or the name of an operation.
"""

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.timing import Run
from fasttrace.engines.attention_ragged import NAME as PACKED_ATTENTION
from fasttrace.engines.blocks import LastBlock
from fasttrace.models.anatomy import anatomy_of

CALL, FIRST_BLOCK, ATTENTION, HEAD, READOUT = (
    f"bench::{name}" for name in ("call", "first_block", "attention", "head", "readout")
)
"""Ranges in the trace; FIRST_BLOCK is a point."""

RANGES = {ATTENTION: "attention", HEAD: "head", READOUT: "head"}

KINDS = {
    "matmul": ("addmm", "::mm", "::bmm", "::linear", "_linear_pointwise", "matmul", "gemm"),
    "attention": ("scaled_dot_product", "softmax", "suffix_attention", "flash", "fmha"),
    "restore": ("index_select", "index_copy", "index_put", "::index", "::gather", "::scatter"),
    "glue": ("embedding",),
}
"""An operation belongs to the first kind with a word that its name contains, or else to the operation around it.

`restore` is growing the pack and writing clean values into it; `glue` is all else that computes or copies.
"""

HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")

WAITS = ("Synchronize", "cudaMemcpy")
"""Calls of CUDA that return when the GPU is done. Copies to the host are counted beside them."""


@dataclass(frozen=True)
class Split:
    """What the profiler saw of one call.

    Attributes:
        wall: seconds of the call, the profiler's own cost included.
        seconds: by kind. On a GPU `idle` is the time in which it does nothing; on a CPU `python` is the time between
            operations.
        launches: kernels and copies that the GPU ran; None on a CPU.
        waits: calls that wait for the GPU, between the first block's start and the readout, summed over the passes;
            None on a CPU, which has none.
    """

    wall: float
    seconds: dict[str, float]
    launches: int | None
    waits: dict[str, int] | None


@dataclass(frozen=True)
class Event:
    """Something on the host with what is around it."""

    name: str
    category: str
    start: float
    length: float
    path: tuple[str, ...]
    own: float
    correlation: Any


def time_split(run: Run, model: PreTrainedModel, device: torch.device | str = "cpu") -> Split:
    """Profiles one call of `run`, which traces on `model`."""
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with marked(model), profile(activities=activities) as recorded, record_function(CALL):
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return split_of(events, on_gpu)


@contextmanager
def marked(model: PreTrainedModel) -> Iterator[None]:
    """While open, ranges tell the profiler where the first block, attention, head and readout are."""
    head: Any = model.get_output_embeddings()
    attend, scores = ALL_ATTENTION_FUNCTIONS[PACKED_ATTENTION], LastBlock.scores
    with ExitStack() as stack:
        anatomy = anatomy_of(model)
        stack.callback(anatomy.blocks[0].register_forward_pre_hook(_point).remove)
        stack.enter_context(_range_around(head))
        stack.callback(AttentionInterface.register, PACKED_ATTENTION, attend)
        AttentionInterface.register(PACKED_ATTENTION, _in_range(ATTENTION, attend))
        stack.callback(setattr, LastBlock, "scores", scores)
        LastBlock.scores = _in_range(READOUT, scores)
        yield


def _point(*_: Any) -> None:
    with record_function(FIRST_BLOCK):
        pass


@contextmanager
def _range_around(module: nn.Module) -> Iterator[None]:
    """By hooks: a module with a forward of its own would be computed by other means than unmarked."""
    running = record_function(HEAD)
    entered = module.register_forward_pre_hook(lambda *_: running.__enter__() and None)
    left = module.register_forward_hook(lambda *_: running.__exit__(None, None, None))
    with entered, left:
        yield


def _in_range(name: str, function: Any) -> Any:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return recorded


def split_of(trace: Sequence[Mapping[str, Any]], on_gpu: bool) -> Split:
    """Reads the events of a trace in Chrome's format."""
    complete = [event for event in trace if event.get("ph") == "X"]
    host = list(chain.from_iterable(_threads(complete)))
    call = next(event for event in host if event.name == CALL)
    inside = [event for event in host if call.start <= event.start <= call.start + call.length]
    if not on_gpu:
        # What attention does between torch's operations is work too: it may be compiled by something else.
        work = [event for event in inside if event.category == "cpu_op" or event.name == ATTENTION]
        seconds = _by_kind((event.path, event.own) for event in work)
        wall, busy = call.length / 1e6, sum(seconds.values())
        return Split(wall, seconds | {"python": max(0.0, wall - busy)}, None, None)
    launched = {event.correlation: event for event in inside if event.correlation is not None}
    work = [event for event in complete if event.get("cat") in DEVICE and _correlation(event) in launched]
    paths = ((event["name"], *launched[_correlation(event)].path) for event in work)
    seconds = _by_kind(zip(paths, (event["dur"] for event in work), strict=True))
    seconds["idle"] = max(0.0, call.length / 1e6 - _busy(work))
    waits = _waits(inside, {_correlation(event): event["name"] for event in work})
    return Split(call.length / 1e6, seconds, len(work), waits)


def _by_kind(lengths: Iterable[tuple[Sequence[str], float]]) -> dict[str, float]:
    """Seconds by kind, the most first."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for path, microseconds in lengths:
        seconds[kind_of(path)] += microseconds / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def kind_of(path: Sequence[str]) -> str:
    """The kind of an operation.

    Args:
        path: names from the outermost range to the operation; a kernel's own name may come first, and counts least.
    """
    for name in reversed(path):
        if name in RANGES:
            return RANGES[name]
    for name in reversed(path):
        for kind, words in KINDS.items():
            if any(word in name for word in words):
                return kind
    return "glue"


def _threads(events: Sequence[Mapping[str, Any]]) -> Iterator[list[Event]]:
    """The host's events of each thread, each with the names around it and the time that is its own."""
    by_thread: dict[Any, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") in HOST:
            by_thread.setdefault((event["pid"], event["tid"]), []).append(event)
    for found in by_thread.values():
        yield _nested(sorted(found, key=lambda event: (event["ts"], -event["dur"])))


def _nested(ordered: Sequence[Mapping[str, Any]]) -> list[Event]:
    paths: list[tuple[str, ...]] = []
    own = [event["dur"] for event in ordered]
    open_events: list[int] = []
    for number, event in enumerate(ordered):
        while open_events and event["ts"] >= _end(ordered[open_events[-1]]):
            open_events.pop()
        around = paths[open_events[-1]] if open_events else ()
        if open_events:
            own[open_events[-1]] -= event["dur"]
        paths.append((*around, event["name"]))
        open_events.append(number)
    return [
        Event(event["name"], event["cat"], event["ts"], event["dur"], path, max(0.0, mine), _correlation(event))
        for event, path, mine in zip(ordered, paths, own, strict=True)
    ]


def _end(event: Mapping[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _correlation(event: Mapping[str, Any]) -> Any:
    """The number that a call of CUDA shares with what it started on the GPU."""
    return event.get("args", {}).get("correlation") if event.get("cat") in (*HOST[2:], *DEVICE) else None


def _busy(work: Sequence[Mapping[str, Any]]) -> float:
    """Seconds in which at least one of the events runs."""
    busy, until = 0.0, float("-inf")
    for event in sorted(work, key=lambda event: event["ts"]):
        busy += max(0.0, _end(event) - max(event["ts"], until))
        until = max(until, _end(event))
    return busy / 1e6


def _waits(host: Sequence[Event], started: Mapping[Any, str]) -> dict[str, int]:
    """Calls that wait, and copies to the host, inside of the passes' blocks."""
    # The readout calls the model too, on states that are there already.
    marks = [mark for mark in host if mark.name in (FIRST_BLOCK, READOUT) and READOUT not in mark.path[:-1]]
    marks.sort(key=lambda mark: mark.start)
    starts, found = [mark.start for mark in marks], Counter[str]()
    for event in host:
        before = bisect_right(starts, event.start)
        if event.category in HOST[2:] and before and marks[before - 1].name == FIRST_BLOCK:
            copy = started.get(event.correlation, "")
            if any(word in event.name for word in WAITS) and not event.name.endswith("Async"):
                found[event.name] += 1
            if "DtoH" in copy:
                found["copies to the host"] += 1
            if "HtoD" in copy and "Pageable" in copy:
                found["copies from pageable memory"] += 1
    return dict(found)
