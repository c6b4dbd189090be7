"""Ragged attention over a pack, through transformers' attention and mask interfaces.

Registered once under one name. The arithmetic is the model's own eager or sdpa function, called once per
rectangular group of rows: queries first..T-1 of each row, against the base row's keys before `first` and the
row's own from there on. Scaling, grouped heads, soft caps, sinks and the mask are therefore the model's.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fasttrace.errors import EngineError

NAME = "fasttrace_ragged"


@dataclass(frozen=True)
class GroupOnDevice:
    """`plan.Group` with its index on a device, and the group's number of tokens."""

    first: int
    start: int
    n_rows: int
    base: Tensor


@dataclass
class RaggedState:
    """What the attention function has to know; one lives for one forward pass.

    Attributes:
        implementation: the model's own attention implementation, "eager" or "sdpa".
        n_base: base rows in the pack.
        n_positions: tokens of a base row.
        groups: of the block being computed; the engine sets it.
        calls: attention calls so far; the engine checks that every block made one.
    """

    implementation: str
    n_base: int
    n_positions: int
    groups: tuple[GroupOnDevice, ...] = ()
    calls: int = 0


_STATE: ContextVar[RaggedState | None] = ContextVar("fasttrace_ragged_state", default=None)


@contextmanager
def ragged_attention(model: nn.Module, state: RaggedState) -> Iterator[None]:
    """While open, the model attends through the pack.

    Raises:
        EngineError: a pass is running already, or the model keeps its own attention.
    """
    if _STATE.get() is not None:
        raise EngineError("a packed pass is running in this context already; run one after the other")
    token = _STATE.set(state)
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise EngineError(
                f"{type(model).__name__} does not take its attention from transformers' interface"
            )
        yield
    finally:
        model.set_attn_implementation(state.implementation)
        _STATE.reset(token)


def safe_implementation(model: nn.Module) -> str:
    """The implementation whose arithmetic the groups are computed with: the model's, if it takes any mask."""
    chosen = model.config._attn_implementation
    if chosen in ("eager", "sdpa"):
        return chosen
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [1, head, token, d_head], key and value [1, kv_head, token, d_head] -> [1, token, head, d_head]."""
    state = _running()
    state.calls += 1
    function = _arithmetic(module, state.implementation)
    n_base, n_positions = state.n_base, state.n_positions
    base_key, base_value = (_rectangle(x, 0, n_base, n_positions) for x in (key, value))
    if attention_mask is None:
        raise EngineError(f"{type(module).__name__} was given no mask; use engine='rows'")
    outputs = []
    for group in state.groups:
        length = n_positions - group.first
        own_key, own_value = (_rectangle(x, group.start, group.n_rows, length) for x in (key, value))
        attended, _ = function(
            module,
            _rectangle(query, group.start, group.n_rows, length),
            _after_prefix(base_key, own_key, group),
            _after_prefix(base_value, own_value, group),
            attention_mask[:1, :, group.first :, :n_positions],
            **kwargs,
        )
        outputs.append(attended.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _running() -> RaggedState:
    state = _STATE.get()
    if state is None:
        raise EngineError(
            f"attention {NAME!r} works inside a fasttrace pass only; set the model back to 'sdpa'"
        )
    return state


def _arithmetic(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def _rectangle(states: Tensor, start: int, n_rows: int, length: int) -> Tensor:
    """[1, head, token, d_head] -> [row, head, length, d_head], a view."""
    tokens = states[0, :, start : start + n_rows * length]
    return rearrange(tokens, "head (row pos) d_head -> row head pos d_head", pos=length)


def _after_prefix(base: Tensor, own: Tensor, group: GroupOnDevice) -> Tensor:
    if group.first == 0:
        return own
    prefix = base[:, :, : group.first].index_select(0, group.base)
    return torch.cat((prefix, own), dim=2)


def _full_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The model's own mask for one whole prompt, [batch, 1, position, position], never skipped."""
    build = ALL_MASK_ATTENTION_FUNCTIONS[_running().implementation]
    return build(*args, **(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _full_mask)
