"""What the packed engines and rows share at the blocks: growth, edits, and the end of a pass."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrace.engines.job import Job, Tick, answer_tables
from fasttrace.engines.metrics import Answers, distributions, over_reads
from fasttrace.engines.readout import (
    PromptAnswers,
    Scores,
    check_finite,
    scored_in_slices,
    scores_of_plan,
    scores_of_rows,
)
from fasttrace.errors import PlanError
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.axes import Path
from fasttrace.models.hooks import first_of, hidden_argument, with_first, with_hidden_argument
from fasttrace.planning.on_device import PassTables, Writes, on_device, picked
from fasttrace.planning.packs import Pack


def restore(hidden: Tensor, writes: Writes | None) -> Tensor | None:
    """Overwrites tokens of a module's own fresh output, in place.

    Args:
        hidden: [row, position, d_model], or [token, d_model].
        writes: base runs' values in the same pack, and vectors; None: nothing to do.
    """
    if writes is None:
        return None
    tokens = hidden.flatten(0, -2)
    if writes.tokens is not None:
        to, taken_from = writes.tokens
        tokens.index_copy_(0, to.to(hidden.device, non_blocking=True), picked(tokens, 0, taken_from))
    return put(tokens, 0, writes).unflatten(0, hidden.shape[:-1])


def put(tokens: Tensor, axis: int, writes: Writes | None, of: Tensor | None = None) -> Tensor:
    """Overwrites tokens with vectors, in place.

    Args:
        tokens: with an axis of tokens, and units last.
        axis: that axis.
        writes: the vectors; None, or without vectors: nothing to do.
        of: [token] where a token of the pack stands here; None: where it stands in the pack.

    Raises:
        PlanError: vectors of another width.
    """
    if writes is None or writes.vectors is None:
        return tokens
    to, number = (index.to(tokens.device, non_blocking=True) for index in writes.vectors)
    values = picked(writes.bank.to(tokens.device, tokens.dtype), 0, number)
    if values.shape[-1] not in (1, tokens.shape[-1]):
        raise PlanError(
            f"a vector has {values.shape[-1]} numbers where the model has {tokens.shape[-1]} units: take it from this "
            "site of this model"
        )
    view = tokens.movedim(axis, 0)
    view[to if of is None else picked(of, 0, to)] = values.view(len(values), *[1] * (view.dim() - 2), values.shape[-1])
    return tokens


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
        self.states = put(picked(tokens, self.axis, self.tables.read_tokens), self.axis, self.tables.read_writes)
        base = picked(tokens, self.axis, self.tables.handed_on)
        return self.as_output(base.unflatten(self.axis, (self.pack.n_base, self.pack.width)))

    def as_output(self, hidden: Tensor) -> Any:
        """A hidden state in the form of a block's output."""
        return hidden if self.form is None else with_first(self.form, hidden)

    def scores(self, base_logits: Tensor, jobs: Sequence[Job]) -> list[Scores]:
        """Reads out all rows of every prompt; only then the host waits for the device."""
        plans, device = self.pack.plans, base_logits.device
        n_reads = [len(plan.shape.read_positions) for plan in plans]
        # Rows of logits and states are those of prompt after prompt, read after read.
        sizes = np.repeat([plan.last_tokens.size for plan in plans], n_reads)
        n_base = np.repeat([plan.n_base for plan in plans], n_reads)
        ends, numbers = np.cumsum(n_base), np.arange(len(n_base))
        rows_of_base = _rows_of_base([plan.n_base for plan in plans], n_reads, base_logits.shape[1])
        prompts, of_base = np.repeat(numbers, sizes), np.repeat(numbers, n_base)
        asked = answer_tables(jobs)
        given = on_device([rows_of_base, ends - n_base, prompts, of_base, *map(np.ravel, asked)], device)
        at, clean_rows, rows, base_rows = given[:4]
        targets, foils = (flat.view(table.shape) for flat, table in zip(given[4:], asked, strict=True))
        base_logits = base_logits[:, 0] if base_logits.shape[1] == 1 else base_logits.flatten(0, 1)[at]
        answers = Answers.of(picked(base_logits, 0, clean_rows), targets, foils, jobs[0].metrics)
        base = scored_in_slices(base_logits, answers, of_base, base_rows)
        restored = scores_of_rows(self.anatomy, self.states, prompts, rows, answers, self.as_output)
        first = np.cumsum(n_reads) - n_reads
        found = distributions(base_logits).split(n_base.tolist())
        check_finite(self.block_sums, self.anatomy.dtype)
        parts = np.split(restored.cpu().numpy(), np.cumsum(sizes)[:-1], axis=1)
        bases = np.split(base.cpu().numpy(), ends[:-1], axis=1)
        tokens = answers.targets[:, 0].tolist()
        scores = []
        for job, plan, begin, count in zip(jobs, plans, first.tolist(), n_reads, strict=True):
            of_rows, of_runs = (
                over_reads(answers.names, np.stack(each[begin : begin + count], axis=1)) for each in (parts, bases)
            )
            of_prompt = PromptAnswers(job.targets or tuple(tokens[begin : begin + count]), job.foil, answers.names)
            of_rows = of_rows.reshape(len(of_rows), *plan.last_tokens.shape)
            scores.append(scores_of_plan(of_rows, plan.cell_row, of_runs, found[begin], of_prompt))
        return scores


def _rows_of_base(n_base: Sequence[int], n_reads: Sequence[int], columns: int) -> np.ndarray:
    """Where the logits of prompt after prompt, read after read, stand in [base row, last columns]."""
    starts = np.cumsum(n_base) - n_base
    return np.concatenate(
        [
            ((start + np.arange(count)) * columns + columns - reads + np.arange(reads)[:, None]).reshape(-1)
            for start, count, reads in zip(starts, n_base, n_reads, strict=True)
        ]
    )


def base_logits(anatomy: Anatomy, pack: Pack, ids: Tensor) -> Tensor:
    """The model's forward over the base rows [base row, width]; logits [base row, read, vocab] of the last columns."""
    columns = max(len(plan.shape.read_positions) for plan in pack.plans)
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if anatomy.keeps_logits:
        arguments["logits_to_keep"] = slice(-columns, None)  # an int lets gemma4 drop tokens, a tensor has one device
    return anatomy.model(**arguments).logits[:, -columns:]
