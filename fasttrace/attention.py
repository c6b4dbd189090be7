"""Ragged attention over a pack, through transformers' attention and mask interfaces.

Registered once under one name. The arithmetic is the model's own eager or sdpa function, called once per group of
rows with the same first position. A tile is one sequence to that function: the queries first..T-1 of a few rows of
one base row, against the base row's keys before `first` and their own from there on, under a mask that is the model's
own, block by block. Scaling, grouped heads, soft caps, sinks and sliding windows are therefore the model's.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fasttrace.errors import EngineError

NAME = "fasttrace_ragged"


@dataclass(frozen=True)
class GroupOnDevice:
    """`plan.Group` with its base rows as an index tensor on a device."""

    first: int
    start: int
    tile_rows: int
    n_tiles: int
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
        masks: of tiles, by the mask they are made from and the tile's shape.
    """

    implementation: str
    n_base: int
    n_positions: int
    groups: tuple[GroupOnDevice, ...] = ()
    calls: int = 0
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def tile_mask(self, mask: Tensor, group: GroupOnDevice) -> Tensor:
        """The mask of a tile, [1, 1 or head, tile token, first + tile token], made once a pass.

        Args:
            mask: the model's, [batch, 1 or head, position, position]; bool, or added to the scores.
            group: the tile's shape.
        """
        key = (id(mask), group.first, group.tile_rows)
        if key not in self.masks:
            self.masks[key] = _block_diagonal(mask[:1, :, group.first : self.n_positions], group)
        return self.masks[key]


_STATE: ContextVar[RaggedState | None] = ContextVar("fasttrace_ragged_state", default=None)


@contextmanager
def ragged_attention(model: PreTrainedModel, state: RaggedState) -> Iterator[None]:
    """While open, the model attends through the pack.

    Raises:
        EngineError: a pass is running already, or the model keeps its own attention.
    """
    if _STATE.get() is not None:
        raise EngineError("a packed pass is running in this context already; run one after the other")
    before: Any = model.config._attn_implementation
    token = _STATE.set(state)
    try:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise EngineError(f"{type(model).__name__} does not take its attention from transformers' interface")
        yield
    finally:
        model.set_attn_implementation(before)
        _STATE.reset(token)


def safe_implementation(model: PreTrainedModel) -> str:
    """The implementation whose arithmetic the groups are computed with: the model's, if it takes any mask."""
    chosen = model.config._attn_implementation
    if chosen in ("eager", "sdpa"):
        return chosen
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attends group by group.

    Args:
        module: the attention module that calls.
        query: [1, head, token, d_head].
        key: [1, kv_head, token, d_head].
        value: the same.
        attention_mask: of one whole prompt, see `_full_mask`.
        kwargs: handed on as they are.

    Returns:
        [1, token, head, d_head], and no weights.
    """
    state = _running()
    state.calls += 1
    function = _arithmetic(module, state.implementation)
    n_base, n_positions = state.n_base, state.n_positions
    if attention_mask is None:
        raise EngineError(f"{type(module).__name__} was given no mask; use engine='rows'")
    base_key, base_value = (_rectangle(x, 0, n_base, n_positions) for x in (key, value))
    outputs = []
    for group in state.groups:
        length = group.tile_rows * (n_positions - group.first)
        own_key, own_value = (_rectangle(x, group.start, group.n_tiles, length) for x in (key, value))
        attended, _ = function(
            module,
            _rectangle(query, group.start, group.n_tiles, length),
            _after_prefix(base_key, own_key, group),
            _after_prefix(base_value, own_value, group),
            state.tile_mask(attention_mask, group),
            **kwargs,
        )
        outputs.append(attended.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _block_diagonal(mask: Tensor, group: GroupOnDevice) -> Tensor:
    """[..., query, position] of one row -> [..., tile query, first + tile query] of a tile of such rows."""
    rows, length = group.tile_rows, mask.shape[-2]
    prefix, own = mask[..., : group.first], mask[..., group.first : group.first + length]
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    same_row = torch.eye(rows, dtype=torch.bool, device=mask.device)[:, None, :, None]
    blocks = torch.where(
        same_row, own[..., None, :, None, :], torch.full_like(own[..., :1, :1], closed)[..., None, None]
    )
    return torch.cat((prefix.repeat(1, 1, rows, 1), blocks.flatten(-2).flatten(-3, -2)), dim=-1)


def _running() -> RaggedState:
    state = _STATE.get()
    if state is None:
        raise EngineError(f"attention {NAME!r} works inside a fasttrace pass only; set the model back to 'sdpa'")
    return state


def _arithmetic(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def _rectangle(states: Tensor, start: int, n_sequences: int, length: int) -> Tensor:
    """[1, head, token, d_head] -> [sequence, head, length, d_head], a view."""
    tokens = states[0, :, start : start + n_sequences * length]
    return rearrange(tokens, "head (sequence token) d_head -> sequence head token d_head", token=length)


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
