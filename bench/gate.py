"""Agreement before time: an engine is compared with plain forward passes before it is timed.

`Plain` computes one cell in one forward of 1 + N full rows (clean, then the N corrupted samples) with hooks
on the model's modules. It shares nothing with the engines: no plan, no pack, no fasttrace code. The value
restored for `mlp_activation` is the MLP's output: the same thing, since the down projection acts per token.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.cases import STREAMS, Case, Cell, Workload, free_bytes, weight_bytes

TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Largest relative difference of a probability. In half precision a matmul's shape changes its rounding."""

FLOOR = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""In half precision an engine may be this far from float32, or ROOM times as far as plain passes are."""

ROOM = 3

HALF_COPIES = 3
"""Free memory that the comparison with float32 needs, in sizes of the model in half precision."""

Edit = Callable[[Tensor], Tensor]


class DisagreementError(RuntimeError):
    """Two ways of computing the same cells gave different numbers; nothing may be timed."""


@dataclass(frozen=True)
class Plain:
    """The plain computation of a workload's runs."""

    workload: Workload

    def base(self) -> tuple[float, float]:
        """Probability of the target in the clean run, and its mean over the corrupted runs."""
        probs = self._probs(())
        return probs[0].item(), probs[1:].mean().item()

    def cell(self, cell: Cell) -> float:
        """Mean probability of the target over the samples' restored runs of one cell."""
        return self._probs((cell,))[1:].mean().item()

    @torch.no_grad()
    def _probs(self, cells: tuple[Cell, ...]) -> Tensor:
        """Probability of the target per row [1 + n_samples]; row 0 is clean."""
        work = self.workload
        rows = torch.tensor([work.prompt] * (1 + work.case.samples), device=work.device)
        with ExitStack() as hooks:
            hooks.enter_context(editing(work.model.get_input_embeddings(), self._corrupt))
            for cell in cells:
                for module in restored_modules(work, cell):
                    hooks.enter_context(editing(module, restore_from_first_row(cell.position)))
            logits = work.model(rows, use_cache=False).logits[:, -1]
        return logits.float().softmax(-1)[:, work.target]

    def _corrupt(self, embedded: Tensor) -> Tensor:
        """Add the noise to the subject of rows 1.., in float64, rounded once to the model's dtype."""
        begin, end = self.workload.case.subject
        noise = torch.from_numpy(draw_noise(self.workload.case, embedded.shape[-1])).to(embedded.device)
        embedded = embedded.clone()
        embedded[1:, begin:end] = (embedded[1:, begin:end].double() + noise).to(embedded.dtype)
        return embedded


def draw_noise(case: Case, width: int) -> NDArray[np.float64]:
    """The corruption [n_samples, subject tokens, width], drawn as ROME draws it."""
    begin, end = case.subject
    return np.random.RandomState(case.seed).randn(case.samples, end - begin, width) * case.noise


def restore_from_first_row(position: int) -> Edit:
    """An edit of [rows, tokens, width] that gives every row the first row's value at one position."""

    def restore(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[1:, position] = hidden[0, position]
        return hidden

    return restore


def restored_modules(work: Workload, cell: Cell) -> list[nn.Module]:
    """The modules whose outputs a cell restores."""
    blocks = work.case.window(cell.stream, cell.layer)
    return [_module(work, cell.stream, block) for block in blocks]


def _module(work: Workload, stream: str, block: int) -> nn.Module:
    trunk, attention = ("transformer.h", "attn") if work.case.is_gpt2 else ("model.layers", "self_attn")
    child = {"block_output": "", "mlp_activation": ".mlp", "attention_output": f".{attention}"}[stream]
    return work.model.get_submodule(f"{trunk}.{block}{child}")


@contextmanager
def editing(module: nn.Module, edit: Edit) -> Iterator[None]:
    """Apply `edit` to the module's output, or to the first of its outputs, for the length of the context."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def spread_cells(case: Case, count: int) -> list[Cell]:
    """About `count` cells: as many of each stream, evenly over the blocks, going round the positions."""
    per_stream = max(1, count // len(STREAMS))
    layers = [(2 * k + 1) * case.n_layers // (2 * per_stream) for k in range(per_stream)]
    # Backwards from the last token: the positions that matter most come first.
    return [
        Cell(stream, layer, (case.tokens - 1 - 2 * k - shift) % case.tokens)
        for shift, stream in enumerate(STREAMS)
        for k, layer in enumerate(layers)
    ]


def relative_difference(found: Iterable[float], expected: Iterable[float]) -> float:
    """Largest difference of two lists of probabilities, each relative to the expected one."""
    ours, truth = np.fromiter(found, float), np.fromiter(expected, float)
    return float(np.max(np.abs(ours - truth) / np.abs(truth)))


def check(name: str, difference: float, tolerance: float) -> float:
    """Return the difference, or refuse: NaN never passes."""
    if not difference <= tolerance:
        raise DisagreementError(
            f"{name}: the cells differ by {difference:.2e} relative, at most {tolerance:.0e} was expected; "
            "what computes something else is not timed"
        )
    return difference


def grid_values(result: Any, cells: Iterable[Cell]) -> list[float]:
    """The probabilities of some cells in a trace's grids."""
    return [float(result.prob[cell.stream][cell.layer, cell.position]) for cell in cells]


def agree(result: Any, workload: Workload, count: int = 12) -> float:
    """Compare a trace's base runs and some cells of each stream with the plain computation.

    Returns:
        The largest relative difference.

    Raises:
        DisagreementError: it is above the tolerance of the workload's dtype, or the grids do not vary at all.
    """
    cells = spread_cells(workload.case, count)
    expected = _values(workload, cells)
    if len(set(expected)) < len(cells) // 2:
        raise DisagreementError(f"{workload.case.name}: the cells are all alike, agreement would prove nothing")
    difference = relative_difference(_found(result, cells), expected)
    return check(workload.case.name, difference, TOLERANCE[workload.case.dtype])


@dataclass(frozen=True)
class HalfError:
    """Largest relative differences from the same model in float32: an engine's, and those of plain passes.

    Attributes:
        engine: of the grids that were traced in half precision.
        plain: of plain passes in half precision; no engine can do much better.
    """

    engine: float
    plain: float


def half_error(result: Any, workload: Workload, count: int = 12) -> HalfError | None:
    """Compare a trace in half precision with float32.

    Returns:
        None for a model that is not in half precision, or that does not fit in float32 beside itself.

    Raises:
        DisagreementError: the engine is much further off than plain passes in the same dtype.
    """
    case = workload.case
    if case.dtype not in FLOOR or free_bytes(workload.device) < HALF_COPIES * weight_bytes(workload.model):
        return None
    cells = spread_cells(case, count)
    exact = replace(workload, case=replace(case, dtype=torch.float32), model=deepcopy(workload.model).float())
    truth = _values(exact, cells)
    plain = relative_difference(_values(workload, cells), truth)
    engine = relative_difference(_found(result, cells), truth)
    check(f"{case.name} in {case.dtype_name} and in float32", engine, FLOOR[case.dtype] + ROOM * plain)
    return HalfError(engine, plain)


def _values(workload: Workload, cells: Sequence[Cell]) -> list[float]:
    plain = Plain(workload)
    return [*plain.base(), *(plain.cell(cell) for cell in cells)]


def _found(result: Any, cells: Sequence[Cell]) -> list[float]:
    return [result.clean_prob, result.corrupted_prob, *grid_values(result, cells)]
