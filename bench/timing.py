"""Clocks, interleaved rounds, peak memory and the ceilings that a number is held against.

A run is any function without arguments. Times are wall seconds: perf_counter on CPU, CUDA events on a GPU.
"""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple, Self

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional

Run = Callable[[], object]

# (tokens, inputs, outputs) of one matmul: the two halves of GPT-2 XL's and GPT-2's MLP, and a large square.
CPU_SHAPES = ((2048, 1600, 6400), (2048, 6400, 1600), (2048, 768, 3072), (2048, 4096, 4096))
CUDA_SHAPES = ((16384, 1600, 6400), (16384, 6400, 1600), (8192, 8192, 8192))
SECONDS_PER_MATMUL = 0.5
SECONDS_PER_CALL = 1.0
PROBE = (128, 1024, 1024)
"""A matmul that tells whether the shapes above take too long in a dtype; fewer tokens are taken then."""

SUSTAINED_SECONDS = {"cpu": 1.5, "cuda": 0.2}
COPY_ELEMENTS = 64 * 2**20


@dataclass(frozen=True)
class Timing:
    """Percentiles of some rounds, in seconds."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Self:
        """The percentiles of a list of seconds; with fewer than five rounds p20 and p80 are interpolated."""
        p20, p50, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
        return cls(p20, p50, p80, len(seconds))

    def __str__(self) -> str:
        return f"{self.p50:.3f} s [{self.p20:.3f}-{self.p80:.3f}]"


@dataclass(frozen=True)
class Ceiling:
    """The fastest matmul found for one dtype: what a perfect engine could reach on this machine, now.

    Attributes:
        gflops: the highest rate of a single call, in 1e9 floating-point operations per second.
        path: the library call that reached it.
        shape: tokens x inputs x outputs at which it did.
        paths: each call's own highest rate.
    """

    gflops: float
    path: str
    shape: tuple[int, int, int]
    paths: dict[str, float]

    def __str__(self) -> str:
        paths = ", ".join(f"{path} {rate:.0f}" for path, rate in self.paths.items())
        return f"{self.gflops:.0f} GFLOP/s: {self.path} at {'x'.join(map(str, self.shape))} ({paths})"


def seconds_of(run: Run, device: torch.device | str = "cpu") -> float:
    """Wall seconds of one call of `run`; on a GPU the call is waited for."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def measure(run: Run, rounds: int = 5, warmup: int = 1, device: torch.device | str = "cpu") -> Timing:
    """Time `rounds` calls of `run` after `warmup` calls that are thrown away."""
    for _ in range(warmup):
        run()
    return Timing.of([seconds_of(run, device) for _ in range(rounds)])


def default_device() -> str:
    """The first GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def interleave(runs: Mapping[str, Run], rounds: int, device: torch.device | str = "cpu") -> dict[str, list[float]]:
    """Seconds of each run in each round, in the order A B A B: a slow minute then hits both, not one."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run, device))
    return seconds


@dataclass
class Section(AbstractContextManager["Section"]):
    """Watches a section of a benchmark; the attributes are known when it has ended.

    Attributes:
        peak: highest memory in bytes, weights and imports included: resident on a CPU, allocated on a GPU.
        exact: False where the system does not let a process reset its peak: then `peak` covers all its life.
        others: share of the machine's CPU time that other processes took; a time is as good as this is low.
    """

    device: torch.device | str = "cpu"
    peak: int = field(default=0, init=False)
    exact: bool = field(default=True, init=False)
    others: float = field(default=0.0, init=False)
    _before: "_CpuTime | None" = field(default=None, init=False, repr=False)

    def __enter__(self) -> Self:
        self._before = _CpuTime.now()
        if torch.device(self.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.exact = _reset_peak_rss()
        return self

    def __exit__(self, *exception: object) -> None:
        self.others = _CpuTime.now().others_since(self._before or _CpuTime.now())
        if torch.device(self.device).type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = _peak_rss()


class _CpuTime(NamedTuple):
    """Seconds since the machine started, summed over its cores."""

    whole: float
    idle: float
    own: float

    @classmethod
    def now(cls) -> Self:
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        return cls(sum(machine), idle, own.user + own.system)

    def others_since(self, before: Self) -> float:
        whole, idle, own = (now - then for now, then in zip(self, before, strict=True))
        return max(0.0, whole - idle - own) / whole if whole else 0.0


def _reset_peak_rss() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_rss() -> int:
    """The highest resident memory since the last reset, or since the process began."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)


def matmul_ceiling(dtype: torch.dtype, device: torch.device | str = "cpu") -> Ceiling:
    """The fastest of torch's matmul paths over a few shapes that a trace meets, measured in some seconds."""
    shapes = CUDA_SHAPES if torch.device(device).type == "cuda" else _affordable(CPU_SHAPES, dtype)
    rates = {(path, shape): rate for shape in shapes for path, rate in _rates(shape, dtype, device).items()}
    path, shape = max(rates, key=lambda key: rates[key])
    paths = {name: max(rate for (other, _), rate in rates.items() if other == name) for name, _ in rates}
    return Ceiling(rates[path, shape], path, shape, paths)


def _affordable(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> list[tuple[int, int, int]]:
    """The shapes with so few tokens that a call takes SECONDS_PER_CALL at most, or little more."""
    allowed = 1e9 * SECONDS_PER_CALL * max(_rates(PROBE, dtype, "cpu").values())
    return [(max(PROBE[0], min(m, int(allowed / (2 * k * n)))), k, n) for m, k, n in shapes]


def sustained_rate(ceiling: Ceiling, dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """The rate of the ceiling's matmul kept up for SUSTAINED_SECONDS of the device, in 1e9 operations per second.

    Shared and virtual machines change speed from minute to minute: run beside each round of a benchmark, it says
    how fast the machine was then.
    """
    tokens, inputs, outputs = ceiling.shape
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    run = _matmuls(x, torch.randn(outputs, inputs, dtype=dtype, device=device))[ceiling.path]
    run()
    seconds = [seconds_of(run, device)]
    while sum(seconds) < SUSTAINED_SECONDS[torch.device(device).type]:
        seconds.append(seconds_of(run, device))
    return 2e-9 * tokens * inputs * outputs * len(seconds) / sum(seconds)


def _rates(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> dict[str, float]:
    """Each path's rate at one shape, in 1e9 operations per second."""
    tokens, inputs, outputs = shape
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    work = 2e-9 * tokens * inputs * outputs
    return {name: work / _fastest(run, device) for name, run in _matmuls(x, weight).items()}


def _matmuls(x: Tensor, weight: Tensor) -> dict[str, Run]:
    """The calls that can multiply x [tokens, inputs] by weight [outputs, inputs], by name."""
    bias, transposed = weight.new_zeros(len(weight)), weight.t().contiguous()
    output = x.new_empty(len(x), len(weight))  # so that one path pays for no fresh memory
    runs: dict[str, Run] = {
        "linear": lambda: functional.linear(x, weight, bias),
        "addmm": lambda: torch.addmm(bias, x, transposed, out=output),
    }
    # On a CPU the two above take MKL in float32; whether oneDNN is faster depends on the CPU's maker.
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        runs["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return runs


def _fastest(run: Run, device: torch.device | str) -> float:
    """Shortest of a few calls, two at least: the first one warms up."""
    seconds = [seconds_of(run, device)]
    while len(seconds) < 2 or (sum(seconds) < SECONDS_PER_MATMUL and len(seconds) < 10):
        seconds.append(seconds_of(run, device))
    return min(seconds)


def copy_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes read plus bytes written per second, in 1e9, of a copy too large for any cache."""
    source = torch.ones(COPY_ELEMENTS, device=device)
    target = torch.empty_like(source)
    seconds = [seconds_of(lambda: target.copy_(source), device) for _ in range(5)]
    return 2e-9 * source.nbytes / min(seconds)


def ratios(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of the quotients of each round."""
    quotients = [above / below for above, below in zip(numerator, denominator, strict=True)]
    return median(quotients), min(quotients), max(quotients)
