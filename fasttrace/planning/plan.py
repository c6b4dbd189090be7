"""Cells to a Plan: per-block index tables that run a whole sweep in one forward pass.

The planner is a small compiler. It needs counts, not a model; its output is plain numpy data. Passes 1 to 3
drop edits that change nothing (`edits.py`). Passes 4 to 8 are here, and all are exact:

4. late start: a row is forked from its parent at the first block whose computation its edits change;
5. suffix only: a row holds the tokens from its first edited position on; earlier ones are the base row's;
6. shared prefixes: cells whose edits agree up to a block are one row until there;
7. thrown-away work: an MLP output that is replaced, or never read, is not computed;
8. narrow forks: an attention or MLP output that is replaced changes nothing of the later tokens until the next block,
   so in the block in which a row is forked for it, the row holds its edited positions alone.

The pack of a block is a list of tokens. The base rows come first, whole: the clean run, then one corrupted run
per noise sample. Restored rows follow, sorted by the positions they hold, tile size and sample, so that equal shapes
are neighbors. `docs/planner.md` compiles a small plan step by step.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from fasttrace.experiment.cells import Cell
from fasttrace.experiment.sites import ATTENTION, MLP, RESIDUAL
from fasttrace.planning.edits import EditTable, Shape, effective_edits

Layout = Literal["narrow", "suffix", "full"]
"""What a restored row holds: the tokens that pass 8 leaves it, those from its first edit on, or the whole prompt."""

TILE_TOKENS = 32
"""Rows that share a base row attend together in tiles of about this many tokens: the base row's keys are then
gathered once a tile, and a block-diagonal mask keeps the rows apart."""

BASE_ROW = -1
"""In place of a row's number: the corrupted base row of the sample. Being -1, it picks the last item of an array, so
`np.append(per_row, of_base)[number]` looks up rows and the base row at once."""

_NOTHING = -1
"""In tables that are being filled: nothing here so far."""

_CODES_PER_POSITION = 6
"""Edits that one position can have in a block: three stages, two sources."""


@dataclass(frozen=True)
class Rectangle:
    """Neighbouring rows that hold the same positions, [tile, tile rows * (stop - first)].

    Attributes:
        n_positions: tokens of the rows' prompt.
        first: first position the rows hold; the keys before it are the base row's.
        stop: the position after the last one they hold.
        start: index of the first token in the pack.
        tile_rows: rows of a tile, all of one base row.
    """

    n_positions: int
    first: int
    stop: int
    start: int
    tile_rows: int

    @property
    def length(self) -> int:
        """Tokens of a tile."""
        return self.tile_rows * (self.stop - self.first)

    @property
    def has_base_rows(self) -> bool:
        """Whether the first rows are the base rows of this length."""
        return (self.first, self.stop) == (0, self.n_positions)


@dataclass(frozen=True)
class Group(Rectangle):
    """A rectangle of a plan.

    Attributes:
        base: [tile] the base row.
    """

    base: np.ndarray


@dataclass(frozen=True)
class BlockPlan:
    """Index tables of one block; tokens are counted in this block's pack unless said otherwise.

    Attributes:
        source: [token] index in the previous block's pack (the base rows for block 0); None: unchanged.
        carried: [token] the same without this block's edits of the residual stream, for what a row carries along
            beside its hidden state; None: the same as `source`.
        origin: [token] the base token at the same position, `base row * n_positions + position`.
        groups: the pack as rectangles, in order, base rows included.
        attention_to, attention_from: attention outputs to overwrite, and the tokens they are taken from.
        mlp_to, mlp_from: the same for MLP outputs.
        mlp_keep: tokens whose MLP output is computed; None: all.
        mlp_spread: [token] where its MLP output stands among the kept ones, edits applied; None with mlp_keep.
    """

    source: np.ndarray | None
    carried: np.ndarray | None
    origin: np.ndarray
    groups: tuple[Group, ...]
    attention_to: np.ndarray
    attention_from: np.ndarray
    mlp_to: np.ndarray
    mlp_from: np.ndarray
    mlp_keep: np.ndarray | None
    mlp_spread: np.ndarray | None

    @property
    def n_tokens(self) -> int:
        """Tokens in this block's pack."""
        return len(self.origin)


@dataclass(frozen=True, eq=False)
class Plan:
    """A sweep, compiled for one shape. Equal to itself alone, so that what is made of it can be kept.

    Attributes:
        shape: what it was compiled for.
        layout: what its rows hold.
        blocks: the tables, one set a block.
        last_tokens: [sample, row] the last token of each restored row, in the last block's pack.
        cell_row: [cell] the row of each cell, or CORRUPTED_CELL, or CLEAN_CELL.
    """

    shape: Shape
    layout: Layout
    blocks: tuple[BlockPlan, ...]
    last_tokens: np.ndarray
    cell_row: np.ndarray

    @property
    def n_base(self) -> int:
        """Base rows: the clean run, and a corrupted one per sample."""
        return 1 + self.shape.samples

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """[block] tokens of its pack."""
        return np.array([block.n_tokens for block in self.blocks])

    @property
    def peak_tokens(self) -> int:
        """Tokens of the largest pack."""
        return int(self.n_tokens.max())


@lru_cache(maxsize=32)
def plan_cells(shape: Shape, cells: tuple[Cell, ...], layout: Layout = "narrow") -> Plan:
    """The plan of any cells, cached by its arguments; a cell without edits is the corrupted run.

    Raises:
        PlanError: a shape with nothing to trace, an edit outside the model or the prompt, or two edits of one
            cell that contradict each other.
    """
    table = effective_edits(shape, cells, mixes_last=layout == "full")
    signatures = _signatures(shape, table)
    rows = _no_rows(shape, len(cells))
    by_block = table.where(np.argsort(table.block, kind="stable"))
    bounds = np.searchsorted(by_block.block, np.arange(shape.n_layers + 1))
    blocks = []
    for number in range(shape.n_layers):
        edits = by_block.where(slice(*bounds[number : number + 2]))
        parents, rows = rows, _advance(shape, rows, edits, signatures[:, number], layout)
        blocks.append(_block(shape, number, parents, rows, edits, layout))
    last = np.full((shape.samples, len(rows.first)), _NOTHING)
    last[rows.sample, rows.number] = rows.start + shape.n_positions - 1 - rows.first[rows.number]
    cell_row = np.where(rows.of_cell == BASE_ROW, table.constant, rows.of_cell)
    return Plan(shape, layout, tuple(blocks), last, cell_row)


@dataclass(frozen=True)
class _Rows:
    """The restored rows of one block. Each row exists once per sample; `number` and `sample` say which is where.

    Attributes:
        of_cell: [cell] the row a cell is in; BASE_ROW while nothing has been restored.
        parent: [row] its row in the previous block, or BASE_ROW.
        first, stop: [row] first position held, and the one after the last.
        rest: [row] the row that has its tokens from `stop` on as well, or BASE_ROW.
        number, sample: [placed row] row and sample, in the order of the pack.
        start: [placed row] index of the first token in the pack.
        place: [sample, row] the inverse of (sample, number).
        tile_rows: [placed row] rows of the tile it is in.
        n_tokens: of the whole pack, base rows included.
    """

    of_cell: np.ndarray
    parent: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    rest: np.ndarray
    number: np.ndarray
    sample: np.ndarray
    start: np.ndarray
    place: np.ndarray
    tile_rows: np.ndarray
    n_tokens: int


def _no_rows(shape: Shape, n_cells: int) -> _Rows:
    none = np.zeros(0, dtype=np.int64)
    return _placed(shape, np.full(n_cells, BASE_ROW), parent=none, first=none, stop=none, rest=none)


def _placed(
    shape: Shape, of_cell: np.ndarray, parent: np.ndarray, first: np.ndarray, stop: np.ndarray, rest: np.ndarray
) -> _Rows:
    """Gives every row and sample its place in the pack, sorted by (first position, stop, tile size, sample)."""
    sample, number = np.divmod(np.arange(shape.samples * len(first)), max(1, len(first)))
    tile_rows = _tile_rows(shape, first, stop)
    order = np.lexsort((number, sample, -tile_rows[number], -stop[number], first[number]))
    sample, number = sample[order], number[order]
    lengths = (stop - first)[number]
    ends = (1 + shape.samples) * shape.n_positions + np.cumsum(lengths)
    place = np.empty((shape.samples, len(first)), dtype=np.int64)
    place[sample, number] = np.arange(len(number))
    n_tokens = int(ends[-1]) if len(ends) else (1 + shape.samples) * shape.n_positions
    return _Rows(of_cell, parent, first, stop, rest, number, sample, ends - lengths, place, tile_rows[number], n_tokens)


def _tile_rows(shape: Shape, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """[row] how many rows share its tile: whole tiles of rows with the same positions, and one of what is left.

    Whole rows (first == 0) read no base row's keys, so a tile would save no gather: each is its own.
    """
    held = first * (shape.n_positions + 1) + stop
    count = np.bincount(held, minlength=(shape.n_positions + 1) ** 2)
    order = np.argsort(held, kind="stable")
    rank = np.empty_like(first)
    rank[order] = np.arange(len(first)) - (np.cumsum(count) - count)[held[order]]
    whole = np.where(first > 0, np.maximum(1, TILE_TOKENS // np.maximum(1, stop - first)), 1)
    left = count[held] % whole
    return np.where(rank < count[held] - left, whole, left)


def _signatures(shape: Shape, table: EditTable) -> np.ndarray:
    """[cell, block] a number for the set of edits a cell has in a block, 0 for none."""
    signatures = np.zeros((len(table.constant), shape.n_layers), dtype=np.int64)
    code = 1 + (table.stage * shape.n_positions + table.position) * 2 + table.clean
    begins = np.flatnonzero(_changes(table.cell * shape.n_layers + table.block))
    signatures[table.cell[begins], table.block[begins]] = code[begins]
    ends = np.append(begins[1:], len(code))
    # A set of several edits gets a number above all single edits' codes, in the order in which the sets are met.
    several = ends - begins > 1
    known: dict[tuple[int, ...], int] = {}
    for begin, end in zip(begins[several], ends[several], strict=True):
        edits = tuple(code[begin:end].tolist())
        signatures[table.cell[begin], table.block[begin]] = -known.setdefault(edits, len(known) + 1)
    return np.where(signatures < 0, _CODES_PER_POSITION * shape.n_positions - signatures, signatures)


def _changes(values: np.ndarray) -> np.ndarray:
    """Whether an item differs from the one before it; the first one does."""
    changes = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes


def _advance(shape: Shape, rows: _Rows, edits: EditTable, signature: np.ndarray, layout: Layout) -> _Rows:
    """Passes 4 to 6 and 8: splits the rows whose cells have different edits in this block."""
    # A row begins where its parent does, or earlier if it is edited earlier; children of the base row begin where they
    # are edited.
    first_of_cell = np.append(rows.first, shape.n_positions)[rows.of_cell]
    np.minimum.at(first_of_cell, edits.cell, 0 if layout == "full" else edits.position)
    # Cells with one parent and one signature have had the same edits so far: they are one row.
    history = (rows.of_cell + 1) * (signature.max(initial=0) + 1) + signature
    restored = np.flatnonzero(history)
    _, example, number = np.unique(history[restored], return_index=True, return_inverse=True)
    example = restored[example]
    of_cell = np.full_like(rows.of_cell, BASE_ROW)
    of_cell[restored] = number
    parent, first = rows.of_cell[example], first_of_cell[example]
    rest, stop = np.full_like(parent, BASE_ROW), np.full_like(parent, shape.n_positions)
    if layout == "narrow":
        rest, stop = _narrowed(shape, of_cell, parent, edits)
    return _placed(shape, of_cell, parent, first, stop, rest)


def _narrowed(shape: Shape, of_cell: np.ndarray, parent: np.ndarray, edits: EditTable) -> tuple[np.ndarray, np.ndarray]:
    """Pass 8: (`rest`, `stop`) of the rows of a block.

    Rows with one parent that come into the block alike leave it alike but for where they are edited. So one of them,
    or the base row if that is the parent, is whole; the others, edited no earlier, end with their last edit.
    """
    row = of_cell[edits.cell]
    last = np.full_like(parent, _NOTHING)
    np.maximum.at(last, row, edits.position)
    comes_in_edited = np.zeros(len(parent), dtype=bool)
    comes_in_edited[row[edits.stage == RESIDUAL]] = True
    # The whole one has the earliest last edit: behind the end of any other row neither is edited, so
    # they are alike there. Rows edited in the residual stream come in different: they stand for no other row, and are
    # whole themselves.
    order = np.lexsort((last, comes_in_edited, parent))
    begins = _changes(parent[order])
    whole = np.empty_like(parent)
    whole[order] = order[begins][np.cumsum(begins) - 1]
    rest = np.where(parent == BASE_ROW, BASE_ROW, whole)
    is_whole = comes_in_edited | (rest == np.arange(len(parent)))
    return rest, np.where(is_whole, shape.n_positions, last + 1)


def _block(shape: Shape, number: int, parents: _Rows, rows: _Rows, edits: EditTable, layout: Layout) -> BlockPlan:
    source, origin = _growth(shape, parents, rows)
    targets = {stage: _edit_tokens(shape, rows, edits.where(edits.stage == stage)) for stage in range(3)}
    to, taken_from = targets[RESIDUAL]
    carried = source.copy() if len(to) else None
    source[to] = source[taken_from]
    unread = _unread_tokens(rows) if number == shape.n_layers - 1 else to[:0]
    keep, spread = (None, None) if layout == "full" else _skipped_mlp(rows.n_tokens, *targets[MLP], unread)
    unchanged = number > 0 and len(source) == parents.n_tokens and np.array_equal(source, np.arange(len(source)))
    return BlockPlan(
        None if unchanged else source,
        carried,
        origin,
        _groups(shape, rows),
        *targets[ATTENTION],
        *targets[MLP],
        keep,
        spread,
    )


def _growth(shape: Shape, parents: _Rows, rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
    """[token] where each token comes from in the previous pack, and the base token at its position."""
    n_base = (1 + shape.samples) * shape.n_positions
    first = rows.first[rows.number]
    lengths = (rows.stop - rows.first)[rows.number]
    position = _ranges(first, lengths)
    origin = np.repeat((1 + rows.sample) * shape.n_positions, lengths) + position
    parent = rows.parent[rows.number]
    # A token is its parent's where that holds it; else it is the base row's. Tokens behind a narrow parent's end are
    # those of the row that is like it there (`rest`), which may be the base row.
    source = origin
    if np.any(parents.stop < shape.n_positions):
        of_rest, held = _held(parents, np.append(parents.rest, -1)[parent], rows.sample, position, lengths)
        held &= position >= np.repeat(np.append(parents.stop, 0)[parent], lengths)
        source = np.where(held, of_rest, source)
    of_parent, held = _held(parents, parent, rows.sample, position, lengths)
    source = np.where(held, of_parent, source)
    base = np.arange(n_base)
    return np.concatenate((base, source)), np.concatenate((base, origin))


def _held(
    rows: _Rows, number: np.ndarray, sample: np.ndarray, position: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in rows of a pack: ([token] which token it is there, [token] whether the row holds it).

    Args:
        rows: of the pack.
        number: [item] rows; BASE_ROW holds nothing here, because it is never looked up as a row.
        sample: [item] theirs.
        position: [token] positions asked for, item by item.
        lengths: [item] how many.
    """
    exists = number != BASE_ROW
    first, stop = np.append(rows.first, 0)[number], np.append(rows.stop, 0)[number]
    shift = -first
    shift[exists] += rows.start[rows.place[sample[exists], number[exists]]]
    held = (position >= np.repeat(first, lengths)) & (position < np.repeat(stop, lengths))
    return np.repeat(shift, lengths) + position, held


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`arange(start, start + length)` of all pairs, one after the other."""
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(lengths.sum())


def _edit_tokens(shape: Shape, rows: _Rows, edits: EditTable) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that edits write to, each once, and the base tokens they are taken from."""
    if not len(edits.cell):
        return edits.cell, edits.cell
    row = rows.of_cell[edits.cell]
    place = row * shape.n_positions + edits.position
    # Cells that share a row bring the same edits: of each place one is enough.
    edit_at = np.full(len(rows.first) * shape.n_positions, _NOTHING)
    edit_at[place] = np.arange(len(place))
    once = edit_at[edit_at != _NOTHING]
    row, position, clean = row[once], edits.position[once], edits.clean[once]
    sample = np.arange(shape.samples)[:, None]
    to = rows.start[rows.place[:, row]] + position - rows.first[row]
    taken_from = np.where(clean, 0, (1 + sample) * shape.n_positions) + position
    return to.reshape(-1), taken_from.reshape(-1)


def _unread_tokens(rows: _Rows) -> np.ndarray:
    """All tokens of restored rows but the last: nothing reads their last block's output."""
    lengths = (rows.stop - rows.first)[rows.number]
    return _ranges(rows.start, lengths - 1)


def _skipped_mlp(n_tokens: int, to: np.ndarray, taken_from: np.ndarray, unread: np.ndarray):
    """Pass 7: (tokens whose MLP is computed, where each token finds its output among them)."""
    if not len(to) and not len(unread):
        return None, None
    computed = np.ones(n_tokens, dtype=bool)
    computed[to] = computed[unread] = False
    # Unread tokens may hold anything: they get the first token's output. Restored ones get that of their source, a base
    # token, which is always computed.
    spread = np.where(computed, np.cumsum(computed) - 1, 0)
    spread[to] = spread[taken_from]
    return np.flatnonzero(computed), spread


def _groups(shape: Shape, rows: _Rows) -> tuple[Group, ...]:
    n_base = 1 + shape.samples
    base = np.concatenate((np.arange(n_base), 1 + rows.sample))
    first = np.concatenate((np.zeros(n_base, dtype=np.int64), rows.first[rows.number]))
    stop = np.concatenate((np.full(n_base, shape.n_positions), rows.stop[rows.number]))
    tile_rows = np.concatenate((np.ones(n_base, dtype=np.int64), rows.tile_rows))
    begins = np.flatnonzero(_changes(first) | _changes(stop) | _changes(tile_rows))
    starts = np.concatenate(([0], np.cumsum(stop - first)))
    ends = np.append(begins[1:], len(first))
    columns = (column[begins].tolist() for column in (first, stop, starts, tile_rows))
    bases = (base[begin:end:rows] for begin, end, rows in zip(begins, ends, tile_rows[begins], strict=True))
    return tuple(
        Group(shape.n_positions, first, stop, start, rows, own)
        for first, stop, start, rows, own in zip(*columns, bases, strict=True)
    )
