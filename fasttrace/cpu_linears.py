"""Matrix products of float32 models on a CPU, through whichever of torch's two libraries is faster there.

torch computes float32 products with MKL. On some CPUs, AMD's among them, oneDNN has kernels that run twice as fast with
the same rounding error; on others MKL wins in the blocks, and oneDNN in the head with its few tokens and large weight.
Which one it is, is measured once a process for each of the two.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fasttrace.hooks import replaced_forward

logger = logging.getLogger("fasttrace")

BLOCK_PROBE = (512, 1024, 2048)
HEAD_PROBE = (128, 512, 32768)
"""Tokens, inputs and outputs of the products that are measured: in a block, and in the head with its few tokens."""

ROUNDS = 3
CLEARLY = 1.15
"""oneDNN is taken where it is that many times as fast."""

LARGEST_ERROR = 1e-5
"""Norm of the difference of the two libraries' results over the norm of either, beyond which oneDNN is not taken: it
may be told to round to bfloat16."""

KEPT_TRANSPOSED = 2
"""GPT-2 keeps its weights as [inputs, outputs], oneDNN wants them the other way round; so many are kept turned, which
is enough for an MLP that works through its tokens in chunks."""


def onednn_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` in oneDNN.

    Args:
        hidden: float32 [..., inputs].
        weight: float32 [outputs, inputs], contiguous.
        bias: [outputs] or None.
    """
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


@lru_cache(maxsize=8)
def onednn_is_faster(threads: int, probe: tuple[int, int, int]) -> bool:
    """Whether oneDNN's products are clearly faster than MKL's here, and as exact; measured once.

    Args:
        threads: that torch computes with.
        probe: tokens, inputs and outputs of the product.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    generator = torch.Generator().manual_seed(0)
    tokens, inputs, outputs = probe
    hidden, weight = (torch.randn(size, generator=generator) for size in ((tokens, inputs), (outputs, inputs)))
    error = torch.linalg.norm(onednn_linear(hidden, weight, None) - nn.functional.linear(hidden, weight))
    if not error <= LARGEST_ERROR * torch.linalg.norm(nn.functional.linear(hidden, weight)):
        return False
    seconds = [
        [_seconds(linear, hidden, weight) for linear in (nn.functional.linear, onednn_linear)] for _ in range(ROUNDS)
    ]
    mkl, onednn = map(min, zip(*seconds, strict=True))
    size = " x ".join(map(str, probe))
    logger.info("float32 products %s with %d threads: oneDNN %.2f times as fast as MKL", size, threads, mkl / onednn)
    return mkl > CLEARLY * onednn


def _seconds(linear: Callable[..., Tensor], hidden: Tensor, weight: Tensor) -> float:
    begin = time.perf_counter()
    linear(hidden, weight, None)
    return time.perf_counter() - begin


@contextmanager
def fast_linears(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, the float32 linears among modules on the CPU compute with oneDNN; other modules are left alone."""
    with ExitStack() as stack:
        turned = _Transposed()
        for module in modules:
            if _is_plain(module, nn.Linear):
                stack.enter_context(replaced_forward(module, _of_linear(module)))
            elif _is_plain(module, Conv1D):
                stack.enter_context(replaced_forward(module, _of_conv1d(module, turned)))
        yield


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Of exactly this class, with dense float32 weights in main memory."""
    weight = getattr(module, "weight", None)
    return (
        type(module) is kind
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and "forward" not in vars(module)
    )


def _of_linear(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda hidden: onednn_linear(hidden, module.weight, module.bias)


def _of_conv1d(module: Any, turned: "_Transposed") -> Callable[[Tensor], Tensor]:
    return lambda hidden: onednn_linear(hidden, turned.of(module.weight), module.bias)


class _Transposed:
    """The last few weights that were asked for, turned."""

    def __init__(self):
        self.kept: OrderedDict[int, Tensor] = OrderedDict()

    def of(self, weight: Tensor) -> Tensor:
        """[inputs, outputs] -> [outputs, inputs]."""
        key = id(weight)
        if key not in self.kept:
            self.kept[key] = weight.t().contiguous()
            if len(self.kept) > KEPT_TRANSPOSED:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]
