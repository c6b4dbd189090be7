"""Rotary embeddings of queries and keys in one kernel, in place of the function that a model's attention calls."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from fasttrace_kernels.launch import TRITON_DTYPES
from fasttrace_kernels.rotary import rotary
from torch import Tensor

from fasttrace.fusing.measure import TOKENS, Case, attempt, case_of, gain_of, is_taken, leave_out, random
from fasttrace.memories import remembered
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import replaced_method, set_by_others

NAME = "apply_rotary_pos_emb"
PROBED_TOKENS = 7


@contextmanager
def rotary_by_kernel(anatomy: Anatomy) -> Iterator[None]:
    """While open, the rotary embedding of a model's attention is the kernel's where that is faster.

    All models of a family share the function: other threads that run one meanwhile call the model's own, or their own
    kernel if they trace it.

    Args:
        anatomy: a model on devices that the kernel runs on.
    """
    with ExitStack() as stack:
        for owner in _owners(anatomy):
            stack.enter_context(replaced_method(owner, NAME, _in_place_of(set_by_others(vars(owner)[NAME]))))
        yield


def _owners(anatomy: Anatomy) -> list[ModuleType]:
    """The Python modules of the attention modules' classes, as far as they have the function."""
    mixers = {type(mixer): mixer for mixer in anatomy.parts.mixers if mixer is not None}
    kinds = {type(part) for mixer in mixers.values() for part in mixer.modules()}
    names = sorted({base.__module__ for kind in kinds for base in kind.__mro__} & sys.modules.keys())
    return [sys.modules[name] for name in names if callable(vars(sys.modules[name]).get(NAME))]


class Rotary:
    """A model's function, by the kernel where it is bit for bit the rotation of halves that the kernel does.

    Attributes:
        own: the model's function.
        is_same: whether it is.
    """

    def __init__(self, own: Callable[..., Any]):
        self.own = own
        self.is_same: dict[Case, bool] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's function, where all calls go that have other arguments than q, k, cos and sin."""
        case = self._case(*args) if len(args) == 4 and not kwargs else None
        if case is not None:
            try:
                return rotary(*args)
            except ValueError:  # shapes or strides that the kernel does not take, or gradients are asked for
                pass
            except Exception as error:  # compiled anew for strides that were not measured
                leave_out(case, error)
        return self.own(*args, **kwargs)

    def _case(self, q: Any, k: Any, cos: Any, sin: Any) -> Case | None:
        """What the kernel is taken for; None where it is not."""
        tensors = q, k, cos, sin
        if not all(type(x) is Tensor and x.dtype == q.dtype for x in tensors) or q.dtype not in TRITON_DTYPES:
            return None
        if [x.dim() for x in tensors] != [4, 4, 3, 3]:
            return None
        sizes = q.shape[1], k.shape[1], q.shape[3], cos.shape[2]
        case = case_of("rotary", sizes, q.dtype, q.device)
        if case not in self.is_same:
            self.is_same[case] = bool(attempt(f"{case} of {self.own.__module__}", lambda: self._compare(sizes, q)))
        taken = self.is_same[case] and is_taken(case, lambda: gain_of(rotary, self.own, *_inputs(sizes, TOKENS, q)))
        return case if taken else None

    def _compare(self, sizes: tuple[int, ...], like: Tensor) -> bool:
        inputs = _inputs(sizes, PROBED_TOKENS, like)
        return all(map(torch.equal, rotary(*inputs, backend="torch"), self.own(*inputs)))


@remembered(about="measurements")
def _in_place_of(own: Callable[..., Any]) -> Rotary:
    """One for each function, so that it is compared once."""
    return Rotary(own)


def _inputs(sizes: tuple[int, ...], tokens: int, like: Tensor) -> list[Tensor]:
    """Random q, k, cos and sin, the heads of a token side by side."""
    heads, key_heads, d_head, rotated = sizes
    q, k = (random(1, tokens, n, d_head, like=like, seed=n).transpose(1, 2) for n in (heads, key_heads))
    return [q, k, *(random(1, tokens, rotated, like=like, seed=seed) for seed in (1, 2))]
