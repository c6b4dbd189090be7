"""A whole plan in one forward pass of the unmodified model, over a pack [1, token, d_model] without padding.

The trunk sees an ordinary batch of base rows. The first block's pre-hook turns it into the pack, every block's
pre-hook grows the pack by one gather, and the last block's hook hands the base rows back.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttrace.adapters import Anatomy
from fasttrace.attention import GroupOnDevice, RaggedState, ragged_attention, safe_implementation
from fasttrace.engines.job import Job, Tick
from fasttrace.engines.tables import BlockTables, LastBlock, base_logits, grown, restore, tables_of
from fasttrace.errors import EngineError
from fasttrace.hooks import evaluating, hidden_hook, input_hook, output_hook, raw_output_hook
from fasttrace.plan import BlockPlan, Layout
from fasttrace.readout import Scores

LAYOUT: Layout = "suffix"


def run(anatomy: Anatomy, job: Job, tick: Tick) -> Scores:
    """Runs all cells of a job in one forward pass; see `job.Job`.

    Raises:
        EngineError: the model does not attend through transformers' interface.
        NumericsError: a block produced inf or NaN.
    """
    plan = job.plan(anatomy.n_layers, LAYOUT)
    state = RaggedState(safe_implementation(anatomy.model), 1 + job.samples, len(job.token_ids))
    last_block = LastBlock(anatomy, plan)
    with ExitStack() as stack:
        stack.enter_context(evaluating(anatomy.model))
        stack.enter_context(ragged_attention(anatomy.model, state))
        stack.enter_context(output_hook(anatomy.embedding, job.corruption.added_to))
        for number, block in enumerate(plan.blocks):
            step = _Step(
                number, tables_of(block, len(job.token_ids), anatomy.device), _groups_of(block, anatomy.device), state
            )
            _hook_block(stack, anatomy, step)
            stack.enter_context(output_hook(anatomy.blocks[number], last_block.watcher(tick)))
        stack.enter_context(raw_output_hook(anatomy.blocks[-1], last_block.split))
        logits = base_logits(anatomy, job)
    if state.calls != anatomy.n_layers:
        raise EngineError(f"{state.calls} of {anatomy.n_layers} blocks attended through the pack; use engine='rows'")
    return last_block.scores(logits, job.target)


@dataclass(frozen=True)
class _Step:
    """One block of the pass."""

    number: int
    tables: BlockTables
    groups: tuple[GroupOnDevice, ...]
    state: RaggedState

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Hook on the block: grows its arguments, and says which rectangles its attention will see."""
        self.state.groups = self.groups
        return grown(args, kwargs, self._grow_hidden, self._grow_side)

    def _grow_hidden(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        if self.tables.source is not None:
            tokens = tokens.index_select(0, self.tables.source)
        return tokens.unsqueeze(0)

    def _grow_side(self, side_input: Tensor) -> Tensor:
        """[1 or base row, position, ...] -> [1, token, ...]; other tensors, the mask first, are left as they are."""
        n_base, n_positions = self.state.n_base, self.state.n_positions
        if side_input.dim() < 2 or side_input.shape[1] != n_positions or side_input.shape[0] not in (1, n_base):
            return side_input
        if side_input.dim() == 4 and side_input.shape[1:] == (1, n_positions, n_positions):
            return side_input
        origin = self.tables.origin
        index = self.tables.position if side_input.shape[0] == 1 else origin
        return side_input.flatten(0, 1).index_select(0, index).unsqueeze(0)


def _groups_of(block: BlockPlan, device: torch.device) -> tuple[GroupOnDevice, ...]:
    return tuple(
        GroupOnDevice(
            group.first, group.start, group.tile_rows, len(group.base), torch.from_numpy(group.base).to(device)
        )
        for group in block.groups
    )


def _hook_block(stack: ExitStack, anatomy: Anatomy, step: _Step) -> None:
    attention, mlp, tables = anatomy.attention[step.number], anatomy.mlp[step.number], step.tables
    stack.enter_context(input_hook(anatomy.blocks[step.number], step.enter))
    if tables.attention is not None:
        stack.enter_context(output_hook(attention, lambda hidden: restore(hidden, tables.attention)))
    if tables.mlp_computed is not None:
        keep, spread = tables.mlp_computed
        stack.enter_context(hidden_hook(mlp, lambda hidden: hidden.index_select(1, keep)))
        stack.enter_context(output_hook(mlp, lambda hidden: hidden.index_select(1, spread)))
