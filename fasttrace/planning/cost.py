"""What a plan costs, in counts that do not depend on the machine."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat

from fasttrace.planning.edits import Shape
from fasttrace.planning.plan import BlockPlan, Plan

ATTENTION_SHARE, MLP_SHARE = 1 / 3, 2 / 3
"""Parts of one block's matrix work for one token, as in GPT-2."""


@dataclass(frozen=True)
class Cost:
    """What a sweep costs, summed over its passes and samples.

    Attributes:
        rows: restored rows that reach the readout.
        token_blocks: one block computed for one token of a restored row counts 1 (attention 1/3, MLP 2/3);
            base rows (clean, corrupted) are left out.
        full_token_blocks: the same if every cell were one full row of the prompt.
        flops: floating-point operations of all matrix products, base rows and head included.
    """

    rows: int
    token_blocks: float
    full_token_blocks: float
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.rows + other.rows,
            self.token_blocks + other.token_blocks,
            self.full_token_blocks + other.full_token_blocks,
            self.flops + other.flops,
        )


@dataclass(frozen=True)
class UnitWork:
    """Floating-point operations of a model's parts (two a multiply-add).

    Attributes:
        attention: [block] the attention projections of one token.
        mlp: [block] the MLP of one token.
        pair: [block] scores and weighted values of one query-key pair, all heads; one number if all blocks are alike.
        head: the language-model head for one token.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    pair: tuple[int, ...] | int
    head: int

    def by_block(self) -> Iterator[tuple[int, int, int]]:
        """(attention, MLP, pair) of each block."""
        pairs = repeat(self.pair, len(self.mlp)) if isinstance(self.pair, int) else self.pair
        return zip(self.attention, self.mlp, pairs, strict=True)


def cost_of(plan: Plan, unit: UnitWork) -> Cost:
    """The cost of running a plan once."""
    shape = plan.shape
    n_base = plan.n_base * shape.n_positions
    token_blocks = sum(
        (block.n_tokens - n_base) * ATTENTION_SHARE + (_mlp_tokens(block) - n_base) * MLP_SHARE for block in plan.blocks
    )
    flops = sum(
        block.n_tokens * attention + _mlp_tokens(block) * mlp + _pairs(block) * pair
        for block, (attention, mlp, pair) in zip(plan.blocks, unit.by_block(), strict=True)
    )
    head_rows = plan.read_tokens.size + plan.n_base * len(shape.read_positions)
    return Cost(
        rows=plan.last_tokens.size,
        token_blocks=token_blocks,
        full_token_blocks=float(len(plan.cell_row) * shape.copies * shape.n_layers * shape.n_positions),
        flops=flops + head_rows * unit.head,
    )


def full_cost(shape: Shape, n_cells: int, unit: UnitWork) -> Cost:
    """The cost of one whole row per cell and sample."""
    rows = n_cells * shape.copies
    token_blocks = float(rows * shape.n_layers * shape.n_positions)
    pairs = shape.n_positions * (shape.n_positions + 1) // 2
    per_row = sum(shape.n_positions * (attention + mlp) + pairs * pair for attention, mlp, pair in unit.by_block())
    per_row += len(shape.read_positions) * unit.head
    return Cost(rows, token_blocks, token_blocks, (rows + shape.n_base) * per_row)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of several passes."""
    return sum(costs, start=Cost(0, 0.0, 0.0, 0))


def _mlp_tokens(block: BlockPlan) -> int:
    return block.n_tokens if block.mlp_keep is None else len(block.mlp_keep)


def _pairs(block: BlockPlan) -> int:
    """Query-key pairs of one block under the causal mask."""
    return sum(
        len(group.base) * group.tile_rows * sum(range(group.first + 1, group.stop + 1)) for group in block.groups
    )
