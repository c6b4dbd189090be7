"""Whether a kernel computes in place of a model's own code: where it gives the same numbers and is clearly faster here.

Which of the two is faster depends on the device and on the sizes, so it is measured, once per process for each kind of
kernel and size; the processes of one run then settle on one choice, so that their numbers are the same. A kernel that
fails while it is tried is left out. Kernels are ours on a GPU, and oneDNN's matrix products on a CPU.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrace.checks import is_out_of_memory
from fasttrace.errors import kind_and_line
from fasttrace.memories import by_case, remembered

logger = logging.getLogger("fasttrace")

TOKENS = 4096
"""Tokens of the random input that kernels are measured on."""

ROUNDS, REPEATS = 5, 10
CLEARLY = 1.05
"""A kernel is taken where it is that many times as fast."""


class Case(NamedTuple):
    """What a measurement holds for.

    Attributes:
        kind: which kernel.
        sizes: what its time depends on.
        dtype: its inputs'.
        device: the name of the card, or the type of the device.
    """

    kind: str
    sizes: tuple[Any, ...]
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.sizes))} {str(self.dtype)[6:]}"


Choices = Mapping[Case, bool]
"""Whether the kernel is taken."""

_CHOSEN: dict[Case, bool] = by_case()


def case_of(kind: str, sizes: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """The case of a kernel on a device; cards of one name share it."""
    return Case(kind, sizes, dtype, _name_of(device))


@remembered()
def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def random(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers with the dtype and on the device of a tensor, drawn there."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def is_taken(case: Case, measure: Callable[[], float]) -> bool:
    """Whether the kernel is taken for a case, which is found out once a process.

    Args:
        case: what is asked for.
        measure: how many times as fast as the model's own code it is; see `gain_of`.
    """
    if case not in _CHOSEN:
        gain = attempt(str(case), measure)
        taken = _CHOSEN.setdefault(case, gain is not None and gain > CLEARLY)  # another thread's may have come first
        if gain is not None:
            verdict = "taken" if taken else "left out"
            logger.info("kernel %s is %.2f times as fast as the model's own code: %s", case, gain, verdict)
    return _CHOSEN[case]


def has_failed(case: Case) -> bool:
    """Whether a kernel that was taken has failed since."""
    return _CHOSEN.get(case) is False


def leave_out(case: Case, error: Exception, instead: str = "the model's own code computes it") -> None:
    """Takes the model's own code from now on, because the kernel has failed; says so once.

    Args:
        case: what the kernel was called for.
        error: what it raised. What says that memory ran out is raised again: smaller passes may be the answer.
        instead: what happens now.
    """
    if is_out_of_memory(error):
        raise error
    _CHOSEN[case] = False
    _warn(str(case), f"{kind_and_line(error)}; {instead}")


def choices() -> Choices:
    """What this process has found so far."""
    return dict(_CHOSEN)


def settle(of_all: Iterable[Choices]) -> None:
    """Takes from now on only kernels that every process has taken.

    Args:
        of_all: the choices of all processes that work on one run.
    """
    everywhere = list(of_all)
    _CHOSEN.update({case: all(found.get(case, False) for found in everywhere) for case in _CHOSEN})


def attempt(what: str, work: Callable[[], Any]) -> Any:
    """What `work` gives without gradients; None, and a warning the first time, where it raises."""
    try:
        with torch.no_grad():
            return work()
    except Exception as error:  # kernels that do not compile raise anything
        _warn(what, kind_and_line(error))
        return None


@remembered(about="warnings")
def _warn(what: str, reason: str) -> None:
    logger.warning("kernel %s is left out: %s", what, reason)


def agrees(found: Any, expected: Any, largest_error: float = 1e-6) -> bool:
    """Whether two results differ by at most an error, see `error_of`, or their dtype's rounding if that is larger."""
    return error_of(found, expected) <= max(largest_error, 2 * torch.finfo(expected.dtype).eps)


def error_of(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected; infinite for other shapes, dtypes and for NaN."""
    if not isinstance(expected, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return torch.inf
    difference = torch.linalg.vector_norm(found.float() - expected.float())
    error = float(difference / torch.linalg.vector_norm(expected.float()))
    return torch.inf if error != error else error


def gain_of(kernel: Callable[..., Any], own: Callable[..., Any], *inputs: Tensor, largest_error: float = 1e-6) -> float:
    """How many times as fast as the model's own code a kernel is that gives the same.

    Args:
        kernel: computes with the kernel.
        own: computes with the model's own code.
        inputs: what both are called with.
        largest_error: by which their results may differ; see `agrees`.

    Raises:
        ArithmeticError: their results differ by more.
    """
    for found, expected in zip(_tensors(kernel(*inputs)), _tensors(own(*inputs)), strict=True):
        if not agrees(found, expected, largest_error):
            raise ArithmeticError(f"its results are off by {error_of(found, expected):.1e}")
    return speedup(kernel, own, inputs)


def _tensors(result: Any) -> Sequence[Any]:
    return [result] if isinstance(result, Tensor) else result


def speedup(kernel: Callable[..., Any], own: Callable[..., Any], inputs: Sequence[Tensor]) -> float:
    """How many times as fast the kernel is, once compiled."""
    times = [[_seconds(run, inputs) for run in (own, kernel)] for _ in range(ROUNDS)]
    of_own, of_kernel = map(min, zip(*times, strict=True))
    return of_own / of_kernel


def _seconds(run: Callable[..., Any], inputs: Sequence[Tensor]) -> float:
    """Time of a call; on a GPU of several in a row, as in a pass, so that launches count where the device waits."""
    if inputs[0].device.type != "cuda":
        begin = time.perf_counter()
        run(*inputs)
        return time.perf_counter() - begin
    with torch.cuda.device(inputs[0].device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run(*inputs)
        begin.record()
        for _ in range(REPEATS):
            run(*inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
