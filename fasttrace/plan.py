"""Cells to edits to a Plan (being written)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a sweep costs, summed over its passes and samples; base rows (clean, corrupted) are left out.

    Attributes:
        rows: restored rows that reach the readout.
        token_blocks: one block computed for one token of a restored row counts 1 (attention 1/3, MLP 2/3).
        full_token_blocks: the same if every cell were one full row of the prompt.
        flops: floating-point operations of all matmuls, base rows and head included.
    """

    rows: int
    token_blocks: float
    full_token_blocks: float
    flops: int
