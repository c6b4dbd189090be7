"""A half-precision model computed in float32, so that a difference between two ways to compute it is no rounding.

Half precision rounds by up to 0.5 nats on real models, more than a soft cap or a lost window may change: no tolerance
tells one from the other. In float32 the same weights and the same code agree to 1e-4, or do not compute the same.

The model is not changed and not copied. While the mode is open, every function of torch gets half-precision tensors
and types as float32 ones; a weight is widened where it is used, and let go. What torch does not see (a kernel, code
that was compiled) may still round: then the attempt is given up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fasttrace.engines.memory import shares_passes
from fasttrace.engines.readout import Scores
from fasttrace.errors import EngineError
from fasttrace.models.anatomy import Anatomy

HALF = (torch.float16, torch.bfloat16)

PICKS = (torch.nn.functional.embedding, Tensor.__getitem__, torch.embedding, torch.index_select, Tensor.index_select)
"""What takes a few rows of a table: they are widened, not the table."""

NARROWING = (Tensor.half, Tensor.bfloat16)

TINY = 1e-30

PIECE = 1 << 26
"""Weights of a matrix that are widened at once: 256 MiB."""


def can_be_widened(anatomy: Anatomy) -> bool:
    """Whether a model is in half precision, with all its weights as they are at hand."""
    return (
        anatomy.dtype in HALF
        and not anatomy.is_offloaded
        and not shares_passes(anatomy)
        and getattr(anatomy.model, "quantization_method", None) is None
    )


@contextmanager
def in_float32(anatomy: Anatomy) -> Iterator[None]:
    """While open, this thread computes the model in float32.

    Raises:
        EngineError: something in the model rounds where torch does not see it.
    """
    with _exact_products(), _Widening(_storages(anatomy.model)):
        yield


@contextmanager
def _exact_products() -> Iterator[None]:
    """While open, no product of float32 is rounded to TensorFloat-32: whoever allows that means other work.

    Where none is anyway, nothing is set, because setting the default is a setting too, which torch's backends keep.
    """
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def difference_in_float32(anatomy: Anatomy, run: Callable[[], Scores], plain: Callable[[], Scores]) -> float:
    """How far two ways to run the same cells lie apart in log p(target), both in float32.

    Raises:
        EngineError: see `in_float32`.
    """
    with in_float32(anatomy):
        logs = [[np.log(np.maximum(part, TINY)) for part in _of_target(scores)] for scores in (plain(), run())]
    return max(float(np.abs(one - other).max()) for one, other in zip(*logs, strict=True))


def _of_target(scores: Scores) -> tuple[np.ndarray, ...]:
    return scores.cells, scores.base_of("prob")


class _Widening(TorchFunctionMode):
    """Every function of torch with half-precision arguments in float32."""

    def __init__(self, weights: set[int]):
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            found = func(*args, **kwargs)
            return torch.float32 if isinstance(found, torch.dtype) and found in HALF else found
        if func in PICKS:
            picked = func(*args, **kwargs)
            return picked.float() if picked.dtype in HALF else picked
        if func in NARROWING:
            return args[0].float()
        if func is torch.nn.functional.linear:
            return self._linear(*args, **kwargs)
        return func(*self._widened(args), **self._widened(kwargs))

    def _linear(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A product in pieces of the weight: a head of a large vocabulary would not fit beside the model."""
        hidden = self._widened(hidden)
        pieces = weight.split(max(1, PIECE // weight.shape[-1]))
        product = torch.cat([torch.nn.functional.linear(hidden, self._widened(piece)) for piece in pieces], -1)
        return product if bias is None else product + self._widened(bias)

    def _widened(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dtype not in HALF:
                return value
            self._check_is_weight(value)
            return value.float()
        if isinstance(value, torch.dtype):
            return torch.float32 if value in HALF else value
        if type(value) in (tuple, list):
            return type(value)(map(self._widened, value))
        if type(value) is dict:
            return {name: self._widened(item) for name, item in value.items()}
        return value

    def _check_is_weight(self, tensor: Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in self.weights:
            raise EngineError(f"a result in {tensor.dtype} where all is computed in float32")


def _storages(model: Any) -> set[int]:
    """Where a model's own tensors lie; parts and views of them lie there too."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
