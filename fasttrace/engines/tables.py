"""What the wavefront and rows engines share: tables on the device, growth, edits, and the end of a pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrace.adapters import Anatomy
from fasttrace.engines.job import Job, Tick
from fasttrace.hooks import first_of, hidden_argument, with_first, with_hidden_argument
from fasttrace.plan import BlockPlan, Plan
from fasttrace.readout import Scores, check_finite, distributions, row_probabilities, scores_of_rows


@dataclass(frozen=True)
class BlockTables:
    """`plan.BlockPlan` as int64 tensors.

    Attributes:
        source, origin: as there.
        position: [token] prompt position of each token.
        attention, mlp: (tokens to write, tokens to read); None where there is nothing to do.
        mlp_computed: (keep, spread), in which the MLP's edits are applied already; None: all tokens are computed.
    """

    source: Tensor | None
    origin: Tensor
    position: Tensor
    attention: tuple[Tensor, Tensor] | None
    mlp: tuple[Tensor, Tensor] | None
    mlp_computed: tuple[Tensor, Tensor] | None


def tables_of(block: BlockPlan, n_positions: int, device: torch.device) -> BlockTables:
    """Moves one block's tables to a device, before the pass."""

    def move(table: np.ndarray | None) -> Any:
        return None if table is None else torch.from_numpy(table).to(device, non_blocking=True)

    def pair(to: np.ndarray, taken_from: np.ndarray) -> Any:
        return (move(to), move(taken_from)) if len(to) else None

    return BlockTables(
        source=move(block.source),
        origin=move(block.origin),
        position=move(block.origin % n_positions),
        attention=pair(block.attention_to, block.attention_from),
        mlp=None if block.mlp_keep is not None else pair(block.mlp_to, block.mlp_from),
        mlp_computed=None if block.mlp_keep is None else (move(block.mlp_keep), move(block.mlp_spread)),
    )


def restore(hidden: Tensor, edits: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Overwrites tokens of a module's own fresh output with those of the base runs in the same pack, in place.

    Args:
        hidden: [row, position, d_model].
        edits: tokens to write, tokens to read; None: nothing to do.
    """
    if edits is None:
        return None
    to, taken_from = edits
    tokens = hidden.flatten(0, -2)
    tokens.index_copy_(0, to, tokens.index_select(0, taken_from))
    return tokens.unflatten(0, hidden.shape[:-1])


def grown(
    args: tuple, kwargs: dict, grow_hidden: Callable[[Tensor], Tensor], grow_side: Callable[[Tensor], Tensor]
) -> tuple[tuple, dict]:
    """A block's arguments with the hidden state grown, and every other tensor in them too."""

    def grow(value: Any) -> Any:
        if isinstance(value, Tensor):
            return grow_side(value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(grow, value))
        if type(value) is dict:
            return {name: grow(item) for name, item in value.items()}
        return value

    hidden = grow_hidden(hidden_argument(args, kwargs))
    args, kwargs = with_hidden_argument(args, kwargs, None)
    return with_hidden_argument(grow(args), grow(kwargs), hidden)


class LastBlock:
    """Keeps the restored rows' last states when the last block is done, and lets the base rows go on.

    Attributes:
        states: [sample * row, d_model], set by `split`.
        block_sums: one sum over all outputs a block, for the check that they are finite.
    """

    def __init__(self, anatomy: Anatomy, plan: Plan):
        self.anatomy, self.plan = anatomy, plan
        self.last_tokens = torch.from_numpy(plan.last_tokens.reshape(-1)).to(anatomy.device)
        self.states = torch.zeros(0)
        self.block_sums: list[Tensor] = []
        self.form: Any = None

    def watcher(self, tick: Tick) -> Callable[[Tensor], None]:
        """The hook that records that a block is done."""

        def watch(hidden: Tensor) -> None:
            self.block_sums.append(hidden.sum(dtype=torch.float32))
            tick()

        return watch

    def split(self, output: Any) -> Any:
        """The last block's output for the base rows alone, [1 + sample, position, d_model]."""
        self.form = output if not isinstance(output, Tensor) else None
        tokens = first_of(output).flatten(0, -2)
        shape = self.plan.shape
        self.states = tokens.index_select(0, self.last_tokens)
        base = tokens[: (1 + shape.samples) * shape.n_positions]
        return self.as_output(base.unflatten(0, (1 + shape.samples, shape.n_positions)))

    def as_output(self, hidden: Tensor) -> Any:
        """A hidden state in the form of a block's output."""
        return hidden if self.form is None else with_first(self.form, hidden)

    def scores(self, base_logits: Tensor, target: int | None) -> Scores:
        """Reads out all rows. The first point of a pass that waits for the device."""
        check_finite(self.block_sums, self.anatomy.dtype)
        base = distributions(base_logits)
        target = int(base[0].argmax()) if target is None else target
        rows = row_probabilities(self.anatomy, self.states, target, self.as_output)
        rows = rows.cpu().numpy().reshape(self.plan.last_tokens.shape)
        return scores_of_rows(rows, self.plan.cell_row, base, target)


def base_logits(anatomy: Anatomy, job: Job) -> Tensor:
    """The model's forward over the base rows [1 + sample, position]; last-position logits [1 + sample, vocab]."""
    ids = job.token_ids.to(anatomy.device).expand(1 + job.samples, -1)
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if anatomy.keeps_logits:
        arguments["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=anatomy.device)
    return anatomy.model(**arguments).logits[:, -1]
