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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fasttrace.experiment.cells import Cell, Vector
from fasttrace.experiment.sites import ATTENTION, MLP, RESIDUAL
from fasttrace.memories import remembered
from fasttrace.planning.edits import (
    ACTIVATION,
    CLEAN_CELL,
    CORRUPTED_CELL,
    FROM_CLEAN,
    FROM_VECTOR,
    EditTable,
    Shape,
    effective_edits,
)

Layout = Literal["narrow", "suffix", "full"]
"""What a restored row holds: the tokens that pass 8 leaves it, those from its first edit on, or the whole prompt."""

TILE_TOKENS = 32
"""Rows that share a base row attend together in tiles of about this many tokens: the base row's keys are then
gathered once a tile, and a block-diagonal mask keeps the rows apart."""

CORRUPTED_ROW, CLEAN_ROW = CORRUPTED_CELL, CLEAN_CELL
"""In place of a row's number: the corrupted base row of the sample, or the clean one. Being -1 and -2, they pick the
last items of an array: `_looked_up` looks up rows and base rows at once."""

_NOTHING = -1
"""In tables that are being filled: nothing here so far."""

_SITE_OF_STAGE = {
    RESIDUAL: "block_input",
    ATTENTION: "attention_output",
    MLP: "mlp_output",
    ACTIVATION: "mlp_activation",
}
"""Where the writes of a stage are made."""


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
class Write:
    """Values of one site to overwrite in one block.

    Attributes:
        site: where.
        to: [write] tokens, each once.
        taken_from: [write] tokens that the values are taken from, or numbers of vectors.
        of_vectors: which of the two.
    """

    site: str
    to: np.ndarray
    taken_from: np.ndarray
    of_vectors: bool = False


@dataclass(frozen=True)
class BlockPlan:
    """Index tables of one block; tokens are counted in this block's pack unless said otherwise.

    Attributes:
        source: [token] index in the previous block's pack (the base rows for block 0); None: unchanged.
        carried: [token] the same without this block's edits of the residual stream, for what a row carries along
            beside its hidden state; None: the same as `source`.
        origin: [token] the base token at the same position, `base row * n_positions + position`.
        groups: the pack as rectangles, in order, base rows included.
        writes: what is overwritten, beside base runs' values in the residual stream, which `source` reads.
        mlp_keep: tokens whose MLP output is computed; None: all.
        mlp_spread: [token] where its MLP output stands among the kept ones, those of base runs put in; None with
            mlp_keep.
    """

    source: np.ndarray | None
    carried: np.ndarray | None
    origin: np.ndarray
    groups: tuple[Group, ...]
    writes: tuple[Write, ...]
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
        read_tokens: [read, sample, row] the tokens that each restored row is read at, in the last block's pack.
        read_writes: vectors that are put in the place of read tokens, counted in `read_tokens`.
        cell_row: [cell] the row of each cell, or CORRUPTED_CELL, or CLEAN_CELL.
        vectors: those that writes name.
    """

    shape: Shape
    layout: Layout
    blocks: tuple[BlockPlan, ...]
    read_tokens: np.ndarray
    read_writes: tuple[Write, ...]
    cell_row: np.ndarray
    vectors: tuple[Vector, ...]

    @property
    def n_base(self) -> int:
        """Base rows: the clean run, and a corrupted one per sample."""
        return self.shape.n_base

    @property
    def last_tokens(self) -> np.ndarray:
        """[sample, row] the last token that each restored row is read at."""
        return self.read_tokens[-1]

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """[block] tokens of its pack."""
        return np.array([block.n_tokens for block in self.blocks])

    @property
    def peak_tokens(self) -> int:
        """Tokens of the largest pack."""
        return int(self.n_tokens.max())


@remembered(32, about="plans")
def plan_cells(shape: Shape, cells: tuple[Cell, ...], layout: Layout = "narrow") -> Plan:
    """The plan of any cells, cached by its arguments; a cell without edits is the run that it is made in.

    Raises:
        PlanError: see `edits.effective_edits`.
    """
    table = effective_edits(shape, cells, mixes_last=layout == "full")
    signatures = _signatures(shape, table)
    by_block = table.where(np.argsort(table.block, kind="stable"))
    bounds = np.searchsorted(by_block.block, np.arange(shape.n_layers + 2))
    edits = [by_block.where(slice(*bounds[number : number + 2])) for number in range(shape.n_layers + 1)]
    rows = [_no_rows(shape, table.background)]
    for number in range(shape.n_layers):
        rows.append(_advance(shape, rows[-1], edits[number], signatures[:, number], layout))
    cell_row, read_tokens, read_writes = _readout(shape, rows[-1], edits[-1], signatures[:, -1])
    unread = None if layout == "full" else _unread_tokens(shape, rows[-1], read_tokens)
    unread_in = [None] * (shape.n_layers - 1) + [unread]
    blocks = tuple(
        _block(shape, number, rows[number], rows[number + 1], edits[number], layout, unread_in[number])
        for number in range(shape.n_layers)
    )
    return Plan(shape, layout, blocks, read_tokens, read_writes, cell_row, table.vectors)


@dataclass(frozen=True)
class _Rows:
    """The restored rows of one block. Each row exists once per sample; `number` and `sample` say which is where.

    Attributes:
        of_cell: [cell] the row a cell is in, or a base row while nothing has been restored.
        parent: [row] its row in the previous block, or a base row.
        base: [row] the base row it was forked from, at first or through its parents: CORRUPTED_ROW or CLEAN_ROW.
        first, stop: [row] first position held, and the one after the last.
        rest: [row] the row, or base row, that has its tokens from `stop` on as well.
        number, sample: [placed row] row and sample, in the order of the pack.
        start: [placed row] index of the first token in the pack.
        place: [sample, row] the inverse of (sample, number).
        tile_rows: [placed row] rows of the tile it is in.
        n_tokens: of the whole pack, base rows included.
    """

    of_cell: np.ndarray
    parent: np.ndarray
    base: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    rest: np.ndarray
    number: np.ndarray
    sample: np.ndarray
    start: np.ndarray
    place: np.ndarray
    tile_rows: np.ndarray
    n_tokens: int


def _no_rows(shape: Shape, background: np.ndarray) -> _Rows:
    none = np.zeros(0, dtype=np.int64)
    return _placed(shape, background, parent=none, base=none, first=none, stop=none, rest=none)


def _placed(
    shape: Shape,
    of_cell: np.ndarray,
    *,
    parent: np.ndarray,
    base: np.ndarray,
    first: np.ndarray,
    stop: np.ndarray,
    rest: np.ndarray,
) -> _Rows:
    """Gives every row and sample its place, sorted by (first position, stop, tile size, sample, base row)."""
    tile_rows = _tile_rows(shape, base, first, stop)
    order = np.lexsort((base, -tile_rows, -stop, first))
    # Rows of one shape are together, sample after sample.
    begins = np.flatnonzero(_changes(first[order]) | _changes(stop[order]) | _changes(tile_rows[order]))
    n_rows = np.diff(np.append(begins, len(order)))
    start_of, n_of = np.repeat(begins, n_rows), np.repeat(n_rows, n_rows)
    place = np.empty((shape.copies, len(first)), dtype=np.int64)
    in_shape = np.arange(len(order)) - start_of
    place[:, order] = shape.copies * start_of + in_shape + np.arange(shape.copies)[:, None] * n_of
    number, sample = np.empty((2, place.size), dtype=np.int64)
    number[place], sample[place] = np.arange(len(first)), np.arange(shape.copies)[:, None]
    lengths = (stop - first)[number]
    ends = shape.n_base * shape.n_positions + np.cumsum(lengths)
    n_tokens = int(ends[-1]) if len(ends) else shape.n_base * shape.n_positions
    tile_rows = tile_rows[number]
    return _Rows(of_cell, parent, base, first, stop, rest, number, sample, ends - lengths, place, tile_rows, n_tokens)


def _looked_up(per_row: np.ndarray, number: np.ndarray, of_clean: int, of_corrupted: int) -> np.ndarray:
    """What rows have, and what base rows have in their place."""
    return np.append(per_row, (of_clean, of_corrupted))[number]


def _base_row(base: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Where base rows stand: the clean run first, then a corrupted one per sample."""
    return np.where(base == CLEAN_ROW, 0, 1 + sample)


def _tile_rows(shape: Shape, base: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """[row] how many rows share its tile: whole tiles of rows of one base row and the same positions, and a last one.

    Whole rows (first == 0) read no base row's keys, so a tile would save no gather: each is its own.
    """
    held = (first * (shape.n_positions + 1) + stop) * 2 + (base == CLEAN_ROW)
    count = np.bincount(held, minlength=2 * (shape.n_positions + 1) ** 2)
    order = np.argsort(held, kind="stable")
    rank = np.empty_like(first)
    rank[order] = np.arange(len(first)) - (np.cumsum(count) - count)[held[order]]
    whole = np.where(first > 0, np.maximum(1, TILE_TOKENS // np.maximum(1, stop - first)), 1)
    left = count[held] % whole
    return np.where(rank < count[held] - left, whole, left)


def _signatures(shape: Shape, table: EditTable) -> np.ndarray:
    """[cell, block] a number for the set of edits a cell has in a block, 0 for none."""
    signatures = np.zeros((len(table.background), shape.n_layers + 1), dtype=np.int64)
    n_sources = FROM_VECTOR + len(table.vectors)
    code = 1 + (table.stage * shape.n_positions + table.position) * n_sources + table.source
    begins = np.flatnonzero(_changes(table.cell * (shape.n_layers + 1) + table.block))
    signatures[table.cell[begins], table.block[begins]] = code[begins]
    ends = np.append(begins[1:], len(code))
    # A set of several edits gets a number above all single edits' codes, in the order in which the sets are met.
    several = ends - begins > 1
    known: dict[tuple[int, ...], int] = {}
    for begin, end in zip(begins[several], ends[several], strict=True):
        edits = tuple(code[begin:end].tolist())
        signatures[table.cell[begin], table.block[begin]] = -known.setdefault(edits, len(known) + 1)
    n_codes = len(_SITE_OF_STAGE) * shape.n_positions * n_sources
    return np.where(signatures < 0, n_codes - signatures, signatures)


def _changes(values: np.ndarray) -> np.ndarray:
    """Whether an item differs from the one before it; the first one does."""
    changes = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes


def _advance(shape: Shape, rows: _Rows, edits: EditTable, signature: np.ndarray, layout: Layout) -> _Rows:
    """Passes 4 to 6 and 8: splits the rows whose cells have different edits in this block."""
    # A row begins where its parent does, or earlier if it is edited earlier; children of a base row begin where they
    # are edited.
    first_of_cell = _looked_up(rows.first, rows.of_cell, shape.n_positions, shape.n_positions)
    np.minimum.at(first_of_cell, edits.cell, 0 if layout == "full" else edits.position)
    of_cell, example = _split(rows, signature)
    parent, first = rows.of_cell[example], first_of_cell[example]
    base = _looked_up(rows.base, parent, CLEAN_ROW, CORRUPTED_ROW)
    rest, stop = base, np.full_like(parent, shape.n_positions)
    if layout == "narrow":
        rest, stop = _narrowed(shape, of_cell, parent, edits)
    return _placed(shape, of_cell, parent=parent, base=base, first=first, stop=stop, rest=rest)


def _split(rows: _Rows, signature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([cell] its row or base row, [row] a cell in it): cells of one parent and one signature are one row."""
    history = (rows.of_cell - CLEAN_ROW) * (signature.max(initial=0) + 1) + signature
    restored = np.flatnonzero((rows.of_cell >= 0) | (signature > 0))
    _, example, number = np.unique(history[restored], return_index=True, return_inverse=True)
    of_cell = rows.of_cell.copy()
    of_cell[restored] = number
    return of_cell, restored[example]


def _narrowed(shape: Shape, of_cell: np.ndarray, parent: np.ndarray, edits: EditTable) -> tuple[np.ndarray, np.ndarray]:
    """Pass 8: (`rest`, `stop`) of the rows of a block.

    Rows with one parent that come into the block alike leave it alike but for where they are edited. So one of them,
    or a base row if that is the parent, is whole; the others, edited no earlier, end with their last edit.
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
    rest = np.where(parent < 0, parent, whole)
    is_whole = comes_in_edited | (rest == np.arange(len(parent)))
    return rest, np.where(is_whole, shape.n_positions, last + 1)


def _readout(
    shape: Shape, parents: _Rows, edits: EditTable, signature: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[Write, ...]]:
    """(`cell_row`, `read_tokens`, `read_writes`) of a plan: cells may part once more behind the last block."""
    of_cell, example = _split(parents, signature)
    parent = parents.of_cell[example]
    base = _looked_up(parents.base, parent, CLEAN_ROW, CORRUPTED_ROW)
    reads = np.array(shape.read_positions)
    sample, number = np.divmod(np.arange(shape.copies * len(parent)), max(1, len(parent)))
    position = np.tile(reads, len(number))
    lengths = np.full(len(number), len(reads))
    tokens, _ = _taken_from(shape, parents, parent[number], base[number], sample, position, lengths)
    read_of = np.zeros(shape.n_positions, dtype=np.int64)
    read_of[reads] = np.arange(len(reads))
    tokens = tokens.reshape(-1, len(reads)).T.reshape(-1)
    at = np.arange(len(number)).reshape(shape.copies, -1)
    writes = []
    for of_vectors, _, some in _by_source_and_stage(edits):
        once = _once(shape, of_cell, len(parent), some)
        to = at[:, of_cell[some.cell[once]]] + read_of[some.position[once]] * len(number)
        to, taken_from = to.reshape(-1), _sources(shape, some.source[once], some.position[once], of_vectors)
        if of_vectors:
            writes.append(Write("block_output", to, taken_from, True))
        else:
            tokens[to] = taken_from
    return of_cell, tokens.reshape(len(reads), shape.copies, -1), tuple(writes)


def _block(
    shape: Shape,
    number: int,
    parents: _Rows,
    rows: _Rows,
    edits: EditTable,
    layout: Layout,
    unread: np.ndarray | None,
) -> BlockPlan:
    source, origin = _growth(shape, parents, rows)
    carried, writes = None, []
    for of_vectors, stage, some in _by_source_and_stage(edits):
        to, taken_from = _edit_tokens(shape, rows, some, of_vectors)
        if stage == RESIDUAL and not of_vectors:
            carried = source.copy()
            source[to] = source[taken_from]
        else:
            writes.append(Write(_SITE_OF_STAGE[stage], to, taken_from, of_vectors))
    keep, spread = (None, None) if layout == "full" else _skipped_mlp(rows.n_tokens, writes, unread)
    unchanged = number > 0 and len(source) == parents.n_tokens and np.array_equal(source, np.arange(len(source)))
    return BlockPlan(None if unchanged else source, carried, origin, _groups(shape, rows), tuple(writes), keep, spread)


def _by_source_and_stage(edits: EditTable) -> Iterator[tuple[bool, int, EditTable]]:
    """Edits from base runs, stage by stage, then those from vectors; what there is none of is left out."""
    of_vectors = edits.source >= FROM_VECTOR
    for kind in (False, True) if edits.vectors else (False,):
        for stage in _SITE_OF_STAGE:
            some = (edits.stage == stage) & (of_vectors == kind)
            if some.any():
                yield kind, stage, edits.where(some)


def _growth(shape: Shape, parents: _Rows, rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
    """[token] where each token comes from in the previous pack, and the base token at its position."""
    first = rows.first[rows.number]
    lengths = (rows.stop - rows.first)[rows.number]
    parent, base = rows.parent[rows.number], rows.base[rows.number]
    position = _ranges(first, lengths)
    source, origin = _taken_from(shape, parents, parent, base, rows.sample, position, lengths)
    of_base = np.arange(shape.n_base * shape.n_positions)
    return np.concatenate((of_base, source)), np.concatenate((of_base, origin))


def _taken_from(
    shape: Shape,
    rows: _Rows,
    number: np.ndarray,
    base: np.ndarray,
    sample: np.ndarray,
    position: np.ndarray,
    lengths: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """[token] the tokens of a pack that rows have at positions, and the base tokens there.

    Args:
        shape: counts.
        rows: of the pack.
        number: [item] rows or base rows.
        base: [item] the base rows they came from.
        sample: [item] theirs.
        position: [token] positions asked for, item by item.
        lengths: [item] how many.
    """
    origin = np.repeat(_base_row(base, sample) * shape.n_positions, lengths) + position
    # A token is the row's own where that holds it; else it is the base row's. Tokens behind a narrow row's end are
    # those of the row that is like it there (`rest`), which may be the base row.
    source = origin
    if np.any(rows.stop < shape.n_positions):
        rest = _looked_up(rows.rest, number, CLEAN_ROW, CORRUPTED_ROW)
        of_rest, held = _held(rows, rest, sample, position, lengths)
        held &= position >= np.repeat(_looked_up(rows.stop, number, 0, 0), lengths)
        source = np.where(held, of_rest, source)
    of_row, held = _held(rows, number, sample, position, lengths)
    return np.where(held, of_row, source), origin


def _held(
    rows: _Rows, number: np.ndarray, sample: np.ndarray, position: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in rows of a pack: ([token] which token it is there, [token] whether the row holds it).

    Args:
        rows: of the pack.
        number: [item] rows; base rows hold nothing here, because they are never looked up as rows.
        sample: [item] theirs.
        position: [token] positions asked for, item by item.
        lengths: [item] how many.
    """
    exists = number >= 0
    first, stop = _looked_up(rows.first, number, 0, 0), _looked_up(rows.stop, number, 0, 0)
    shift = -first
    shift[exists] += rows.start[rows.place[sample[exists], number[exists]]]
    held = (position >= np.repeat(first, lengths)) & (position < np.repeat(stop, lengths))
    return np.repeat(shift, lengths) + position, held


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`arange(start, start + length)` of all pairs, one after the other."""
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.repeat(shift, lengths) + np.arange(lengths.sum())


def _edit_tokens(shape: Shape, rows: _Rows, edits: EditTable, of_vectors: bool) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that edits write to, each once, and the base tokens or vectors they are taken from."""
    once = _once(shape, rows.of_cell, len(rows.first), edits)
    row, position = rows.of_cell[edits.cell[once]], edits.position[once]
    to = rows.start[rows.place[:, row]] + position - rows.first[row]
    return to.reshape(-1), _sources(shape, edits.source[once], position, of_vectors)


def _once(shape: Shape, of_cell: np.ndarray, n_rows: int, edits: EditTable) -> np.ndarray:
    """One edit of each place: cells that share a row bring the same edits."""
    place = of_cell[edits.cell] * shape.n_positions + edits.position
    edit_at = np.full(n_rows * shape.n_positions, _NOTHING)
    edit_at[place] = np.arange(len(place))
    return edit_at[edit_at != _NOTHING]


def _sources(shape: Shape, source: np.ndarray, position: np.ndarray, of_vectors: bool) -> np.ndarray:
    """[sample * edit] the base tokens or vectors that edits take."""
    if of_vectors:
        return np.tile(source - FROM_VECTOR, shape.copies)
    sample = np.arange(shape.copies)[:, None]
    return (np.where(source == FROM_CLEAN, 0, (1 + sample) * shape.n_positions) + position).reshape(-1)


def _unread_tokens(shape: Shape, rows: _Rows, read_tokens: np.ndarray) -> np.ndarray:
    """Tokens of restored rows that nothing reads: the last block's output there is of no use."""
    unread = np.ones(rows.n_tokens, dtype=bool)
    unread[: shape.n_base * shape.n_positions] = False
    unread[read_tokens] = False
    return np.flatnonzero(unread)


def _skipped_mlp(n_tokens: int, writes: list[Write], unread: np.ndarray | None):
    """Pass 7: (tokens whose MLP is computed, where each token finds its output among them)."""
    replaced = [write for write in writes if write.site == "mlp_output"]
    if not replaced and (unread is None or not len(unread)):
        return None, None
    computed = np.ones(n_tokens, dtype=bool)
    for tokens in (*(write.to for write in replaced), *(() if unread is None else (unread,))):
        computed[tokens] = False
    # Unread tokens and those that get a vector may hold anything: they get the first token's output. Restored ones get
    # that of their source, a base token, which is always computed.
    spread = np.where(computed, np.cumsum(computed) - 1, 0)
    for write in replaced:
        if not write.of_vectors:
            spread[write.to] = spread[write.taken_from]
    return np.flatnonzero(computed), spread


def _groups(shape: Shape, rows: _Rows) -> tuple[Group, ...]:
    n_base = shape.n_base
    base = np.concatenate((np.arange(n_base), _base_row(rows.base[rows.number], rows.sample)))
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
