"""A whole plan as full rows [row, position, d_model]: the batch grows from block to block.

No attention trick: every row is a whole prompt, computed by the model as any batch. Slower than the wavefront,
right for any trunk that treats rows alike.
"""

from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from fasttrace.adapters import Anatomy
from fasttrace.engines.job import Job, Tick
from fasttrace.engines.tables import BlockTables, LastBlock, base_logits, grown, restore, tables_of
from fasttrace.hooks import evaluating, input_hook, output_hook, raw_output_hook
from fasttrace.plan import Layout
from fasttrace.readout import Scores

LAYOUT: Layout = "full"


def run(anatomy: Anatomy, job: Job, tick: Tick) -> Scores:
    """Runs all cells of a job in one forward pass over whole prompts; see `job.Job`.

    Raises:
        NumericsError: a block produced inf or NaN.
    """
    plan = job.plan(anatomy.n_layers, LAYOUT)
    last_block = LastBlock(anatomy, plan)
    with ExitStack() as stack:
        stack.enter_context(evaluating(anatomy.model))
        stack.enter_context(output_hook(anatomy.embedding, job.corruption.added_to))
        for number, block in enumerate(plan.blocks):
            step = _Step(tables_of(block, len(job.token_ids), anatomy.device), 1 + job.samples, len(job.token_ids))
            stack.enter_context(input_hook(anatomy.blocks[number], step.enter))
            stack.enter_context(output_hook(anatomy.attention[number], step.restore_attention))
            stack.enter_context(output_hook(anatomy.mlp[number], step.restore_mlp))
            stack.enter_context(output_hook(anatomy.blocks[number], last_block.watcher(tick)))
        stack.enter_context(raw_output_hook(anatomy.blocks[-1], last_block.split))
        logits = base_logits(anatomy, job)
    return last_block.scores(logits, job.target)


@dataclass(frozen=True)
class _Step:
    """One block of the pass."""

    tables: BlockTables
    n_base: int
    n_positions: int

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Hook on the block: grows its arguments."""
        return grown(args, kwargs, self._grow_hidden, self._grow_side)

    def _grow_hidden(self, hidden: Tensor) -> Tensor:
        if self.tables.source is None:
            return hidden
        tokens = hidden.flatten(0, 1).index_select(0, self.tables.source)
        return tokens.unflatten(0, (-1, self.n_positions))

    def _grow_side(self, side_input: Tensor) -> Tensor:
        """[base row, ...] -> [row, ...]; what has no row axis is shared by all rows."""
        per_row = side_input.dim() > 1 and side_input.shape[0] == self.n_base
        return side_input.index_select(0, self._base_rows()) if per_row else side_input

    def _base_rows(self) -> Tensor:
        return self.tables.origin[:: self.n_positions] // self.n_positions

    def restore_attention(self, hidden: Tensor) -> Tensor | None:
        """Hook on the attention module."""
        return restore(hidden, self.tables.attention)

    def restore_mlp(self, hidden: Tensor) -> Tensor | None:
        """Hook on the MLP module."""
        return restore(hidden, self.tables.mlp)
