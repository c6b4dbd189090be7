"""Faster ways to compute token-wise work, for the time of a pass; the only chooser of implementations.

Each computes the same function as the module it stands in for, in fewer or smaller passes over memory. Where it depends
on the machine what is faster, `measure` finds out. `Tracer(fuse=False)` leaves the modules
alone.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from fasttrace_kernels import suffix_attention_cpu
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from fasttrace.errors import EngineError
from fasttrace.fusing.cpu_linears import (
    BLOCK_PROBE,
    HEAD_PROBE,
    TURNED_PROBE,
    check_library,
    fast_linears,
    gelu_in_product,
    has_plain_product,
    is_plain_linear,
    library_asked,
    library_of_torch,
    onednn_does_bfloat16,
    onednn_is_faster,
)
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import exclusive, modules_of, replaced_forward
from fasttrace.planning.packs import Pack

if TYPE_CHECKING:
    from fasttrace.fusing.attention import KernelState

KERNEL_NEEDS = {"cuda": "triton", "cpu": "numba"}
"""Devices where attention is one call per block rather than per group, and the package that compiles it."""

GLUE_DEVICES = ("cuda",)
"""Where norms, gates and rotary embeddings are computed by kernels if these are faster."""

CPU_KERNEL_DTYPES = (torch.float32, torch.bfloat16)

_FUSING: ContextVar[bool] = ContextVar("fasttrace_fusing", default=False)
_HOW: ContextVar[Mapping[str, Any]] = ContextVar("fasttrace_how")

CPU_WIDTH = 256
"""Narrowest hidden state of a model on a CPU that is worth oneDNN's calls and a compiled attention."""

CPU_CHUNK = 1024
"""Tokens that go through an MLP together on a CPU: what is between its two products then stays in the caches."""


def gelu_tanh(hidden: Tensor) -> Tensor:
    """The tanh approximation of GELU in one pass; transformers' takes six over the widest tensor."""
    return nn.functional.gelu(hidden, approximate="tanh")


def in_chunks(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A token-wise forward on [..., token, d_model], run over CPU_CHUNK tokens at a time."""

    def chunked(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or hidden.shape[-2] <= CPU_CHUNK:
            return forward(hidden, *args, **kwargs)
        return torch.cat([forward(chunk) for chunk in hidden.split(CPU_CHUNK, -2)], -2)

    return chunked


def attention_kernel(anatomy: Anatomy, pack: Pack, fuse: bool | None = None) -> "KernelState | None":
    """What makes attention one call per block, with fused operations; None: group by group.

    Args:
        anatomy: the model.
        pack: what attends.
        fuse: whether operations will be fused; None: as it is now.
    """
    if not (_FUSING.get() if fuse is None else fuse) or kernel_compiler(anatomy) is None:
        return None
    from fasttrace.fusing.attention import KernelState

    return KernelState.of(anatomy, pack)


def failed_kernels(anatomy: Anatomy) -> frozenset[Any]:
    """The sizes of heads on which a kernel for attention has failed: these attend group by group."""
    kernels = sys.modules.get("fasttrace.fusing.attention")
    return frozenset() if kernels is None else frozenset(kernels.failed_heads(anatomy.model))


def kernel_compiler(anatomy: Anatomy) -> str | None:
    """The package that compiles attention for this model, if it is there and worth it."""
    device = anatomy.device.type
    if device == "cpu" and (anatomy.d_model < CPU_WIDTH or anatomy.dtype not in CPU_KERNEL_DTYPES):
        return None
    package = KERNEL_NEEDS.get(device)
    return package if package is not None and compiler_is_there(package) else None


def compiler_is_there(package: str) -> bool:
    """Whether a package that compiles kernels is installed, and numba can be imported."""
    return suffix_attention_cpu.is_installed() if package == "numba" else find_spec(package) is not None


@contextmanager
def fused_attention(fuse: bool = True) -> Iterator[None]:
    """While open, attention is one call per block where a kernel does it; all else stays the model's."""
    token = _FUSING.set(fuse)
    try:
        yield
    finally:
        _FUSING.reset(token)


@contextmanager
def fused(anatomy: Anatomy, fuse: bool = True) -> Iterator[None]:
    """While open, modules with a faster equivalent use it; with fuse=False nothing changes.

    Raises:
        EngineError, PlanError: the library named for products on a CPU cannot compute them.
    """
    with exclusive(anatomy.model), ExitStack() as stack:
        stack.enter_context(fused_attention(fuse))
        libraries = cpu_matmul(anatomy, fuse)
        stack.callback(_HOW.reset, _HOW.set({"cpu_matmul": libraries} if libraries else {}))
        if fuse:
            if _takes_kernel_glue(anatomy):
                from fasttrace.fusing.glue import fused_glue

                stack.enter_context(fused_glue(anatomy))
            if anatomy.device.type == "cpu" and not anatomy.is_offloaded:
                _fuse_on_cpu(anatomy, stack)
            for module in modules_of(anatomy.model):
                if isinstance(module, NewGELUActivation) and "forward" not in vars(module):
                    stack.enter_context(replaced_forward(module, gelu_tanh))
        yield


def _takes_kernel_glue(anatomy: Anatomy) -> bool:
    """Whether all that the model computes with lies dense on devices for which triton is there."""
    return (
        all(device.type in GLUE_DEVICES for device in anatomy.devices)
        and not anatomy.is_offloaded
        and getattr(anatomy.model, "quantization_method", None) is None
        and compiler_is_there("triton")
    )


def _fuse_on_cpu(anatomy: Anatomy, stack: ExitStack) -> None:
    linears = _for_onednn(anatomy)
    found = Counter(part for block in anatomy.blocks for part in block.modules())
    for mlp, down in _dense_mlps(anatomy):
        if all(found[part] == 1 for part in mlp.modules()):  # what blocks share is not one MLP's to change
            stack.enter_context(gelu_in_product(mlp, down, linears))
    stack.enter_context(fast_linears(linears))
    for mlp, _ in _dense_mlps(anatomy):
        stack.enter_context(replaced_forward(mlp, in_chunks(mlp.forward)))


def how_computed() -> Mapping[str, Any]:
    """What computes in place of the model's own modules now, for results."""
    return _HOW.get({})


def cpu_matmul(anatomy: Anatomy, fuse: bool) -> dict[str, str]:
    """The library that computes a model's products on a CPU, in its blocks and in its head; elsewhere nothing.

    Args:
        anatomy: the model.
        fuse: whether fused operations are on; without them it is the one that torch takes.

    Raises:
        EngineError, PlanError: a library is named and cannot compute them.
    """
    asked = library_asked(anatomy.cpu_matmul)
    if anatomy.device.type != "cpu":
        return {}
    check_library(asked, anatomy.dtype)
    fuses = fuse and not anatomy.is_offloaded
    if asked == "onednn" and not fuses:
        raise EngineError(
            "cpu_matmul is 'onednn', which takes fused operations, weights in main memory, and another engine than "
            "reference: leave it at 'auto'"
        )
    head = anatomy.model.get_output_embeddings()
    products = {"blocks": next(filter(has_plain_product, anatomy.blocks[0].modules()), None), "head": head}
    takes = _onednn_rule(anatomy)
    return {what: _library(module, fuses and takes is not None and takes(module)) for what, module in products.items()}


def _library(linear: Any, by_onednn: bool) -> str:
    if linear is None or not has_plain_product(linear):
        return "the module's own"
    if by_onednn:
        return "onednn"
    return library_of_torch(linear.weight.dtype)


def _for_onednn(anatomy: Anatomy) -> set[nn.Module]:
    """Modules whose matrix products are left to oneDNN."""
    takes = _onednn_rule(anatomy)
    return set() if takes is None else {module for module in anatomy.model.modules() if takes(module)}


def _onednn_rule(anatomy: Anatomy) -> Callable[[Any], bool] | None:
    """Which modules take oneDNN; None: no module does.

    Products of narrow models cost more to call: there it has to be named.
    """
    asked = library_asked(anatomy.cpu_matmul)
    if asked == "onednn":
        return is_plain_linear
    if asked == "mkl" or anatomy.d_model < CPU_WIDTH:
        return None
    head, threads = anatomy.model.get_output_embeddings(), torch.get_num_threads()

    def is_faster(module: Any) -> bool:
        if not is_plain_linear(module):
            return False
        if module.weight.dtype == torch.bfloat16:
            return onednn_does_bfloat16()
        of_block = TURNED_PROBE if isinstance(module, Conv1D) else BLOCK_PROBE
        return onednn_is_faster(threads, HEAD_PROBE if module is head else of_block)

    return is_faster


def _dense_mlps(anatomy: Anatomy) -> list[tuple[nn.Module, nn.Module]]:
    """MLPs of more than one matrix product, and their down projections.

    A mixture of experts has no single one, and wants all its tokens together.
    """
    pairs = zip(anatomy.parts.mlp, anatomy.parts.down, strict=True)
    return [(mlp, down) for mlp, down in pairs if mlp is not None and down is not None and mlp is not down]
