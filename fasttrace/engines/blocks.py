"""What the packed engines and rows share: tables on the device, growth, edits, and the end of a pass."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrace.engines.attention_ragged import GroupOnDevice
from fasttrace.engines.job import Tick
from fasttrace.engines.readout import Scores, check_finite, distributions, row_probabilities, scores_of_rows
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.axes import Path
from fasttrace.models.hooks import first_of, hidden_argument, with_first, with_hidden_argument
from fasttrace.planning.packs import Pack, kept
from fasttrace.planning.plan import BlockPlan, Group

Edits = tuple[Tensor, Tensor]
"""Tokens to write, tokens to read."""


@dataclass(frozen=True)
class BlockTables:
    """`plan.BlockPlan` as int64 tensors.

    Attributes:
        source, carried, origin: as there.
        position: [token] prompt position of each token.
        attention, mlp: edits; None where there is nothing to do.
        mlp_computed: (keep, spread), in which the MLP's edits are applied already; None: all tokens are computed.
        groups: the pack as rectangles.
    """

    source: Tensor | None
    carried: Tensor | None
    origin: Tensor
    position: Tensor
    attention: Edits | None
    mlp: Edits | None
    mlp_computed: tuple[Tensor, Tensor] | None
    groups: tuple[GroupOnDevice, ...]


@dataclass(frozen=True)
class PassTables:
    """All integers that a pass needs beside the prompts' tokens, on its device.

    Attributes:
        blocks: one set a block.
        last_tokens, handed_on: as in `packs.Pack`.
    """

    blocks: list[BlockTables]
    last_tokens: Tensor
    handed_on: Tensor


@kept
def tables_of(pack: Pack, device: torch.device) -> PassTables:
    """All tables of a pack in one copy to a device, before the pass; those of the last few packs are there already."""
    columns = [_columns(block, pack.width) for block in pack.blocks]
    bases = [[group.base for group in block.groups] for block in pack.blocks]
    wanted = [table for block in columns for table in block if table is not None]
    wanted += [*chain(*bases), pack.last_tokens, pack.handed_on]
    given = iter(on_device(wanted, device))
    tables = [[None if table is None else next(given) for table in block] for block in columns]
    groups = [tuple(_group(group, next(given)) for group in block.groups) for block in pack.blocks]
    blocks = [_block_tables(*block, groups=each) for block, each in zip(tables, groups, strict=True)]
    return PassTables(blocks, *given)


def _group(group: Group, base: Tensor) -> GroupOnDevice:
    return GroupOnDevice(
        group.n_positions, group.first, group.stop, group.start, group.tile_rows, len(group.base), base
    )


def on_device(tables: Sequence[np.ndarray], device: torch.device) -> Sequence[Tensor]:
    """Tables of one type as tensors that share one buffer, see `sent`."""
    if not tables:
        return ()
    return sent(torch.from_numpy(np.concatenate(tables)), device).split([len(table) for table in tables])


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; from pinned memory, so that nothing waits for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _columns(block: BlockPlan, width: int) -> tuple[np.ndarray | None, ...]:
    has_attention, has_mlp = len(block.attention_to) > 0, len(block.mlp_to) > 0
    return (
        block.source,
        block.carried,
        block.origin,
        block.origin % width,
        block.attention_to if has_attention else None,
        block.attention_from if has_attention else None,
        block.mlp_to if has_mlp else None,
        block.mlp_from if has_mlp else None,
        block.mlp_keep,
        block.mlp_spread,
    )


def _block_tables(source, carried, origin, position, *edits, groups) -> BlockTables:
    attention, mlp, mlp_computed = (None if edits[i] is None else (edits[i], edits[i + 1]) for i in (0, 2, 4))
    carried = source if carried is None else carried
    return BlockTables(source, carried, origin, position, attention, mlp, mlp_computed, groups)


def picked(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """`tensor.index_select`, with the index on the tensor's own device: blocks may live on several."""
    return tensor.index_select(axis, index.to(tensor.device, non_blocking=True))


def restore(hidden: Tensor, edits: Edits | None) -> Tensor | None:
    """Overwrites tokens of a module's own fresh output with those of the base runs in the same pack, in place.

    Args:
        hidden: [row, position, d_model], or [token, d_model].
        edits: tokens to write, tokens to read; None: nothing to do.
    """
    if edits is None:
        return None
    to, taken_from = edits
    tokens = hidden.flatten(0, -2)
    tokens.index_copy_(0, to.to(hidden.device, non_blocking=True), picked(tokens, 0, taken_from))
    return tokens.unflatten(0, hidden.shape[:-1])


def grown(
    args: tuple,
    kwargs: dict,
    grow_hidden: Callable[[Tensor], Tensor],
    grow_other: Callable[[Path, Tensor], Tensor],
    grow_shared: Callable[[Tensor], Tensor],
) -> tuple[tuple, dict]:
    """A block's arguments with the hidden state grown, and every other tensor in them too.

    Args:
        args: positional arguments.
        kwargs: arguments by name.
        grow_hidden: for the hidden state.
        grow_other: for what comes from outside the blocks, by its path in the arguments.
        grow_shared: for what earlier blocks of this pass left in a mapping that the blocks share; in place.
    """

    def grow(value: Any, path: Path) -> Any:
        if isinstance(value, Tensor):
            return grow_other(path, value)
        if type(value) in (tuple, list):
            return type(value)(grow(item, (*path, number)) for number, item in enumerate(value))
        if type(value) is dict:
            return {name: grow(item, (*path, name)) for name, item in value.items()}
        if isinstance(value, MutableMapping):
            for name, item in value.items():
                value[name] = type(item)(map(grow_shared, item))
        return value

    hidden = grow_hidden(hidden_argument(args, kwargs))
    args, kwargs = with_hidden_argument(args, kwargs, None)
    return with_hidden_argument(grow(args, ()), grow(kwargs, ()), hidden)


class LastBlock:
    """Keeps the restored rows' last states when the last block is done, and lets the base rows go on.

    Attributes:
        states: [..., sample * row, d_model], set by `split`.
        block_sums: one sum over all outputs a block, for the check that they are finite.
    """

    def __init__(self, anatomy: Anatomy, pack: Pack, tables: PassTables):
        self.anatomy, self.pack, self.tables = anatomy, pack, tables
        self.axis = anatomy.row_axis
        self.states = torch.zeros(0, device="cpu")
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
        tokens = first_of(output).flatten(self.axis, self.axis + 1)
        self.states = picked(tokens, self.axis, self.tables.last_tokens)
        base = picked(tokens, self.axis, self.tables.handed_on)
        return self.as_output(base.unflatten(self.axis, (self.pack.n_base, self.pack.width)))

    def as_output(self, hidden: Tensor) -> Any:
        """A hidden state in the form of a block's output."""
        return hidden if self.form is None else with_first(self.form, hidden)

    def scores(self, base_logits: Tensor, targets: Sequence[int | None]) -> list[Scores]:
        """Reads out all rows of every prompt; only then the host waits for the device."""
        plans, device = self.pack.plans, base_logits.device
        sizes = [plan.last_tokens.size for plan in plans]
        ends = np.cumsum([plan.n_base for plan in plans])
        given = [-1 if target is None else target for target in targets]
        tables = [ends - [plan.n_base for plan in plans], np.array(given), np.repeat(np.arange(len(plans)), sizes)]
        clean_rows, wanted, plan_of_row = on_device(tables, device)
        wanted = torch.where(wanted < 0, picked(base_logits, 0, clean_rows).argmax(-1), wanted)
        rows = row_probabilities(self.anatomy, self.states, wanted[plan_of_row], self.as_output)
        check_finite(self.block_sums, self.anatomy.dtype)
        bases = np.split(distributions(base_logits), ends[:-1])
        parts = np.split(rows.cpu().numpy(), np.cumsum(sizes)[:-1])
        return [
            scores_of_rows(part.reshape(plan.last_tokens.shape), plan.cell_row, base, target)
            for part, plan, base, target in zip(parts, plans, bases, wanted.cpu().tolist(), strict=True)
        ]


def base_logits(anatomy: Anatomy, ids: Tensor) -> Tensor:
    """The model's forward over the base rows [base row, width]; last-position logits [base row, vocab]."""
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if anatomy.keeps_logits:
        arguments["logits_to_keep"] = slice(-1, None)  # an int lets gemma4 drop tokens, a tensor has one device
    return anatomy.model(**arguments).logits[:, -1]
