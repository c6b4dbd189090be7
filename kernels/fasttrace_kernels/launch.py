"""What the launchers share: compiling a kernel when it is first used, and the checks of their arguments.

Kernels are plain functions of their modules until `launch` first runs one: triton is imported there, so that the
modules import where triton is not installed. Annotations stay strings (`from __future__ import annotations`); triton
reads those too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels take."""
FLOAT_DTYPES = (*TRITON_DTYPES, torch.float64)


Backend = Literal["auto", "triton", "torch"]


def takes_triton(backend: str, tensor: Tensor) -> bool:
    """Whether the Triton kernel computes: asked for, or "auto" and a CUDA tensor of a dtype it takes.

    Raises:
        ValueError: no such backend, or Triton is asked for a dtype that it does not take.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r}: pass 'auto', 'triton' or 'torch'")
    if backend == "triton" and tensor.dtype not in TRITON_DTYPES:
        raise ValueError(f"the Triton kernel takes {_named(TRITON_DTYPES)}, not {_named([tensor.dtype])}")
    fits = tensor.is_cuda and tensor.dtype in TRITON_DTYPES
    return backend == "triton" or (backend == "auto" and fits)


@cache
def jitted(function: Callable[..., None]) -> Any:
    """The function as a Triton kernel, with `tl` in its module."""
    import triton
    import triton.language

    function.__globals__["tl"] = triton.language
    return triton.jit(function)


def launch(function: Callable[..., None], programs: int, *args: Any, **options: Any) -> None:
    """Runs a kernel as a 1-D grid on the device of its first argument.

    Args:
        function: the kernel, not yet jitted.
        programs: their number; a grid of none is not launched.
        args: of the kernel, a tensor first.
        options: constexpr arguments, num_warps, num_stages and the like.

    Raises:
        ValueError: gradients are asked for.
        RuntimeError: Triton is not installed, or cannot run on the device.
    """
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        raise ValueError("the Triton kernel has no backward: call it under torch.no_grad() or pass backend='torch'")
    try:
        from triton import knobs
    except ImportError as error:
        raise RuntimeError("Triton is not installed here: install it or pass backend='torch'") from error
    if not args[0].is_cuda and not knobs.runtime.interpret:
        raise RuntimeError(f"the Triton kernel runs on CUDA tensors, not on {args[0].device}: pass backend='torch'")
    if programs:
        with torch.cuda.device_of(args[0]):
            jitted(function)[(programs,)](*args, **options)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below size; 1 for 0."""
    return 1 << max(0, size - 1).bit_length()


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless the tensor has one of the dtypes."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {_named([tensor.dtype])}, expected {_named(allowed)}: convert it with .to(dtype)")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has the shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_beside(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} and {other_name} on {other.device}: move one of them")


def check_last_stride(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless neighbors along the last axis are neighbors in memory."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"the last axis of {name} has stride {tensor.stride(-1)}, expected 1: pass {name}.contiguous()"
        )


def as_rows(name: str, tensor: Tensor) -> Tensor:
    """The tensor as [row, column], a view.

    Raises:
        ValueError: it has no axis, its last axis is strided, or its rows do not lie at one distance.
    """
    if tensor.ndim == 0:
        raise ValueError(f"{name} is a scalar, expected [..., column]")
    check_last_stride(name, tensor)
    try:
        return tensor.view(tensor.shape[:-1].numel(), tensor.shape[-1])
    except RuntimeError:
        layout = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        raise ValueError(f"rows of {name} do not lie at one distance ({layout}): pass {name}.contiguous()") from None


def _named(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype)[6:] for dtype in dtypes)
