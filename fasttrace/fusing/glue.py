"""RMS norms, gated MLPs and rotary embeddings, in one kernel each where it gives the same numbers and is faster.

Nothing here depends on the family. A module is run on a few random numbers, without its matrix products and without
anybody's hooks, and is stood in for only if a kernel gives what it gave. `measure` has the speed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from fasttrace_kernels.launch import TRITON_DTYPES
from fasttrace_kernels.rms_norm import rms_norm
from fasttrace_kernels.swiglu import ACTIVATIONS, swiglu
from torch import Tensor, nn

from fasttrace.fusing.measure import (
    TOKENS,
    agrees,
    attempt,
    case_of,
    error_of,
    gain_of,
    has_failed,
    is_taken,
    leave_out,
    random,
)
from fasttrace.fusing.rotary import rotary_by_kernel
from fasttrace.memories import by_module
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import evaluating, replaced_forward
from fasttrace.models.sizes import width_of

EPS = ("variance_epsilon", "eps")
GATED = (("gate_proj", "up_proj"), ("gate_up_proj",))
"""What the gate and the other factor are computed with: two products, or one whose halves they are."""

PROBED_ROWS = 64
"""Rows of random numbers on which modules are compared with kernels."""

RARELY = 0.05
"""Share of the numbers of a norm that may be rounded otherwise in half precision."""

_FOUND = by_module()
"""What a module was then, and what it was found to compute."""


class Convention(NamedTuple):
    """How an RMS norm applies its weight; see `fasttrace_kernels.rms_norm`."""

    offset: float
    round_before_weight: bool


CONVENTIONS = (Convention(0.0, True), Convention(1.0, False), Convention(0.0, False))


@contextmanager
def fused_glue(anatomy: Anatomy) -> Iterator[None]:
    """While open, kernels compute a model's norms, gates and rotary embeddings where that is faster.

    Modules with a forward of their own are left alone, and hooks run as before.

    Args:
        anatomy: a model on devices that the kernels run on.
    """
    norms = {norm: _norm_forward(norm, anatomy.d_model) for norm in filter(_is_norm, anatomy.model.modules())}
    mlps = {mlp: _mlp_forward(mlp) for mlp in filter(_is_gated, filter(None, anatomy.parts.mlp))}
    with ExitStack() as stack:
        for module, forward in (norms | mlps).items():
            if forward is not None:
                stack.enter_context(replaced_forward(module, forward))
        stack.enter_context(rotary_by_kernel(anatomy))
        yield


def _found(module: nn.Module, find: Callable[[Any], Any], weight: Tensor) -> Any:
    """What `find` says of a module with such a weight, asked once unless the module changes; None where it raises."""
    now = (type(module).forward, weight.shape, weight.dtype, weight.device, *map(type, module._modules.values()))
    if module not in _FOUND or _FOUND[module][0] != now:
        with evaluating(module):
            _FOUND[module] = now, attempt(f"for {type(module).__name__}", lambda: find(module))
    return _FOUND[module][1]


def _is_plain(weight: Any) -> bool:
    """Dense numbers of a type that kernels take, neither quantized nor shared out over processes."""
    return type(weight) is nn.Parameter and weight.dtype in TRITON_DTYPES


def _is_norm(module: Any) -> bool:
    return (
        type(module).__name__.endswith("RMSNorm")
        and _is_plain(getattr(module, "weight", None))
        and module.weight.dim() == 1
        and isinstance(_eps_of(module), float)
        and "forward" not in vars(module)
    )


def _eps_of(norm: nn.Module) -> Any:
    return next((getattr(norm, name) for name in EPS if hasattr(norm, name)), None)


def _norm_forward(norm: Any, d_model: int) -> Callable[..., Tensor] | None:
    """The norm by the kernel; None if it is another function, or the kernel no faster."""
    own, weight = norm.forward, norm.weight
    convention = _found(norm, _convention_of, weight)
    if convention is None:
        return None

    def by_kernel(hidden: Tensor) -> Tensor:
        return rms_norm(hidden, norm.weight, _eps_of(norm), **convention._asdict())

    kind = "rms_norm" if convention.round_before_weight else f"rms_norm(offset={convention.offset:g})"
    rows = TOKENS * max(1, d_model // len(weight))  # a token has as many as its queries have heads
    case = case_of(kind, (rows, len(weight)), weight.dtype, weight.device)
    if not is_taken(case, lambda: gain_of(by_kernel, own, random(rows, len(weight), like=weight))):
        return None

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        is_usual = len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].dtype == norm.weight.dtype
        if is_usual and not has_failed(case):
            try:
                return _on_rows(by_kernel, args[0])
            except ValueError:  # strides that the kernel does not take, or gradients are asked for
                pass
            except Exception as error:  # compiled anew for strides that were not measured
                leave_out(case, error)
        return own(*args, **kwargs)

    return forward


def _on_rows(norm: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """[batch, head, token, d_head] mostly lies as [batch, token, head, d_head]: there, rows are at one distance."""
    if hidden.dim() == 4 and hidden.stride(1) < hidden.stride(2):
        return norm(hidden.transpose(1, 2)).transpose(1, 2)
    return norm(hidden)


def _convention_of(norm: Any) -> Convention | None:
    """The convention that gives what the norm gives with weights that tell them apart; None: no convention does."""
    eps, twin = _eps_of(norm), copy(norm)
    drawn = {name: nn.Parameter(random(*own.shape, like=own)) for name, own in norm.named_parameters()}
    vars(twin)["_parameters"] = drawn
    hidden = random(PROBED_ROWS, len(norm.weight), like=norm.weight, seed=1)
    hidden[::2] *= eps**0.5  # rows so small that another eps shows
    expected = twin.forward(hidden)
    results = {each: rms_norm(hidden, drawn["weight"], eps, **each._asdict(), backend="torch") for each in CONVENTIONS}
    best = min(CONVENTIONS, key=lambda each: error_of(results[each], expected))
    if not agrees(results[best], expected):
        return None
    rounded_otherwise = (results[best] != expected).float().mean()
    return best if hidden.dtype == torch.float32 or rounded_otherwise <= RARELY else None


def _is_gated(mlp: nn.Module) -> bool:
    """An MLP with the products of a gated one, in plain weights, and nothing beside them that somebody listens to."""
    if "forward" in vars(mlp) or not (names := _products(mlp)):
        return False
    products = {*names, "down_proj"}
    others = [part for name, part in mlp.named_children() if name not in products]
    return (
        all(_is_plain(getattr(getattr(mlp, name), "weight", None)) for name in products)
        and _width(mlp) > 0
        and not any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in others)
    )


def _products(mlp: nn.Module) -> tuple[str, ...]:
    return next((names for names in GATED if {*names, "down_proj"} <= mlp._modules.keys()), ())


def _width(mlp: Any) -> int:
    """Width of the gate; 0 if its module does not say."""
    names = _products(mlp)
    return (width_of(getattr(mlp, names[0])) or 0) * len(names) // 2


def _mlp_forward(mlp: Any) -> Callable[..., Tensor] | None:
    """The MLP with its gate by the kernel; None if it is another function, or the kernel no faster."""
    own, weight, names, width = mlp.forward, mlp.down_proj.weight, _products(mlp), _width(mlp)
    activation = _found(mlp, _activation_of, weight)
    if activation is None:
        return None
    case = case_of(f"swiglu({activation})", (TOKENS, width), weight.dtype, weight.device)
    by_kernel = partial(_gated, activation=activation)

    def gain() -> float:
        with evaluating(mlp):
            return gain_of(by_kernel, _without_products(mlp).forward, random(TOKENS, 2 * width, like=weight))

    if not is_taken(case, gain):
        return None

    def glued(*products: Tensor) -> Tensor:
        if not has_failed(case):
            try:
                return by_kernel(*products)
            except Exception as error:  # as above; hooks on the products have run by now
                leave_out(case, error, "torch computes it")
        return by_kernel(*products, backend="torch")

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return own(*args, **kwargs)
        return mlp.down_proj(glued(*(getattr(mlp, name)(args[0]) for name in names)))

    return forward


def _gated(gate: Tensor, up: Tensor | None = None, *, activation: str, **options: Any) -> Tensor:
    """The activation of gate, times up; without up, of the halves of gate."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    try:
        return swiglu(gate, up, activation, **options)
    except ValueError:  # strides that the kernel does not take
        return swiglu(gate.contiguous(), up.contiguous(), activation, backend="torch")


def _activation_of(mlp: Any) -> str | None:
    """The activation with which the MLP is down(activation(gate(x)) * up(x)), if the kernel has one."""
    hidden = 3 * random(PROBED_ROWS, 2 * _width(mlp), like=mlp.down_proj.weight)
    expected = _without_products(mlp).forward(hidden)
    gate, up = hidden.chunk(2, -1)
    results = {name: swiglu(gate, up, name, backend="torch") for name in ACTIVATIONS}
    best = min(ACTIVATIONS, key=lambda name: error_of(results[name], expected))
    return best if agrees(results[best], expected) else None


def _without_products(mlp: Any) -> Any:
    """The same MLP with products that cut their results out of the input, so that what is left is the glue."""
    names, twin = _products(mlp), copy(mlp)
    cuts = dict(zip(names, (_first_half, _second_half) if len(names) == 2 else (_same,), strict=True))
    vars(twin)["_modules"] = {**mlp._modules, **cuts, "down_proj": _same}
    return twin


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _first_half(hidden: Tensor) -> Tensor:
    return hidden.chunk(2, -1)[0]


def _second_half(hidden: Tensor) -> Tensor:
    return hidden.chunk(2, -1)[1]
