"""Ragged attention over a pack, through transformers' attention and mask interfaces.

Registered once under one name. The arithmetic is the model's own eager or sdpa function, called once per group of
rows with the same first position. A tile is one sequence to that function: the queries first..T-1 of a few rows of
one base row, against the base row's keys before `first` and their own from there on, under a mask that is the model's
own, block by block. Scaling, grouped heads, soft caps, sinks and sliding windows are therefore the model's.

Older model code has no interface but a method `_attn(query, key, value, mask)`; that is called per group instead.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fasttrace.errors import EngineError
from fasttrace.memories import by_module, remembered
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import here, modules_of, replaced_method
from fasttrace.planning.on_device import GroupOnDevice

if TYPE_CHECKING:
    from fasttrace.fusing.attention import KernelState

logger = logging.getLogger("fasttrace")

NAME = "fasttrace_ragged"


@dataclass
class PackState:
    """What attention has to know; one lives for one forward pass.

    Attributes:
        base_rows: tokens of a prompt -> base rows that are as long.
        n_positions: tokens of the longest prompt.
        implementation: the model's own attention implementation, "eager" or "sdpa".
        groups: of the block being computed; the engine sets it.
        calls: attention calls so far; the engine checks that every block made one.
        masks: of tiles, by the mask they are made from and the tile's shape; with that mask, so that it lives on.
        kernel: where attention may be one launch a block; the engine sets it.
        owner: whose calls attend so; those of other threads attend as the model does.
    """

    base_rows: Mapping[int, int]
    n_positions: int
    implementation: str = "eager"
    groups: tuple[GroupOnDevice, ...] = ()
    calls: int = 0
    masks: dict[tuple[int, int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    kernel: "KernelState | None" = None
    owner: object = field(default_factory=here)

    @property
    def n_base(self) -> int:
        """Base rows of all prompts."""
        return sum(self.base_rows.values())

    @property
    def n_tokens(self) -> int:
        """Tokens of the pack."""
        last = self.groups[-1]
        return last.start + last.n_tiles * last.length

    def base_states(self, states: Tensor) -> dict[int, Tensor]:
        """Prompt length -> [base row, head, position, d_head] of a pack's keys or values."""
        starts = [(group.n_positions, group.start) for group in self.groups if group.has_base_rows]
        return {length: _rectangle(states, start, self.base_rows[length], length) for length, start in starts}

    def tile_mask(self, mask: Tensor, group: GroupOnDevice) -> Tensor:
        """The mask of a tile, [1, 1 or head, tile token, first + tile token], made once a pass.

        Args:
            mask: the model's, [batch, 1 or head, position, position]; bool, or added to the scores.
            group: the tile's shape.
        """
        key = (id(mask), group.first, group.stop, group.tile_rows)
        if key not in self.masks:
            self.masks[key] = mask, _block_diagonal(group.of_mask(mask), group)
        return self.masks[key][1]


_STATE: ContextVar[PackState | None] = ContextVar("fasttrace_pack_state", default=None)


@contextmanager
def packed_pass(state: PackState) -> Iterator[None]:
    """While open, this is the pass that attention works for."""
    token = _STATE.set(state)
    try:
        yield
    finally:
        _STATE.reset(token)


@contextmanager
def ragged_attention(anatomy: Anatomy, state: PackState) -> Iterator[None]:
    """While open, the model attends through the pack.

    Raises:
        EngineError: the model keeps its own attention.
    """
    methods = [_with_attn_method(mixer) for mixer in anatomy.parts.mixers]
    with ExitStack() as stack:
        stack.enter_context(packed_pass(state))
        if all(methods):
            for module in filter(None, methods):
                stack.enter_context(replaced_method(module, "_attn", partial(_attend_by_method, module._attn)))
        else:
            state.implementation = safe_implementation(anatomy)
            stack.enter_context(implementation_set(anatomy, NAME))
        yield


@dataclass
class _Set:
    """A configuration whose attention implementation is another while passes run.

    Attributes:
        config: the configuration.
        own: what somebody had set: threads that call the model meanwhile attend with that.
        passes: how many are running; models may share a configuration.
    """

    config: Any
    own: str | None
    passes: int = 0


_SET: dict[int, _Set] = {}
"""By the id of the configuration."""
_SETTING = Lock()
_TAKERS = by_module()
"""A model -> an implementation and the ids of its configurations, and those that took the implementation."""


@contextmanager
def implementation_set(anatomy: Anatomy, name: str) -> Iterator[None]:
    """While open, the language model's attention implementation is another; afterwards every part has its own.

    Raises:
        EngineError: the model does not let it be set.
    """
    owner = anatomy.decoder if isinstance(anatomy.decoder, PreTrainedModel) else anatomy.model
    configs = {id(m.config): m.config for m in modules_of(anatomy.model) if isinstance(m, PreTrainedModel)}
    with _SETTING:
        for key, config in configs.items():
            _SET.setdefault(key, _Set(config, config._attn_implementation)).passes += 1
    try:
        _set_implementation(owner, configs, name)
        if owner.config._attn_implementation != name:
            raise EngineError(
                f"{type(anatomy.model).__name__} does not take its attention from transformers' interface"
            )
        yield
    finally:
        with _SETTING:
            for key, config in configs.items():
                _SET[key].passes -= 1
                if not _SET[key].passes:
                    config._attn_implementation_internal = _SET[key].own
                    del _SET[key]


def _set_implementation(owner: Any, configs: Mapping[int, Any], name: str) -> None:
    """As `PreTrainedModel.set_attn_implementation`, which walks over all modules, in a model's first pass."""
    known, taking = _TAKERS.get(owner, ((), ()))
    if known == (name, *configs):
        for config in taking:
            config._attn_implementation_internal = name
        return
    owner.set_attn_implementation(name)
    taking = tuple(config for config in configs.values() if config._attn_implementation == name)
    _TAKERS[owner] = (name, *configs), taking


def own_implementation(config: Any) -> str:
    """The attention implementation that somebody has set, whatever a pass has set meanwhile.

    Raises:
        EngineError: it is fasttrace's, and no pass is running.
    """
    found = _SET.get(id(config))
    own = config._attn_implementation if found is None else found.own
    if own == NAME:
        raise EngineError(f"attention {NAME!r} works inside a fasttrace pass only; set the model back to 'sdpa'")
    return own or "eager"


def safe_implementation(anatomy: Anatomy) -> str:
    """The implementation whose arithmetic the groups are computed with: the model's, if it takes any mask.

    Flash and flex attention know soft caps and sinks as eager functions do, and sdpa does not.
    """
    chosen = own_implementation(anatomy.model.config)
    if chosen in ("eager", "sdpa"):
        return chosen
    eager = [_arithmetic(mixer, "eager") for mixer in anatomy.parts.mixers if mixer is not None]
    has_caps = any(function is not None and "softcap" in signature(function).parameters for function in eager)
    has_sinks = any(getattr(mixer, "sinks", None) is not None for mixer in anatomy.parts.mixers)
    fits = getattr(anatomy.model, "_supports_sdpa", False) and not has_caps and not has_sinks
    safe = "sdpa" if fits else "eager"
    logger.info("attention %r takes no mask of a pack: tracing computes it with %r", chosen, safe)
    return safe


def _with_attn_method(mixer: nn.Module | None) -> Any:
    for module in mixer.modules() if mixer is not None else ():
        if callable(getattr(module, "_attn", None)):
            return module
    return None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Attends group by group, for transformers' interface.

    Args:
        module: the attention module that calls.
        query: [1, head, token, d_head].
        key: [1, kv_head, token, d_head].
        value: the same.
        attention_mask: of one whole prompt, see `_full_mask`.
        kwargs: handed on as they are.

    Returns:
        [1, token, head, d_head], and no weights; in another thread what the model's own attention gives there.
    """
    state = _running()
    if state is None:
        own = _arithmetic(module, own_implementation(module.config))
        return own(module, query, key, value, attention_mask, **kwargs)
    function = _arithmetic(module, state.implementation)
    mask = _checked(state, module, query, key, attention_mask)
    if state.kernel is not None:
        heeded = {name: given for name, given in kwargs.items() if name not in _unheeded(function)}
        attended = state.kernel.attend(module, query, key, value, mask, heeded)
        if attended is not None:
            return attended, None
    base_keys, base_values = state.base_states(key), state.base_states(value)
    outputs = []
    for group in _groups(state, module):
        own_key, own_value = (_rectangle(x, group.start, group.n_tiles, group.length) for x in (key, value))
        attended, _ = function(
            module,
            _rectangle(query, group.start, group.n_tiles, group.length),
            after_prefix(base_keys[group.n_positions], own_key, group),
            after_prefix(base_values[group.n_positions], own_value, group),
            state.tile_mask(mask, group),
            **kwargs,
        )
        outputs.append(attended.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0), None


def _groups(state: PackState, module: nn.Module) -> tuple[GroupOnDevice, ...]:
    """The rectangles of the block, with no more keys than a module masks with a table of its own.

    GPT-2's eager attention has such a table in early transformers 5, as long as its longest prompt.
    """
    table = getattr(module, "bias", None)
    if not isinstance(table, Tensor) or table.dim() != 4:
        return state.groups
    longest = table.shape[-1]
    return tuple(g.by_row() if g.first + g.length > longest else g for g in state.groups)


def _attend_by_method(
    method: Callable[..., tuple[Tensor, Any]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends group by group, in place of a module's `_attn`; returns [1, head, token, d_head].

    The method may build masks of its own from the numbers of queries and keys, so a row is a sequence here.
    """
    state = _running()
    assert state is not None, "the method is replaced inside a pass only"
    mask = _checked(state, getattr(method, "__self__", None), query, key, attention_mask)
    base_keys, base_values = state.base_states(key), state.base_states(value)
    outputs = []
    for group in map(GroupOnDevice.by_row, state.groups):
        own_key, own_value = (_rectangle(x, group.start, group.n_tiles, group.length) for x in (key, value))
        attended, _ = method(
            _rectangle(query, group.start, group.n_tiles, group.length),
            after_prefix(base_keys[group.n_positions], own_key, group),
            after_prefix(base_values[group.n_positions], own_value, group),
            group.of_mask(mask),
            **kwargs,
        )
        outputs.append(rearrange(attended, "row head position d_head -> head (row position) d_head"))
    return torch.cat(outputs, dim=1).unsqueeze(0), None


def _checked(state: PackState, module: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, if this call is the one the engine expects of a block."""
    state.calls += 1
    name = type(module).__name__
    if mask is None:
        raise EngineError(f"{name} was given no mask; use engine='rows'")
    if not query.shape[-2] == key.shape[-2] == state.n_tokens:
        raise EngineError(
            f"{name} attends from {query.shape[-2]} tokens to {key.shape[-2]}, the pack has {state.n_tokens}; "
            "use engine='rows'"
        )
    return mask


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


def _running() -> PackState | None:
    """The pass of whoever calls; None in a thread that calls the model while another traces it."""
    state = _STATE.get()
    return state if state is not None and state.owner is here() else None


def _arithmetic(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Any]]:
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


@remembered()
def _unheeded(function: Callable[..., tuple[Tensor, Any]]) -> frozenset[str]:
    """Arguments that a kernel would heed, and that the pass's own function lets go by.

    Until it was taught to refuse, transformers' sdpa took a soft cap and computed without: so Gemma 2 has none there.
    Eager functions find sinks in their module, whatever they are called.
    """
    takes = signature(function).parameters
    is_sdpa = function is ALL_ATTENTION_FUNCTIONS.get("sdpa")
    return frozenset(({"softcap"} - takes.keys()) | ({"s_aux"} if is_sdpa else set()))


def _rectangle(states: Tensor, start: int, n_sequences: int, length: int) -> Tensor:
    """[1, head, token, d_head] -> [sequence, head, length, d_head], a view."""
    tokens = states[0, :, start : start + n_sequences * length]
    return tokens.unflatten(1, (n_sequences, length)).transpose(0, 1)


def after_prefix(base: Tensor, own: Tensor, group: GroupOnDevice) -> Tensor:
    """Keys or values of sequences with those of their base rows before them, [sequence, head, first + length, d_head].

    Args:
        base: [base row, head, position, d_head].
        own: [sequence, head, length, d_head].
        group: which base row each sequence belongs to, and from which position on it has its own.
    """
    if group.first == 0:
        return own
    prefix = base[:, :, : group.first].index_select(0, group.base.to(base.device, non_blocking=True))
    return torch.cat((prefix, own), dim=2)


def _full_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The model's own mask for one whole prompt, [batch, 1, position, position], never skipped.

    In a thread that calls the model while another traces it, whatever the model's own implementation gives.
    """
    state = _running()
    if state is None:
        own = own_implementation(kwargs["config"])
        return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, **kwargs) if own in ALL_MASK_ATTENTION_FUNCTIONS else None
    build = ALL_MASK_ATTENTION_FUNCTIONS[state.implementation]
    if state.kernel is not None:
        build = state.kernel.watched(build)
    return build(*args, **(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _full_mask)
