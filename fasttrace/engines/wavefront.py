"""A whole plan in one forward pass of the unmodified model, over a pack [1, token, d_model] without padding.

The trunk sees an ordinary batch of base rows. The first block's pre-hook turns it into the pack, every block's
pre-hook grows the pack by one gather, and the last block's hook hands the base rows back.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fasttrace.engines.attention_forked import Fork, forked_attention
from fasttrace.engines.attention_ragged import PackState, ragged_attention
from fasttrace.engines.blocks import LastBlock, base_logits, grown, put, restore
from fasttrace.engines.job import Job, Tick, base_ids, corrupted, pack_of_jobs
from fasttrace.engines.readout import Scores
from fasttrace.errors import EngineError
from fasttrace.fusing.choose import attention_kernel
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.axes import Axes, Path
from fasttrace.models.hooks import forward_pass, hidden_hook, input_hook, output_hook, raw_output_hook
from fasttrace.planning.on_device import BlockTables, PassTables, Writes, picked, sent, tables_of
from fasttrace.planning.packs import Pack
from fasttrace.planning.plan import Layout

if TYPE_CHECKING:
    from fasttrace.fusing.attention import KernelState

LAYOUT: Layout = "narrow"
FORK_LAYOUT: Layout = "suffix"
"""Attention code of a model's own may count on queries up to the end of the prompt."""

Attention = Callable[[Anatomy, PackState], AbstractContextManager[Fork | None]]
"""How a pack attends, while the context is open."""


def run(anatomy: Anatomy, job: Job, tick: Tick) -> Scores:
    """Runs all cells of a job in one forward pass; see `job.Job`.

    Raises:
        EngineError: the model does not attend through transformers' interface.
        NumericsError: a block produced inf or NaN.
    """
    return run_jobs(anatomy, [job], tick)[0]


def run_jobs(anatomy: Anatomy, jobs: Sequence[Job], tick: Tick, ready: "Ready | None" = None) -> list[Scores]:
    """The same for the jobs of several prompts in one forward pass; `ready` is theirs, if it has been made already."""
    return _run(anatomy, ready or make_ready(anatomy, jobs), tick, ragged_attention)


def run_fork(anatomy: Anatomy, job: Job, tick: Tick) -> Scores:
    """The same for models with attention code of their own, which is called once per group of rows.

    Raises:
        EngineError: the attention modules take no cache of earlier keys and values.
        NumericsError: a block produced inf or NaN.
    """
    return _run(anatomy, make_ready(anatomy, [job], layout=FORK_LAYOUT), tick, forked_attention)[0]


@dataclass(frozen=True)
class Ready:
    """A pass with all that it needs on the device: nothing has to be copied there while it runs.

    Attributes:
        jobs: one a prompt, their noise on the device.
        pack: theirs.
        ids: [base row, width] their tokens.
        tables: theirs.
        kernel: what makes attention one launch a block; None: group by group.
    """

    jobs: Sequence[Job]
    pack: Pack
    ids: Tensor
    tables: PassTables
    kernel: "KernelState | None"


def make_ready(anatomy: Anatomy, jobs: Sequence[Job], fuse: bool | None = None, layout: Layout = LAYOUT) -> Ready:
    """Plans the jobs of several prompts as one pass and sends its tables to the device.

    Args:
        anatomy: the model.
        jobs: one a prompt.
        fuse: whether the pass will run with fused operations; None: as it is now.
        layout: what rows hold.
    """
    pack = pack_of_jobs(jobs, anatomy.n_layers, layout)
    ids, tables = sent(base_ids(jobs), anatomy.device), tables_of(pack, anatomy.device)
    return Ready([job.on(anatomy.device) for job in jobs], pack, ids, tables, attention_kernel(anatomy, pack, fuse))


def _run(anatomy: Anatomy, ready: Ready, tick: Tick, attention: Attention) -> list[Scores]:
    jobs, pack, given = ready.jobs, ready.pack, ready.tables
    state = PackState(pack.base_rows, pack.width, kernel=ready.kernel)
    last_block = LastBlock(anatomy, pack, given)
    with ExitStack() as stack:
        stack.enter_context(forward_pass(anatomy.model))
        fork = stack.enter_context(attention(anatomy, state))
        stack.enter_context(output_hook(anatomy.embedding, partial(corrupted, jobs)))
        for number, tables in enumerate(given.blocks):
            _Step(anatomy, number, tables, state).hook(stack, fork)
            stack.enter_context(output_hook(anatomy.blocks[number], last_block.watcher(tick)))
        stack.enter_context(raw_output_hook(anatomy.blocks[-1], last_block.split))
        logits = base_logits(anatomy, pack, ready.ids)
    if state.calls != anatomy.n_layers:
        raise EngineError(f"{state.calls} of {anatomy.n_layers} blocks attended through the pack; use engine='rows'")
    how = {"attention_by": "groups" if state.kernel is None else state.kernel.by}
    return [replace(scores, how=how) for scores in last_block.scores(logits, jobs)]


@dataclass(frozen=True)
class _Step:
    """One block of the pass."""

    anatomy: Anatomy
    number: int
    tables: BlockTables
    state: PackState

    def hook(self, stack: ExitStack, fork: Fork | None) -> None:
        """Puts the hooks on the block and its parts, until the stack is closed."""
        stack.enter_context(input_hook(self.anatomy.blocks[self.number], self.enter))
        writes = self.tables.writes
        if "attention_output" in writes:
            attention = self.anatomy.modules_at("attention_output")[self.number]
            is_whole = attention is self.anatomy.parts.mixers[self.number]
            rewrite = restore if fork is None or is_whole else fork.restore
            stack.enter_context(output_hook(attention, partial(rewrite, writes=writes["attention_output"])))
        mlp = self.anatomy.parts.mlp[self.number]
        if self.tables.mlp_computed is not None and mlp is not None:
            mlp_writes = _MLP(*self.tables.mlp_computed, writes.get("mlp_output"))
            mlp_writes.hook(stack, mlp)
            spread = mlp_writes.spread_if_skipping
        else:
            spread = _nowhere
        if "mlp_activation" in writes:
            down = self.anatomy.modules_at("mlp_activation")[self.number]
            rewrite = partial(_activation_put, writes["mlp_activation"], spread)
            stack.enter_context(hidden_hook(down, rewrite))

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Hook on the block: grows its arguments, and says which rectangles its attention will see."""
        self.state.groups = self.tables.groups
        if self.state.kernel is not None:
            self.state.kernel.number = self.number
        return grown(args, kwargs, self._grow_hidden, self._grow_other, self._grow_shared)

    def _grow_hidden(self, hidden: Tensor) -> Tensor:
        axis, writes = self.anatomy.row_axis, self.tables.writes.get("block_input")
        tokens = hidden.flatten(axis, axis + 1)
        if self.tables.source is not None:
            tokens = picked(tokens, axis, self.tables.source)
        elif writes is not None:
            tokens = tokens.clone()
        return put(tokens, axis, writes).unsqueeze(axis)

    def _grow_other(self, path: Path, tensor: Tensor) -> Tensor:
        """[..., base row or 1, position, ...] -> [..., 1, token, ...]; masks and what has no tokens stay."""
        axes = self.anatomy.block_axes.of(path, tensor, self.state.n_base, self.state.n_positions)
        if len(axes.token) != 1:
            return tensor
        token = axes.token[0]
        if token == 0:
            return picked(tensor, 0, self.tables.position)
        if axes.row == token - 1 and axes.per_row == 1:
            return picked(tensor.flatten(token - 1, token), token - 1, self.tables.origin).unsqueeze(token - 1)
        return picked(tensor, token, self.tables.position) if _is_of_tokens(tensor, axes) else tensor

    def _grow_shared(self, states: Tensor) -> Tensor:
        """Keys and values [1, head, token, d_head] of an earlier block."""
        return states if self.tables.carried is None else picked(states, -2, self.tables.carried)


def _is_of_tokens(tensor: Tensor, axes: Axes) -> bool:
    """Whether what all rows share says something of each token, and is not a bias on the scores of keys."""
    token = axes.token[0]
    is_last = token == tensor.dim() - 1
    return (
        axes.row is None
        and tensor.shape[token - 1] == 1
        and (token == 1 or not is_last or not tensor.is_floating_point())
    )


class _MLP:
    """Skips the MLP's thrown-away work: hooks on its input and output.

    An MLP that takes more tensors than its hidden state is computed whole, and edited afterwards.
    """

    def __init__(self, keep: Tensor, spread: Tensor, writes: Writes | None):
        self.keep, self.spread, self.writes = keep, spread, writes
        self.skips = False

    def hook(self, stack: ExitStack, mlp: nn.Module) -> None:
        """Puts the hooks on a module, until the stack is closed."""
        stack.enter_context(input_hook(mlp, self.enter))
        stack.enter_context(output_hook(mlp, self.leave))

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Keeps the tokens that have to be computed."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.skips = len(tensors) == len(args) == 1
        return ((_tokens_picked(args[0], self.keep),), kwargs) if self.skips else None

    def leave(self, hidden: Tensor) -> Tensor | None:
        """Puts the computed tokens where they belong, restored ones included."""
        if not self.skips:
            return restore(hidden, self.writes)
        tokens = _tokens_picked(hidden, self.spread)
        return put(tokens, tokens.dim() - 2, self.writes)

    def spread_if_skipping(self) -> Tensor | None:
        """[token] where each token stands among those that the MLP computes; None: where it stands in the pack."""
        return self.spread if self.skips else None


def _nowhere() -> None:
    """Where no token is left out of the MLP, each stands where it stands in the pack."""


def _activation_put(writes: Writes, spread: Callable[[], Tensor | None], hidden: Tensor) -> Tensor:
    """Hook on a down projection: its input with vectors put in."""
    tokens = hidden.clone()
    put(tokens.view(-1, tokens.shape[-1]), 0, writes, spread())
    return tokens


def _tokens_picked(hidden: Tensor, index: Tensor) -> Tensor:
    """[1, token, width] or [token, width], with other tokens."""
    return picked(hidden, hidden.dim() - 2, index)
