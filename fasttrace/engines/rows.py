"""A whole plan as full rows [row, position, d_model]: the batch grows from block to block.

No attention trick: every row is a whole prompt, computed by the model as any batch. Slower than the wavefront,
right for any trunk that treats rows alike, recurrent ones included.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fasttrace.engines.blocks import LastBlock, base_logits, grown, put, restore
from fasttrace.engines.job import Job, Tick, base_ids, corrupted, pack_of_jobs
from fasttrace.engines.readout import Scores
from fasttrace.experiment.sites import SITE
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.axes import Path
from fasttrace.models.hooks import forward_pass, hidden_hook, input_hook, output_hook, raw_output_hook
from fasttrace.planning.on_device import BlockTables, Writes, picked, tables_of
from fasttrace.planning.plan import Layout

LAYOUT: Layout = "full"


def run(anatomy: Anatomy, job: Job, tick: Tick) -> Scores:
    """Runs all cells of a job in one forward pass over whole prompts; see `job.Job`.

    Raises:
        NumericsError: a block produced inf or NaN.
    """
    pack = pack_of_jobs([job], anatomy.n_layers, LAYOUT)
    given = tables_of(pack, anatomy.device)
    last_block = LastBlock(anatomy, pack, given)
    with ExitStack() as stack:
        stack.enter_context(forward_pass(anatomy.model))
        stack.enter_context(output_hook(anatomy.embedding, partial(corrupted, [job])))
        for number, tables in enumerate(given.blocks):
            _Step(anatomy, number, tables, pack.n_base, pack.width).hook(stack)
            stack.enter_context(output_hook(anatomy.blocks[number], last_block.watcher(tick)))
        stack.enter_context(raw_output_hook(anatomy.blocks[-1], last_block.split))
        logits = base_logits(anatomy, pack, base_ids([job]).to(anatomy.device))
    return last_block.scores(logits, [job])[0]


@dataclass(frozen=True)
class _Step:
    """One block of the pass."""

    anatomy: Anatomy
    number: int
    tables: BlockTables
    n_base: int
    n_positions: int

    def hook(self, stack: ExitStack) -> None:
        """Puts the hooks on the block and its parts, until the stack is closed."""
        stack.enter_context(input_hook(self.anatomy.blocks[self.number], self.enter))
        for site, writes in self.tables.writes.items():
            if site != "block_input":
                module = self.anatomy.modules_at(site)[self.number]
                is_input = SITE[site].side == "input"
                rewrite = partial(_overwritten_copy if is_input else restore, writes=writes)
                stack.enter_context((hidden_hook if is_input else output_hook)(module, rewrite))

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Hook on the block: grows its arguments."""
        return grown(args, kwargs, self._grow_hidden, self._grow_other, self._grow_shared)

    def _grow_hidden(self, hidden: Tensor) -> Tensor:
        axis, writes = self.anatomy.row_axis, self.tables.writes.get("block_input")
        if self.tables.source is None and writes is None:
            return hidden
        tokens = hidden.flatten(axis, axis + 1)
        tokens = tokens.clone() if self.tables.source is None else picked(tokens, axis, self.tables.source)
        return put(tokens, axis, writes).unflatten(axis, (-1, self.n_positions))

    def _grow_other(self, path: Path, tensor: Tensor) -> Tensor:
        """[base row, ...] -> [row, ...]; what has no row axis is shared by all rows."""
        axes = self.anatomy.block_axes.of(path, tensor, self.n_base, self.n_positions)
        if axes.row is None:
            return tensor
        rows = picked(tensor.unflatten(axes.row, (self.n_base, axes.per_row)), axes.row, self._base_rows())
        return rows.flatten(axes.row, axes.row + 1)

    def _grow_shared(self, states: Tensor) -> Tensor:
        """Keys and values [row, head, position, d_head] of an earlier block."""
        if self.tables.carried is None:
            return states
        return picked(states, 0, self.tables.carried[:: self.n_positions] // self.n_positions)

    def _base_rows(self) -> Tensor:
        return self.tables.origin[:: self.n_positions] // self.n_positions


def _overwritten_copy(hidden: Tensor, writes: Writes) -> Tensor | None:
    return restore(hidden.clone(), writes)
