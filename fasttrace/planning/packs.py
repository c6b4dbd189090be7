"""Plans of several prompts as one, so that all of them run in one forward pass.

The trunk is fed the base rows of all prompts as one batch [base row, width]. Shorter prompts are filled up at the
end with tokens that nothing reads: the first block's growth takes the real ones alone, and no padding is in the pack.
Prompts of one length stand together there: first their base rows, then their restored rows, with equal shapes of all
prompts as neighbours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from fasttrace.experiment.cells import Vector
from fasttrace.memories import remembered
from fasttrace.planning.plan import BlockPlan, Group, Plan, Write

Made = TypeVar("Made")

Places = list[np.ndarray]
"""[plan][token of the plan's own pack] -> token of the common pack."""


KEPT_PACKS = 4
LARGEST_KEPT = 1 << 20
"""Packs of the last passes that are remembered with what was made of them, and the most tokens over all blocks that
such a pack may have: its tables then take 64 MiB at most."""


@dataclass(frozen=True, eq=False)
class Pack:
    """One forward pass for several plans. Equal to itself alone, so that what is made of it can be kept.

    Attributes:
        plans: one a prompt.
        width: tokens of the longest prompt: base rows are fed to the trunk as [base row, width].
        base_rows: tokens of a prompt -> base rows that are as long.
        blocks: tables over the common pack; `origin` is `base row * width + position`, and so is block 0's `source`.
            `Group.base` counts the base rows of one length.
        handed_on: [base row * width] the last block's tokens that stand for the base rows afterwards: the last token
            of a short prompt again and again, and in the last columns the tokens that base rows are read at.
        read_tokens: [plan * read * sample * row] the tokens that each restored row is read at, in the last block's
            pack.
        read_writes: vectors in the place of read tokens, counted in `read_tokens`.
        vectors: those of all plans.
    """

    plans: tuple[Plan, ...]
    width: int
    base_rows: Mapping[int, int]
    blocks: tuple[BlockPlan, ...]
    handed_on: np.ndarray
    read_tokens: np.ndarray
    read_writes: tuple[Write, ...]
    vectors: tuple[Vector, ...]

    @property
    def n_base(self) -> int:
        """Base rows of all prompts."""
        return sum(self.base_rows.values())


def pack_of(plans: Sequence[Plan]) -> Pack:
    """The pack of plans for one model; that of a single plan has the plan's own tables. Small ones are kept."""
    return (_kept_pack if _is_small(plans) else _pack_of)(tuple(plans))


def kept(make: Callable[[Pack, torch.device], Made]) -> Callable[[Pack, torch.device], Made]:
    """Remembers what a function makes of a pack for a device, if the pack is small."""
    keep = remembered(KEPT_PACKS, about="packs")(make)

    @wraps(make)
    def of(pack: Pack, device: torch.device) -> Made:
        return (keep if _is_small(pack.plans) else make)(pack, device)

    return of


def _is_small(plans: Sequence[Plan]) -> bool:
    return sum(int(plan.n_tokens.sum()) for plan in plans) <= LARGEST_KEPT


def _pack_of(plans: tuple[Plan, ...]) -> Pack:
    merge = _Merge(plans)
    if len(plans) == 1:
        blocks, places = plans[0].blocks, [np.arange(plans[0].blocks[-1].n_tokens)]
    else:
        blocks, places = merge.blocks()
    reads = [place[plan.read_tokens.reshape(-1)] for place, plan in zip(places, plans, strict=True)]
    starts = np.cumsum([0, *map(len, reads)])
    at = [start + np.arange(len(own)) for start, own in zip(starts, reads, strict=False)]
    return Pack(
        plans,
        merge.width,
        merge.base_rows,
        blocks,
        handed_on=np.concatenate(merge.ends(places)),
        read_tokens=np.concatenate(reads),
        read_writes=merge.writes([plan.read_writes for plan in plans], at),
        vectors=tuple(vector for plan in plans for vector in plan.vectors),
    )


_kept_pack = remembered(KEPT_PACKS, about="packs")(_pack_of)


def peak_tokens(plans: Sequence[Plan]) -> int:
    """Tokens of the largest pack that the plans make together."""
    return int(np.sum([plan.n_tokens for plan in plans], axis=0).max())


class _Piece(NamedTuple):
    """Neighbouring rows of one shape in one plan.

    Attributes:
        restored: they are not base rows.
        plan: its number.
        rows: the rows, with the base rows' numbers among all that are as long.
    """

    restored: bool
    plan: int
    rows: Group

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What pieces have in common that make one rectangle, in the order of the pack: whole rows and tiles first."""
        rows = self.rows
        return rows.n_positions, rows.first, -rows.stop, -rows.tile_rows


class _Merge:
    """Puts plans together, block by block.

    Attributes:
        width, base_rows: as in `Pack`.
        row: [plan] its first base row among all.
        row_of_length: [plan] its first base row among those that are as long.
        first_vector: [plan] its first vector among all.
    """

    def __init__(self, plans: Sequence[Plan]):
        self.plans = plans
        self.width = max(plan.shape.n_positions for plan in plans)
        self.base_rows: dict[int, int] = {}
        self.row, self.row_of_length = [], []
        for plan in plans:
            length = plan.shape.n_positions
            self.row.append(sum(self.base_rows.values()))
            self.row_of_length.append(self.base_rows.get(length, 0))
            self.base_rows[length] = self.row_of_length[-1] + plan.n_base
        self.first_vector = np.cumsum([0, *(len(plan.vectors) for plan in plans)])

    def blocks(self) -> tuple[tuple[BlockPlan, ...], Places]:
        """All blocks, and the last one's places."""
        places = [self._fed(number, np.arange(plan.n_base * plan.shape.n_positions)) for number, plan in self._each()]
        merged = []
        for number in range(self.plans[0].shape.n_layers):
            parts = [plan.blocks[number] for plan in self.plans]
            before, (places, groups) = places, self._laid_out(parts)
            merged.append(self._block(parts, before, places, groups))
        return tuple(merged), places

    def ends(self, places: Places) -> list[np.ndarray]:
        """[plan][base row * width] see `Pack.handed_on`."""
        return [places[number][self._repeated_ends(plan)] for number, plan in self._each()]

    def _repeated_ends(self, plan: Plan) -> np.ndarray:
        length = plan.shape.n_positions
        position = np.minimum(np.arange(self.width), length - 1)
        reads = plan.shape.read_positions
        position[self.width - len(reads) :] = reads
        return np.add.outer(np.arange(plan.n_base) * length, position).reshape(-1)

    def _each(self) -> Iterator[tuple[int, Plan]]:
        return enumerate(self.plans)

    def _fed(self, number: int, base_tokens: np.ndarray) -> np.ndarray:
        """Base tokens of a plan -> where they stand in [base row * width]."""
        row, position = np.divmod(base_tokens, self.plans[number].shape.n_positions)
        return (self.row[number] + row) * self.width + position

    def _laid_out(self, parts: Sequence[BlockPlan]) -> tuple[Places, tuple[Group, ...]]:
        """Where every token stands in a block's common pack, and its rectangles."""
        places = [np.empty(part.n_tokens, dtype=np.int64) for part in parts]
        order = attrgetter("shape", "restored", "plan", "rows.start")
        groups, at = [], 0
        for _, same in groupby(sorted(self._pieces(parts), key=order), key=attrgetter("shape")):
            begin, pieces = at, list(same)
            for _, plan, rows in pieces:
                n_tokens = len(rows.base) * rows.length
                places[plan][rows.start : rows.start + n_tokens] = np.arange(at, at + n_tokens)
                at += n_tokens
            bases = np.concatenate([piece.rows.base for piece in pieces])
            groups.append(replace(pieces[0].rows, start=begin, base=bases))
        return places, tuple(groups)

    def _pieces(self, parts: Sequence[BlockPlan]) -> Iterator[_Piece]:
        for (number, plan), part in zip(self._each(), parts, strict=True):
            for group in part.groups:
                base = self.row_of_length[number] + group.base
                if not group.has_base_rows:
                    yield _Piece(True, number, replace(group, base=base))
                    continue
                yield _Piece(False, number, replace(group, base=base[: plan.n_base]))
                start = plan.n_base * plan.shape.n_positions
                yield _Piece(True, number, replace(group, start=start, base=base[plan.n_base :]))

    def _block(
        self, parts: Sequence[BlockPlan], before: Places, places: Places, groups: tuple[Group, ...]
    ) -> BlockPlan:
        keep, spread = _merged_mlp(parts, places)
        source = carried = None
        if any(part.source is not None for part in parts):
            source = _merged([_or_same(part.source, part) for part in parts], before, places)
        if any(part.carried is not None for part in parts):
            carried = _merged([_or_same(_first(part.carried, part.source), part) for part in parts], before, places)
        origin = [self._fed(number, part.origin) for number, part in enumerate(parts)]
        return BlockPlan(
            source=source,
            carried=carried,
            origin=_merged(origin, None, places),
            groups=groups,
            writes=self.writes([part.writes for part in parts], places),
            mlp_keep=keep,
            mlp_spread=spread,
        )

    def writes(self, of_plans: Sequence[tuple[Write, ...]], places: Places) -> tuple[Write, ...]:
        """The writes of all plans, one for each site and kind of source."""
        found: dict[tuple[str, bool], list[Write]] = {}
        for number, (writes, place) in enumerate(zip(of_plans, places, strict=True)):
            for write in writes:
                source = write.taken_from
                taken_from = source + self.first_vector[number] if write.of_vectors else place[source]
                moved = replace(write, to=place[write.to], taken_from=taken_from)
                found.setdefault((write.site, write.of_vectors), []).append(moved)
        return tuple(map(_joined, found.values()))


def _joined(writes: Sequence[Write]) -> Write:
    to = np.concatenate([write.to for write in writes])
    return replace(writes[0], to=to, taken_from=np.concatenate([write.taken_from for write in writes]))


def _first(value: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    return other if value is None else value


def _or_same(index: np.ndarray | None, part: BlockPlan) -> np.ndarray:
    return np.arange(part.n_tokens) if index is None else index


def _tokens(tokens: Sequence[np.ndarray], places: Places) -> np.ndarray:
    return np.concatenate([place[own] for place, own in zip(places, tokens, strict=True)])


def _merged(tables: Sequence[np.ndarray], before: Places | None, places: Places) -> np.ndarray:
    """Tables over tokens as one; what they hold are tokens of the packs `before`, or what it is (None)."""
    merged = np.empty(sum(map(len, places)), dtype=np.int64)
    for number, (table, place) in enumerate(zip(tables, places, strict=True)):
        merged[place] = table if before is None else before[number][table]
    return merged


def _merged_mlp(parts: Sequence[BlockPlan], places: Places) -> tuple[np.ndarray | None, np.ndarray | None]:
    """`mlp_keep` and `mlp_spread` of the common pack."""
    if all(part.mlp_keep is None for part in parts):
        return None, None
    kept = [_or_same(part.mlp_keep, part) for part in parts]
    computed = np.zeros(sum(map(len, places)), dtype=bool)
    computed[_tokens(kept, places)] = True
    spreads = [_or_same(part.mlp_spread, part) for part in parts]
    taken_from = [keep[spread] for keep, spread in zip(kept, spreads, strict=True)]
    rank = np.cumsum(computed) - 1
    return np.flatnonzero(computed), rank[_merged(taken_from, places, places)]
