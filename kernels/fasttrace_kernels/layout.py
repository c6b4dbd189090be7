"""Which keys each token of a pack sees, as integer tables: built once per layout, shared by all layers.

A pack is a list of tokens that rows lie in one after the other. A row holds the positions `first` to
`first + length` of its prompt; the keys before `first` are those of its base row, a row of the pack that holds the
prompt from position 0 on. A query therefore sees two intervals of the pack:

    A  base_start .. base_start + first    the base row's positions before the row's own
    B  start .. the query itself           its own row

A tile is a run of neighbouring tokens whose rows share one base row, so that interval A is read once for all of them.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

TILE_FIELDS = 8
"""Numbers a tile has in the table: first token, tokens, base_start, longest prefix, lowest position after a prefix,
and three that keep the next tile aligned."""


@dataclass(frozen=True)
class AttentionLayout:
    """The tables of one pack; `build` makes them.

    Attributes:
        rows: [4, row] start, length, first and base_start of every row with tokens, sorted by start; on the host.
        block: tokens of a tile, at most.
        longest: tokens of the longest prompt, prefix included.
        tiles: [tile, TILE_FIELDS] int32, the tile with the most keys first.
        tokens: [token, 2] int32, the first token of a token's row and the first position of that row.
        key_counts: [tile] keys between the first and the last one that a tile reads in A and B; on the host.
    """

    rows: np.ndarray
    block: int
    longest: int
    tiles: Tensor
    tokens: Tensor
    key_counts: np.ndarray

    @classmethod
    def build(cls, start, length, first, base_start, block: int = 32) -> "AttentionLayout":
        """The layout of rows in any order; neighbours with one base row and close `first` fill the best tiles.

        Args:
            start: [row] index of the row's first token in the pack.
            length: [row] tokens of the row; rows without tokens are left out.
            first: [row] first position the row holds.
            base_start: [row] index in the pack of its base row's position 0; not read where `first` is 0.
            block: tokens of a tile; `tile_tokens` says what suits a GPU, 32 suits torch on a CPU.

        Raises:
            ValueError: the rows do not cover the pack, or a base row lies outside of it.
        """
        if block < 1:
            raise ValueError(f"tiles of {block} tokens: pass block >= 1")
        rows = _checked(start, length, first, base_start)
        start, length, first, base_start = rows
        tokens = np.stack((np.repeat(start, length), np.repeat(first, length)), axis=1)
        tiles, key_counts = _tiles(rows, block)
        return cls(
            rows,
            block,
            int((first + length).max(initial=0)),
            torch.from_numpy(tiles.astype(np.int32)),
            torch.from_numpy(tokens.astype(np.int32)),
            key_counts,
        )

    @property
    def n_tokens(self) -> int:
        """Tokens of the pack."""
        return len(self.tokens)

    @property
    def n_tiles(self) -> int:
        """Tiles the pack is cut into."""
        return len(self.tiles)

    def to(self, device: torch.device | str) -> "AttentionLayout":
        """The same layout with its tables on a device."""
        tiles = self.tiles.to(device, non_blocking=True)
        return replace(self, tiles=tiles, tokens=self.tokens.to(device, non_blocking=True))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`arange(start, start + length)` of all pairs, one after the other."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def _checked(*columns) -> np.ndarray:
    """[4, row] the rows that have tokens, sorted by start."""
    columns = [np.asarray(column) for column in columns]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
        raise ValueError(f"start, length, first, base_start differ in shape: {[column.shape for column in columns]}")
    rows = np.stack(columns).astype(np.int64)
    if rows[1:3].min(initial=0) < 0:
        raise ValueError("a row has a negative length or first position")
    rows = rows[:, rows[1] > 0]
    rows = rows[:, np.argsort(rows[0], kind="stable")]
    start, length, first, base_start = rows
    ends = np.cumsum(length)
    if not np.array_equal(start, ends - length):
        wrong = int(np.flatnonzero(start != ends - length)[0])
        raise ValueError(
            f"rows must cover the pack from token 0 on, each token once: the row at {start[wrong]} should start at "
            f"{ends[wrong] - length[wrong]}"
        )
    base_start[first == 0] = 0
    n_tokens = int(ends[-1]) if len(ends) else 0
    if np.any(base_start < 0) or np.any(base_start + first > n_tokens):
        raise ValueError(f"a base row lies outside the pack of {n_tokens} tokens")
    if n_tokens >= 2**31:
        raise ValueError(f"a pack of {n_tokens} tokens: the tables are int32; split it")
    return rows


def _tiles(rows: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The table of tiles, and how many keys each reads."""
    start, length, first, base_start = rows
    pieces = -(-length // block)
    row = np.repeat(np.arange(len(start)), pieces)
    begin = start[row] + ranges(np.zeros_like(pieces), pieces) * block
    end = np.minimum(begin + block, (start + length)[row])
    base = _base_of_tile(first, base_start)[row]
    cuts = _cuts(begin, end, base, block)
    if not len(cuts):
        return np.zeros((0, TILE_FIELDS)), np.zeros(0, dtype=np.int64)
    prefix = np.maximum.reduceat(first[row], cuts)
    after_prefix = np.where(first[row] > 0, first[row] + begin - start[row], np.iinfo(np.int32).max)
    table = np.zeros((len(cuts), TILE_FIELDS), dtype=np.int64)
    table[:, 0] = begin[cuts]
    table[:, 1] = np.diff(begin[cuts], append=end[-1])
    table[:, 2] = np.where(prefix > 0, base[cuts], 0)
    table[:, 3] = prefix
    table[:, 4] = np.minimum.reduceat(after_prefix, cuts)
    key_counts = prefix + table[:, 0] + table[:, 1] - start[row[cuts]]
    order = np.argsort(-key_counts, kind="stable")
    return table[order], key_counts[order]


def _base_of_tile(first: np.ndarray, base_start: np.ndarray) -> np.ndarray:
    """[row] the base row; that of a neighbour for rows that need none, so that they cut no tile."""
    has_base = first > 0
    nearest = np.maximum.accumulate(np.where(has_base, np.arange(len(first)), -1))
    return base_start[np.maximum(nearest, has_base.argmax() if len(first) else 0)]


def _cuts(begin: np.ndarray, end: np.ndarray, base: np.ndarray, block: int) -> np.ndarray:
    """The pieces that tiles begin with: each tile takes as many whole pieces of one base row as fit.

    Where a tile ends depends on where it begins, so the chain of beginnings is followed by pointer doubling.
    """
    n_pieces = len(begin)
    changes = np.flatnonzero(np.diff(base)) + 1
    next_change = np.append(changes, n_pieces)[np.searchsorted(changes, np.arange(n_pieces), side="right")]
    following = np.minimum(np.searchsorted(end, begin + block, side="right"), next_change)
    following = np.append(following, n_pieces)
    reached = np.zeros(n_pieces + 1, dtype=bool)
    reached[0] = True
    while not reached[n_pieces]:
        reached[following[reached]] = True
        following = following[following]
    return np.flatnonzero(reached[:n_pieces])
