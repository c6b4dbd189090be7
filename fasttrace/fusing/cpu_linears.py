"""Matrix products on a CPU, through whichever of torch's two libraries is faster there.

torch computes float32 products with MKL. On some CPUs, AMD's with AVX512 among them, oneDNN's kernels are faster with
the same rounding error; on others MKL wins in the blocks, and oneDNN in the head with its few tokens and large weight.
`measure` finds out which, for each kind of product that a model has. Another process may measure otherwise and differ
in the last bits: results record the library, and `Tracer(cpu_matmul=...)` or the environment variable
FASTTRACE_CPU_MATMUL names it. bfloat16 products are oneDNN's either way, but torch first copies the weight where
the states are a view of others.

An MLP's GELU is computed by oneDNN inside the product before it, while the numbers are in registers.
"""

import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from fasttrace.errors import EngineError, PlanError
from fasttrace.fusing.measure import Case, case_of, gain_of, is_taken, random
from fasttrace.memories import by_module
from fasttrace.models.hooks import evaluating, replaced_forward, set_by_others

logger = logging.getLogger("fasttrace")


class Probe(NamedTuple):
    """A product to measure: [tokens, inputs] with a weight [outputs, inputs], or [inputs, outputs] as GPT-2's are."""

    tokens: int
    inputs: int
    outputs: int
    turned: bool = False


BLOCK_PROBE = Probe(512, 1024, 2048)
TURNED_PROBE = Probe(512, 1024, 2048, turned=True)
HEAD_PROBE = Probe(128, 512, 32768)
"""Products in a block, in a block of GPT-2, and in the head with its few tokens."""

LARGEST_ERROR = 1e-5
"""Norm of the difference of the two libraries' results over the norm of either, beyond which oneDNN is not taken: it
may be told to round to bfloat16."""


GELUS: dict[type[nn.Module], str] = {NewGELUActivation: "tanh", GELUTanh: "tanh", GELUActivation: "none"}
"""transformers' modules -> what torch calls the approximation."""

_IS_GELU_OF_PRODUCT = by_module()
"""What an MLP was then, and whether it was seen to give its GELU the first product and nothing else."""

LARGEST_GELU_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


LIBRARIES = ("auto", "mkl", "onednn")
VARIABLE = "FASTTRACE_CPU_MATMUL"


def library_asked(given: str) -> str:
    """One of LIBRARIES: what is given, or for "auto" what the environment variable says.

    Raises:
        PlanError: another name.
    """
    asked, what = (given, "cpu_matmul") if given != "auto" else (os.environ.get(VARIABLE) or "auto", VARIABLE)
    if asked not in LIBRARIES:
        raise PlanError(f"{what} is {asked!r}: give one of {', '.join(LIBRARIES)}")
    return asked


def check_library(asked: str, dtype: torch.dtype) -> None:
    """Raises if a library cannot compute a CPU's products of a type here.

    Args:
        asked: one of LIBRARIES.
        dtype: the weights'.

    Raises:
        EngineError: it cannot; the message says which one does.
    """
    named, kind = f"cpu_matmul is {asked!r}, and", str(dtype).removeprefix("torch.")
    if asked == "onednn" and not _has_onednn():
        raise EngineError(f"{named} this build of torch has no oneDNN: leave it at 'auto'")
    if asked == "onednn" and dtype != torch.float32 and not (dtype == torch.bfloat16 and onednn_does_bfloat16()):
        raise EngineError(f"{named} oneDNN computes no {kind} on this CPU: leave it at 'auto', or load in float32")
    if asked == "mkl" and library_of_torch(dtype) != "mkl":
        raise EngineError(f"{named} torch computes {kind} by {library_of_torch(dtype)} here: leave it at 'auto'")


def library_of_torch(dtype: torch.dtype) -> str:
    """What torch itself computes products of a type with on a CPU."""
    if dtype == torch.bfloat16 and onednn_does_bfloat16():
        return "onednn"
    return "mkl" if torch.backends.mkl.is_available() and dtype in (torch.float32, torch.float64) else "blas"


def onednn_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Tensor:
    """`torch.nn.functional.linear` in oneDNN.

    Args:
        hidden: float32 or bfloat16 [..., inputs], with any strides.
        weight: the same type, [outputs, inputs], with any strides.
        bias: [outputs] or None.
        gelu: the approximation of a GELU behind it, "none" or "tanh"; None: no GELU.
    """
    after = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, after[0], [], after[1])


def onednn_does_bfloat16() -> bool:
    """Whether oneDNN computes bfloat16 products on this CPU."""
    return _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn_is_faster(threads: int, probe: Probe) -> bool:
    """Whether oneDNN's float32 products are clearly faster than MKL's here, and as exact; measured once.

    Args:
        threads: that torch computes with.
        probe: the product.
    """
    return _has_onednn() and is_taken(product_case(threads, probe), lambda: _gain(probe))


def product_case(threads: int, probe: Probe) -> Case:
    """What a measurement of a product holds for."""
    kind = "onednn(turned)" if probe.turned else "onednn"
    return case_of(kind, (threads, probe.tokens, probe.inputs, probe.outputs), torch.float32, torch.device("cpu"))


def _gain(probe: Probe) -> float:
    like = torch.empty(0, dtype=torch.float32, device="cpu")
    weight = random(*((probe.inputs, probe.outputs) if probe.turned else (probe.outputs, probe.inputs)), like=like)
    inputs = random(probe.tokens, probe.inputs, like=like, seed=1), weight.t() if probe.turned else weight
    return gain_of(onednn_linear, nn.functional.linear, *inputs, largest_error=LARGEST_ERROR)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def fast_linears(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, the plain linears among modules on the CPU compute with oneDNN; other modules are left alone."""
    with ExitStack() as stack:
        for module in filter(is_plain_linear, modules):
            stack.enter_context(replaced_forward(module, _by_onednn(module)))
        yield


def is_plain_linear(module: Any) -> bool:
    """Whether it is torch's or GPT-2's own class, unreplaced, with dense float32 or bfloat16 weights in memory."""
    return (
        type(module) in (nn.Linear, Conv1D)
        and "forward" not in vars(module)
        and has_plain_product(module)
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.weight.is_contiguous()
    )


def has_plain_product(module: Any) -> bool:
    """The same for any floating type, whatever fasttrace has replaced in it."""
    if type(module) not in (nn.Linear, Conv1D):
        return False
    weight = module._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.is_floating_point()
        and set_by_others(vars(module).get("forward")) is None
    )


def _by_onednn(module: Any, gelu: str | None = None) -> Callable[[Tensor], Tensor]:
    """A linear's forward; the weight of GPT-2's is [inputs, outputs]."""
    if isinstance(module, Conv1D):
        return lambda hidden: onednn_linear(hidden, module.weight.t(), module.bias, gelu)
    return lambda hidden: onednn_linear(hidden, module.weight, module.bias, gelu)


@contextmanager
def gelu_in_product(mlp: nn.Module, down: nn.Module, of_onednn: Container[nn.Module]) -> Iterator[None]:
    """While open, an MLP down(gelu(up(hidden))) computes its GELU with the product before; others are left alone.

    Args:
        mlp: the module.
        down: its down projection.
        of_onednn: linears whose products are oneDNN's.
    """
    with ExitStack() as stack:
        pair = _up_and_gelu(mlp, down, of_onednn)
        if pair is not None and _is_gelu_of_product(mlp, down, *pair):
            stack.enter_context(_joined(*pair))
        yield


def _up_and_gelu(
    mlp: nn.Module, down: nn.Module, of_onednn: Container[nn.Module]
) -> tuple[nn.Module, nn.Module] | None:
    """The other linear and the GELU, if there is one of each, with nobody's hooks anywhere in the MLP."""
    parts = list(mlp.modules())
    ups = [part for part in parts if isinstance(part, nn.Linear | Conv1D) and part is not down]
    gelus = [part for part in parts if type(part) in GELUS]
    if len(ups) != 1 or len(gelus) != 1 or ups[0] not in of_onednn:
        return None
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts):
        return None
    return ups[0], gelus[0]


def _is_gelu_of_product(mlp: nn.Module, down: nn.Module, up: Any, gelu: nn.Module) -> bool:
    """Tried once on a few numbers, unless the MLP changes."""
    now = type(mlp).forward, type(gelu), up.weight.dtype, up.weight.shape
    if mlp not in _IS_GELU_OF_PRODUCT or _IS_GELU_OF_PRODUCT[mlp][0] != now:
        try:
            same = _same_with_gelu_joined(mlp, down, up, gelu)
        except Exception as error:  # an MLP that is called otherwise may raise anything
            logger.debug("%s is computed as it is: %s", type(mlp).__name__, error)
            same = False
        _IS_GELU_OF_PRODUCT[mlp] = now, same
    return _IS_GELU_OF_PRODUCT[mlp][1]


def _same_with_gelu_joined(mlp: Any, down: Any, up: Any, gelu: nn.Module) -> bool:
    """Whether the down projection gets the same either way."""
    inputs = up.weight.shape[0 if isinstance(up, Conv1D) else 1]
    generator = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(1, 4, inputs, generator=generator, dtype=torch.float32, device="cpu").to(up.weight.dtype)
    seen: list[Tensor] = []
    forward = down.forward

    def watched(activation: Tensor) -> Tensor:
        seen.append(activation.float())
        return forward(activation)

    with evaluating(mlp), replaced_forward(down, watched):
        mlp.forward(hidden)
        with _joined(up, gelu):
            mlp.forward(hidden)
    apart, joined = seen
    norm = torch.linalg.norm(apart)
    return bool(norm > 0 and torch.linalg.norm(joined - apart) <= LARGEST_GELU_ERROR[up.weight.dtype] * norm)


@contextmanager
def _joined(up: nn.Module, gelu: nn.Module) -> Iterator[None]:
    in_product = _by_onednn(up, GELUS[type(gelu)])
    with replaced_forward(up, in_product), replaced_forward(gelu, lambda hidden: hidden):
        yield
