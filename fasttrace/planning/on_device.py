"""A plan's tables on a device: all integers of a pass in one copy, before the pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fasttrace.planning.packs import Pack, kept
from fasttrace.planning.plan import BlockPlan, Group, Rectangle

Edits = tuple[Tensor, Tensor]
"""Tokens to write, tokens to read."""


@dataclass(frozen=True)
class GroupOnDevice(Rectangle):
    """`plan.Group` with its base rows as an index tensor on a device."""

    n_tiles: int
    base: Tensor

    def of_mask(self, mask: Tensor) -> Tensor:
        """[batch, 1 or head, position, position] of the longest prompt -> [1, ..., query, position] of a row."""
        return mask[:1, :, self.first : self.stop, : self.stop]

    def by_row(self) -> "GroupOnDevice":
        """The same rows, one to a tile."""
        base = self.base.repeat_interleave(self.tile_rows)
        return replace(self, tile_rows=1, n_tiles=self.n_tiles * self.tile_rows, base=base)


@dataclass(frozen=True)
class BlockTables:
    """`plan.BlockPlan` as int64 tensors.

    Attributes:
        source, carried, origin: as there.
        position: [token] prompt position of each token.
        attention, mlp: edits; None where there is nothing to do.
        mlp_computed: (keep, spread), in which the MLP's edits are applied already; None: all tokens are computed.
        groups: the pack as rectangles.
    """

    source: Tensor | None
    carried: Tensor | None
    origin: Tensor
    position: Tensor
    attention: Edits | None
    mlp: Edits | None
    mlp_computed: tuple[Tensor, Tensor] | None
    groups: tuple[GroupOnDevice, ...]


@dataclass(frozen=True)
class PassTables:
    """All integers that a pass needs beside the prompts' tokens, on its device.

    Attributes:
        blocks: one set a block.
        last_tokens, handed_on: as in `packs.Pack`.
    """

    blocks: list[BlockTables]
    last_tokens: Tensor
    handed_on: Tensor


@kept
def tables_of(pack: Pack, device: torch.device) -> PassTables:
    """All tables of a pack in one copy to a device, before the pass; those of the last few packs are there already."""
    columns = [_columns(block, pack.width) for block in pack.blocks]
    bases = [[group.base for group in block.groups] for block in pack.blocks]
    wanted = [table for block in columns for table in block if table is not None]
    wanted += [*chain(*bases), pack.last_tokens, pack.handed_on]
    given = iter(on_device(wanted, device))
    tables = [[None if table is None else next(given) for table in block] for block in columns]
    groups = [tuple(_group(group, next(given)) for group in block.groups) for block in pack.blocks]
    blocks = [_block_tables(*block, groups=each) for block, each in zip(tables, groups, strict=True)]
    return PassTables(blocks, *given)


def _group(group: Group, base: Tensor) -> GroupOnDevice:
    return GroupOnDevice(
        group.n_positions, group.first, group.stop, group.start, group.tile_rows, len(group.base), base
    )


def on_device(tables: Sequence[np.ndarray], device: torch.device) -> Sequence[Tensor]:
    """Tables of one type as tensors that share one buffer, see `sent`."""
    if not tables:
        return ()
    return sent(torch.from_numpy(np.concatenate(tables)), device).split([len(table) for table in tables])


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; from pinned memory, so that nothing waits for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _columns(block: BlockPlan, width: int) -> tuple[np.ndarray | None, ...]:
    has_attention, has_mlp = len(block.attention_to) > 0, len(block.mlp_to) > 0
    return (
        block.source,
        block.carried,
        block.origin,
        block.origin % width,
        block.attention_to if has_attention else None,
        block.attention_from if has_attention else None,
        block.mlp_to if has_mlp else None,
        block.mlp_from if has_mlp else None,
        block.mlp_keep,
        block.mlp_spread,
    )


def _block_tables(source, carried, origin, position, *edits, groups) -> BlockTables:
    attention, mlp, mlp_computed = (None if edits[i] is None else (edits[i], edits[i + 1]) for i in (0, 2, 4))
    carried = source if carried is None else carried
    return BlockTables(source, carried, origin, position, attention, mlp, mlp_computed, groups)


def picked(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """`tensor.index_select`, with the index on the tensor's own device: blocks may live on several."""
    return tensor.index_select(axis, index.to(tensor.device, non_blocking=True))
