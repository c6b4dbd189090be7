"""Where the time of one run goes, by kind of operation, from torch's profiler."""

from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.timing import Run

# An operation belongs to the first kind with a word that its name contains.
KINDS = {
    "attention": ("scaled_dot_product", "softmax", "bmm", "suffix_attention"),
    "matmul": ("addmm", "::mm", "linear", "matmul"),
    "gather": ("index", "gather", "scatter", "embedding"),
    "copy": ("copy_", "::cat", "clone", "contiguous", "stack"),
    "elementwise": ("add", "sub", "mul", "div", "pow", "sqrt", "neg", "tanh", "gelu", "silu", "norm", "mean"),
}


def time_split(run: Run, vocabulary: int, device: torch.device | str = "cpu") -> dict[str, float]:
    """Seconds of one call of `run` per kind of operation; Python's own time is in none.

    `head` is whatever has the vocabulary as a side, but for look-ups; `other` what torch names otherwise.
    """
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as recorded:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    split: Counter[str] = Counter()
    for event in recorded.key_averages(group_by_input_shape=True):
        split[kind_of(event, vocabulary)] += getattr(event, field) / 1e6
    return dict(split.most_common())


def kind_of(event: Any, vocabulary: int) -> str:
    """The kind of one profiled operation."""
    kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
    sides = {side for shape in event.input_shapes if isinstance(shape, list) for side in shape}
    return "head" if kind != "gather" and vocabulary in sides else kind
