"""A plan's tables on a device: all integers of a pass in one copy, before the pass."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from fasttrace.errors import PlanError
from fasttrace.experiment.cells import Vector
from fasttrace.planning.packs import Pack, kept
from fasttrace.planning.plan import BlockPlan, Group, Rectangle, Write

Edits = tuple[Tensor, Tensor]
"""Tokens to write, tokens to read."""


@dataclass(frozen=True)
class Writes:
    """What is overwritten at one site of a block.

    Attributes:
        tokens: by values of base runs; None: nothing.
        vectors: tokens to write and rows of `bank` to write there; None: nothing.
        bank: [vector, width of the site, or 1 if all are zero] on the host or the device.
    """

    tokens: Edits | None
    vectors: Edits | None
    bank: Tensor


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
        writes: by site, where there is something to write.
        mlp_computed: (keep, spread), in which base runs' MLP outputs are put in already; None: all tokens are
            computed.
        groups: the pack as rectangles.
    """

    source: Tensor | None
    carried: Tensor | None
    origin: Tensor
    position: Tensor
    writes: Mapping[str, Writes]
    mlp_computed: tuple[Tensor, Tensor] | None
    groups: tuple[GroupOnDevice, ...]


@dataclass(frozen=True)
class PassTables:
    """All integers that a pass needs beside the prompts' tokens, on its device.

    Attributes:
        blocks: one set a block.
        read_tokens, handed_on: as in `packs.Pack`.
        read_writes: vectors in the place of read tokens, if any.
    """

    blocks: list[BlockTables]
    read_tokens: Tensor
    handed_on: Tensor
    read_writes: Writes | None


@kept
def tables_of(pack: Pack, device: torch.device) -> PassTables:
    """All tables of a pack in one copy to a device, before the pass; those of the last few packs are there already."""
    columns = [_columns(block, pack.width) for block in pack.blocks]
    bases = [[group.base for group in block.groups] for block in pack.blocks]
    written = [[table for write in writes for table in (write.to, write.taken_from)] for writes in _all_writes(pack)]
    wanted = [table for block in columns for table in block if table is not None]
    wanted += [*chain(*bases), *chain(*written), pack.read_tokens, pack.handed_on]
    given = iter(on_device(wanted, device))
    tables = [[None if table is None else next(given) for table in block] for block in columns]
    groups = [tuple(_group(group, next(given)) for group in block.groups) for block in pack.blocks]
    banks = _banks(pack, device)
    *writes, at_reads = [_writes(each, given, banks) for each in _all_writes(pack)]
    parts = zip(tables, writes, groups, strict=True)
    blocks = [_block_tables(columns, written, groups) for columns, written, groups in parts]
    read_tokens, handed_on = given
    return PassTables(blocks, read_tokens, handed_on, at_reads.get("block_output"))


def _all_writes(pack: Pack) -> list[tuple[Write, ...]]:
    return [*(block.writes for block in pack.blocks), pack.read_writes]


def _writes(writes: Sequence[Write], given: Iterator[Tensor], banks: Mapping[str, Tensor]) -> dict[str, Writes]:
    found: dict[str, Writes] = {}
    for write in writes:
        edits = next(given), next(given)
        own = found.get(write.site, Writes(None, None, banks.get(write.site, torch.zeros(0, device="cpu"))))
        found[write.site] = replace(own, vectors=edits) if write.of_vectors else replace(own, tokens=edits)
    return found


def _banks(pack: Pack, device: torch.device) -> dict[str, Tensor]:
    """Site -> [vector, width] the vectors that are written there, each at its number in the pack."""
    used: dict[str, set[int]] = {}
    for write in chain(*_all_writes(pack)):
        if write.of_vectors:
            used.setdefault(write.site, set()).update(write.taken_from.tolist())
    return {site: sent(_bank(site, pack.vectors, numbers), device) for site, numbers in used.items()}


def _bank(site: str, vectors: Sequence[Vector], used: set[int]) -> Tensor:
    given = {number: vectors[number].values for number in sorted(used)}
    widths = {tuple(values.shape) for values in given.values() if values is not None}
    if len(widths) > 1 or any(len(shape) != 1 for shape in widths):
        raise PlanError(f"vectors for {site} have shapes {sorted(widths)}: give one number for each unit of the site")
    first = next((values for values in given.values() if values is not None), torch.zeros(1, device="cpu"))
    bank = torch.zeros(len(vectors), len(first), dtype=first.dtype, device="cpu")
    for number, values in given.items():
        if values is not None:
            bank[number] = values.detach().to(bank)
    return bank


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
    return block.source, block.carried, block.origin, block.origin % width, block.mlp_keep, block.mlp_spread


def _block_tables(columns, writes, groups) -> BlockTables:
    source, carried, origin, position, keep, spread = columns
    carried = source if carried is None else carried
    return BlockTables(source, carried, origin, position, writes, None if keep is None else (keep, spread), groups)


def picked(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """`tensor.index_select`, with the index on the tensor's own device: blocks may live on several."""
    return tensor.index_select(axis, index.to(tensor.device, non_blocking=True))
