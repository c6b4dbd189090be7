"""Cells to a table of the edits that matter: the planner's first three passes.

1. whole states: a cell that takes the whole state at one border of blocks from one run is that run from there on;
2. dead edits: what no read position can see is dropped, found by going backwards from the reads;
3. no-op edits: before the first position where the runs differ all of them hold the same values, and a value that is
   written where the row still has it changes nothing.

Cells that are left without edits take the score of a base run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fasttrace.errors import PlanError
from fasttrace.experiment.cells import CLEAN, CORRUPTED, RUNS, Cell, Vector, background_of
from fasttrace.experiment.sites import ATTENTION, MLP, RESIDUAL, SITE, SITES

CORRUPTED_CELL = -1
CLEAN_CELL = -2
"""Stand for the row of a cell that is still a base run: the corrupted one of the sample, or the clean one."""

FROM_CLEAN, FROM_CORRUPTED, FROM_VECTOR = range(3)
"""Codes of sources; the vectors of a table follow each other from FROM_VECTOR on."""

_STAGE = {name: site.stage for name, site in SITE.items()}
_IS_NEXT_INPUT = {name: site.is_next_input for name, site in SITE.items()}

ACTIVATION = 3
"""Stage of vectors for an MLP's activation: the MLP is computed, and its down projection reads the vector. What base
runs have there is restored as the MLP's output, which is the same."""


class Shape(NamedTuple):
    """What the planner has to know of a prompt and a model.

    Attributes:
        n_layers: blocks of the model.
        n_positions: tokens of the prompt.
        span: positions, half open, outside which the runs' embeddings are alike; from its begin on, all values of the
            blocks may differ. (n_positions, n_positions) where the runs are alike.
        samples: corrupted runs.
        reads: positions whose logits are scored, in rising order; none: the last.
        hidden_is_all: later blocks learn of earlier ones by the hidden state alone: not by keys and values of theirs,
            and nothing else that differs from run to run reaches them.
    """

    n_layers: int
    n_positions: int
    span: tuple[int, int]
    samples: int
    reads: tuple[int, ...] = ()
    hidden_is_all: bool = False

    @property
    def read_positions(self) -> tuple[int, ...]:
        """Positions whose logits are scored."""
        return self.reads or (self.n_positions - 1,)

    @property
    def n_base(self) -> int:
        """Base rows: the clean run and the corrupted ones."""
        return 1 + self.samples

    @property
    def copies(self) -> int:
        """Restored runs of a cell: one for each corrupted run, one where there is none."""
        return max(1, self.samples)


@dataclass(frozen=True)
class EditTable:
    """Edits as columns, sorted by cell and, inside a cell, in the order in which the model reaches them.

    Attributes:
        cell: [edit] number of the cell.
        block: [edit] the block whose computation the edit changes; a block output belongs to the next block.
        stage: [edit] of its site: RESIDUAL, ATTENTION, MLP or ACTIVATION.
        position: [edit] token index.
        source: [edit] FROM_CLEAN, FROM_CORRUPTED, or FROM_VECTOR + number of the vector.
        background: [cell] the base run in which it is made: CLEAN_CELL or CORRUPTED_CELL.
        vectors: those that edits name.
    """

    cell: np.ndarray
    block: np.ndarray
    stage: np.ndarray
    position: np.ndarray
    source: np.ndarray
    background: np.ndarray
    vectors: tuple[Vector, ...]

    def where(self, keep: np.ndarray | slice) -> "EditTable":
        """The edits that a mask, an index or a slice picks."""
        cell, block, stage, position, source = self.cell, self.block, self.stage, self.position, self.source
        background, vectors = self.background, self.vectors
        return EditTable(cell[keep], block[keep], stage[keep], position[keep], source[keep], background, vectors)

    def of_cells(self, cells: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(cell, numbers of its edits in order) of some cells, those without edits left out."""
        for cell in cells.tolist():
            begin, end = np.searchsorted(self.cell, (cell, cell + 1))
            if end > begin:
                yield cell, np.arange(begin, end)


def effective_edits(shape: Shape, cells: Sequence[Cell], mixes_last: bool = False) -> EditTable:
    """The edits that change a cell's logits, after passes 1 to 3.

    Args:
        shape: counts.
        cells: what to restore.
        mixes_last: attention and MLP outputs of a block may reach other positions in the same block, because
            something in it mixes tokens after them, as in some recurrent models.

    Raises:
        PlanError: a shape with nothing to trace, an edit outside the model or the prompt, a corrupted run where there
            is none, or two edits of one cell that contradict each other.
    """
    _check_shape(shape)
    table = _sorted_once(_columns(shape, cells))
    table = _whole_states_taken(shape, table)
    table = table.where(~_is_dead(shape, table, mixes_last))
    return table.where(~_is_noop(shape, table))


def _check_shape(shape: Shape) -> None:
    begin, end = shape.span
    if min(shape.n_layers, shape.n_positions) < 1 or shape.samples < 0:
        raise PlanError(f"{shape} has nothing to trace: layers and positions must be >= 1, samples >= 0")
    if not (0 <= begin < end <= shape.n_positions or begin == end == shape.n_positions):
        raise PlanError(
            f"span {shape.span} does not cover tokens of a prompt of {shape.n_positions}: "
            f"give 0 <= begin < end <= {shape.n_positions}"
        )
    reads = shape.read_positions
    if sorted(set(reads)) != list(reads) or not 0 <= reads[0] <= reads[-1] < shape.n_positions:
        raise PlanError(f"reads are {reads}: give positions from 0 to {shape.n_positions - 1} in rising order")


def _columns(shape: Shape, cells: Sequence[Cell]) -> EditTable:
    cell = np.repeat(np.arange(len(cells)), [len(edits) for edits in cells])
    flat = [edit for edits in cells for edit in edits]
    sites, layers, positions, sources = zip(*flat, strict=True) if flat else ((), (), (), ())
    if unknown := set(sites) - set(SITES):
        raise PlanError(f"unknown site {unknown.pop()!r} in a cell; choose from {', '.join(SITES)}")
    layer, position = np.array(layers, dtype=np.int64), np.array(positions, dtype=np.int64)
    for value, count, what in ((layer, shape.n_layers, "layer"), (position, shape.n_positions, "position")):
        if value.size and not 0 <= value.min() <= value.max() < count:
            bad = flat[int(np.flatnonzero((value < 0) | (value >= count))[0])]
            raise PlanError(f"{bad} is outside the sweep: it has {what}s 0..{count - 1}")
    codes, vectors = _source_codes(sources)
    source = np.array([codes[source] for source in sources], dtype=np.int64)
    stage, is_next = (np.array([of[site] for site in sites], dtype=np.int64) for of in (_STAGE, _IS_NEXT_INPUT))
    block = layer + is_next
    if vectors:
        stage[(source >= FROM_VECTOR) & np.array([site == "mlp_activation" for site in sites])] = ACTIVATION
    background = _backgrounds(cells)
    if not shape.samples and (np.any(background == CORRUPTED_CELL) or np.any(source == FROM_CORRUPTED)):
        raise PlanError(
            "a cell is made in the corrupted run, or takes a value from it, and there is none: give a corruption, or "
            "make cells in the clean run, EditsIn('clean', edits), from clean values and vectors"
        )
    return EditTable(cell, block, stage, position, source, background, vectors)


def _source_codes(sources: Sequence[str | Vector]) -> tuple[dict[str | Vector, int], tuple[Vector, ...]]:
    codes: dict[str | Vector, int] = {CLEAN: FROM_CLEAN, CORRUPTED: FROM_CORRUPTED}
    for source in dict.fromkeys(sources):
        if isinstance(source, Vector):
            codes[source] = len(codes)
        elif source not in codes:
            raise PlanError(f"unknown source {source!r} in a cell; choose from {', '.join(RUNS)}, or give a Vector")
    return codes, tuple(source for source in codes if isinstance(source, Vector))


def _backgrounds(cells: Sequence[Cell]) -> np.ndarray:
    if set(map(type, cells)) == {tuple}:
        return np.full(len(cells), CORRUPTED_CELL)
    codes = {CLEAN: CLEAN_CELL, CORRUPTED: CORRUPTED_CELL}
    named = [background_of(cell) for cell in cells]
    if unknown := set(named) - set(codes):
        raise PlanError(f"unknown background {unknown.pop()!r} of a cell; choose from {', '.join(RUNS)}")
    return np.array([codes[name] for name in named], dtype=np.int64)


def _sorted_once(table: EditTable) -> EditTable:
    """Sorts, and drops repeated edits."""
    place = np.minimum(table.stage, MLP)
    order = np.lexsort((table.position, place, table.block, table.cell))
    table, place = table.where(order), place[order]
    same = np.ones(max(0, len(table.cell) - 1), dtype=bool)
    for column in (table.cell, table.block, place, table.position):
        same &= column[1:] == column[:-1]
    if np.any(same & ((table.source[1:] != table.source[:-1]) | (table.stage[1:] != table.stage[:-1]))):
        cell = table.cell[1:][same][0]
        raise PlanError(f"cell {cell} overwrites one value twice, from two sources; keep one of them")
    return table.where(np.concatenate((np.ones(len(table.cell[:1]), dtype=bool), ~same)))


def _whole_states_taken(shape: Shape, table: EditTable) -> EditTable:
    """Pass 1: cells that take a whole state from a base run go on in that run, without their edits so far.

    What the state is made of before the runs differ is the same in all of them, unless a vector was written there.
    """
    begin, end = shape.span
    reads = shape.read_positions
    needed = np.full(shape.n_layers + 1, max(1, reads[-1] + 1 - begin))
    needed[0] = max(1, min(end, reads[-1] + 1) - begin)
    if not shape.hidden_is_all:
        needed[:] = shape.n_positions + 1
    needed[-1] = max(1, sum(read >= begin for read in reads))
    takes = (table.stage == RESIDUAL) & (table.source < FROM_VECTOR)
    border = (table.cell * len(needed) + table.block)[takes]
    taken = np.bincount(border, minlength=len(table.background) * len(needed))
    enough = taken.reshape(-1, len(needed)) >= needed
    keep, background = np.ones(len(table.cell), dtype=bool), table.background.copy()
    for cell, edits in table.of_cells(np.flatnonzero(enough.any(1))):
        for block in np.flatnonzero(enough[cell])[::-1]:
            source = _whole_state_of(shape, table.where(edits), block)
            if source is not None:
                background[cell] = CLEAN_CELL if source == FROM_CLEAN else CORRUPTED_CELL
                at = table.block[edits]
                keep[edits] = (at > block) | ((at == block) & (table.stage[edits] != RESIDUAL))
                break
    return replace(table, background=background).where(keep)


def _whole_state_of(shape: Shape, cell: EditTable, block: int) -> int | None:
    """The run whose state a cell has at a border, or None."""
    here = (cell.block == block) & (cell.stage == RESIDUAL)
    vectors = cell.source >= FROM_VECTOR
    if np.any(here & vectors):
        return None
    begin, end = shape.span
    begin = min([begin, *cell.position[vectors & (cell.block < block)].tolist()])
    if block == shape.n_layers:
        positions = {read for read in shape.read_positions if read >= begin}
    else:
        positions = set(range(begin, min(shape.read_positions[-1] + 1, end if block == 0 else shape.n_positions)))
    taken = dict(zip(cell.position[here].tolist(), cell.source[here].tolist(), strict=True))
    sources = {taken.get(position) for position in positions}
    return sources.pop() if len(sources) == 1 else None


def _is_dead(shape: Shape, table: EditTable, mixes_last: bool) -> np.ndarray:
    """Pass 2: edits that no read can see."""
    reads = np.array(shape.read_positions)
    unread = ~np.isin(table.position, reads)
    dead = (table.position > reads[-1]) | ((table.block == shape.n_layers) & unread)
    if mixes_last:
        return dead
    in_last_block = (table.block == shape.n_layers - 1) & (table.stage != RESIDUAL)
    dead |= in_last_block & unread
    # The last read attends to everything before it, block after block, unless its attention is overwritten, or a
    # whole value of the residual stream is.
    looked_at = np.zeros(len(table.background), dtype=bool)
    looked_at[table.cell[in_last_block & (table.stage == ATTENTION) & (table.position == reads[-1])]] = True
    if shape.hidden_is_all:
        residual = table.stage == RESIDUAL
        last = np.zeros(len(looked_at), dtype=np.int64)
        np.maximum.at(last, table.cell[residual], table.block[residual])
        looked_at[table.cell[table.block < last[table.cell]]] = True
    for _, edits in table.of_cells(np.flatnonzero(looked_at)):
        dead[edits] = _unseen(shape, table.where(edits))
    return dead


def _unseen(shape: Shape, cell: EditTable) -> np.ndarray:
    """[edit] of one cell, whether it reaches no read; `alive` has a bit for each position that does."""
    unseen = np.ones(len(cell.cell), dtype=bool)
    alive = sum(1 << read for read in shape.read_positions)
    numbers = list(range(len(unseen)))
    columns = (cell.block.tolist(), cell.stage.tolist(), cell.position.tolist())
    for block in range(shape.n_layers, -1, -1):
        overwritten = 0
        while numbers and columns[0][numbers[-1]] == block and columns[1][numbers[-1]] != RESIDUAL:
            number = numbers.pop()
            position = columns[2][number]
            unseen[number] = not alive >> position & 1
            overwritten |= (columns[1][number] == ATTENTION) << position
        if block < shape.n_layers:
            queries = alive & ~overwritten
            alive |= (1 << queries.bit_length()) - 1
        while numbers and columns[0][numbers[-1]] == block:
            number = numbers.pop()
            position = columns[2][number]
            unseen[number] = not alive >> position & 1
            if shape.hidden_is_all or block == shape.n_layers:
                alive &= ~(1 << position)
    return unseen


def _is_noop(shape: Shape, table: EditTable) -> np.ndarray:
    """Pass 3: edits that write what the row has there."""
    begin, end = shape.span
    is_embedding = (table.block == 0) & (table.stage == RESIDUAL)
    alike = (table.position < begin) | (is_embedding & (table.position >= end))
    own = table.source == table.background[table.cell] - CLEAN_CELL
    given = table.source >= FROM_VECTOR
    looked_at = np.zeros(len(table.background), dtype=bool)
    looked_at[table.cell[own | given]] = True
    noop = alike & ~looked_at[table.cell]
    same = (alike | own) & ~given
    for _, edits in table.of_cells(np.flatnonzero(looked_at)):
        noop[edits] = _still_there(table.position[edits].tolist(), (same & is_embedding)[edits], same[edits])
    return noop


def _still_there(positions: list[int], same_embedding: np.ndarray, same: np.ndarray) -> list[bool]:
    """[edit] of one cell in order, whether nothing before it has changed the value that it writes."""
    found, first_changed = [], None
    for position, at_embedding, is_same in zip(positions, same_embedding.tolist(), same.tolist(), strict=True):
        noop = at_embedding or (is_same and (first_changed is None or position < first_changed))
        if not noop:
            first_changed = position if first_changed is None else min(first_changed, position)
        found.append(noop)
    return found
