"""Attention of families that keep their own code: each module's own forward, called once per group of rows.

A cache that holds nothing but the base rows' keys and values makes such a forward attend from positions first..T-1
of its rows to what came before them. Everything outside attention stays packed.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasttrace.engines.attention_ragged import PackState, after_prefix, packed_pass
from fasttrace.engines.blocks import put
from fasttrace.errors import EngineError
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.axes import Path
from fasttrace.models.hooks import first_of, hidden_argument, replaced_forward, with_first
from fasttrace.planning.on_device import Edits, GroupOnDevice, Writes

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


@contextmanager
def forked_attention(anatomy: Anatomy, state: PackState) -> Iterator["Fork"]:
    """While open, every attention module is called per group of rows.

    Raises:
        EngineError: a pass is running already, or an attention module takes no cache.
    """
    fork = Fork(anatomy, state)
    with ExitStack() as stack:
        stack.enter_context(packed_pass(state))
        for mixer in filter(None, anatomy.parts.mixers):
            cache = _cache_argument(mixer)
            stack.enter_context(replaced_forward(mixer, partial(fork.attend, mixer.forward, cache)))
        yield fork


class Fork:
    """One pass of the fork engine.

    Attributes:
        group: the rows that an attention module is working on.
        base_output: [token, d_model] of the base rows, from the module that `restore` is a hook of.
    """

    def __init__(self, anatomy: Anatomy, state: PackState):
        self.axes, self.state = anatomy.mixer_axes, state
        self.group = GroupOnDevice(0, 0, 0, 0, 1, 0, torch.zeros(0, device="cpu"))
        self.base_output = torch.zeros(0, device="cpu")

    def attend(self, forward: Callable[..., Any], cache: str, *args: Any, **kwargs: Any) -> Any:
        """An attention module's forward over the pack, in place of its own."""
        self.state.calls += 1
        prefix, outputs, form = _Prefix(), [], None
        signature = inspect.signature(forward)
        for group in map(GroupOnDevice.by_row, self.state.groups):
            self.group = prefix.group = group
            row_args, row_kwargs = self._rows((args, kwargs), ())
            call = signature.bind(*row_args, **row_kwargs)
            call.arguments[cache] = prefix
            if "attention_mask" in signature.parameters and call.arguments.get("attention_mask") is None:
                call.arguments["attention_mask"] = self._causal_mask(hidden_argument(args, kwargs).device)
            form = forward(*call.args, **call.kwargs)
            outputs.append(first_of(form).flatten(0, 1))
        return with_first(form, torch.cat(outputs).unsqueeze(0))

    def restore(self, hidden: Tensor, writes: Writes) -> Tensor:
        """Hook on a module inside the attention module, which sees one group after the other, base rows first.

        Args:
            hidden: [row, position, d_model] of the group.
            writes: base runs' values and vectors, counted in tokens of the pack.
        """
        tokens = hidden.flatten(0, -2).clone()
        if self.group.start == 0:
            self.base_output = hidden.flatten(0, -2)
        if writes.tokens is not None:
            to, taken_from = self._mine(writes.tokens, tokens)
            tokens.index_copy_(0, to, self.base_output.index_select(0, taken_from))
        if writes.vectors is not None:
            put(tokens, 0, replace(writes, vectors=self._mine(writes.vectors, tokens)))
        return tokens.unflatten(0, hidden.shape[:-1])

    def _mine(self, edits: Edits, tokens: Tensor) -> Edits:
        """Those of the group, counted in its tokens."""
        to, taken_from = (index.to(tokens.device) for index in edits)
        mine = (to >= self.group.start) & (to < self.group.start + len(tokens))
        return to[mine] - self.group.start, taken_from[mine]

    def _rows(self, value: Any, path: Path) -> Any:
        if isinstance(value, Tensor):
            return self._rows_of(value, path)
        if type(value) in (tuple, list):
            nested = (self._rows(item, (*path, number)) for number, item in enumerate(value))
            return type(value)(nested)
        if type(value) is dict:
            return {name: self._rows(item, (*path, name)) for name, item in value.items()}
        return value

    def _rows_of(self, tensor: Tensor, path: Path) -> Tensor:
        """An argument for the rows of the group, by its kind: of tokens, a mask, of base rows, or of all rows."""
        state, group = self.state, self.group
        if path == (0, 0) or path == (1, "hidden_states"):
            return self._rectangle(tensor, 1)
        axes = self.axes.of(path[1:], tensor, state.n_base, state.n_positions)
        if len(axes.token) == 2:
            return self._mask(tensor, axes.row)
        if axes.token and tensor.shape[axes.token[0]] == state.n_tokens:
            return self._rectangle(tensor, axes.token[0])
        if axes.row is None:
            return tensor
        by_row = tensor.unflatten(axes.row, (state.n_base, axes.per_row))
        return by_row.index_select(axes.row, group.base.to(tensor.device)).flatten(axes.row, axes.row + 1)

    def _causal_mask(self, device: torch.device) -> Tensor:
        """What a model leaves to sdpa, which would take the group's queries for those of positions from 0 on."""
        n_positions = self.state.n_positions
        causal = torch.ones(1, 1, n_positions, n_positions, dtype=torch.bool, device=device).tril()
        return self._mask(causal, None)

    def _rectangle(self, tensor: Tensor, axis: int) -> Tensor:
        """[..., 1, token, ...] -> [..., row, position, ...]."""
        length = self.group.length
        part = tensor.narrow(axis, self.group.start, self.group.n_tiles * length)
        return part.squeeze(axis - 1).unflatten(axis - 1, (self.group.n_tiles, length))

    def _mask(self, mask: Tensor, row_axis: int | None) -> Tensor:
        """[base row or 1, 1 or head, position, position] -> [row, ..., query, position]."""
        rows = mask.narrow(-2, self.group.first, self.state.n_positions - self.group.first)
        if row_axis is None:
            return rows.expand(self.group.n_tiles, *rows.shape[1:])
        return rows.index_select(row_axis, self.group.base.to(mask.device))


class _Prefix:
    """Stands for a cache of earlier keys and values: those of the base rows, which come first in a block."""

    def __init__(self):
        self.group = GroupOnDevice(0, 0, 0, 0, 1, 0, torch.zeros(0, device="cpu"))
        self.base: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [row, head, position, d_head] of the group, after those of its base rows."""
        if self.base is None:
            self.base = key, value
        base_key, base_value = self.base
        return after_prefix(base_key, key, self.group), after_prefix(base_value, value, self.group)

    def get_seq_length(self, *_: Any) -> int:
        """Positions before the group's."""
        return self.group.first


def _cache_argument(mixer: nn.Module) -> str:
    names = inspect.signature(mixer.forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in names:
            return name
    raise EngineError(f"{type(mixer).__name__} takes no cache of earlier keys and values; use engine='rows'")
