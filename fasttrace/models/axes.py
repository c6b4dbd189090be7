"""Which axes of a block's arguments count prompts and tokens, read off two short calls of different sizes.

Sizes alone would not tell: a bias of [head, 1, token] looks like one of [row, 1, token] once there are as many rows
as heads. What changes with the number of rows is a row axis, what changes with the number of tokens a token axis.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttrace.errors import ModelError
from fasttrace.models.hooks import evaluating, hidden_argument, input_hook, with_hidden_argument

Path = tuple[int | str, ...]
"""Where a tensor stands in the arguments: (0,), ("position_embeddings", 1), ..."""

SIZES = ((2, 5), (3, 7))
"""(rows, tokens) of the two calls."""


@dataclass(frozen=True)
class Axes:
    """Axes of one tensor.

    Attributes:
        row: axis of the rows, None if all rows share the tensor.
        per_row: items on the row axis for each row, more than one where heads are folded into it.
        token: axes of the tokens; a mask has two.
    """

    row: int | None = None
    per_row: int = 1
    token: tuple[int, ...] = ()


@dataclass(frozen=True)
class InputAxes:
    """Axes of a module's arguments.

    Attributes:
        hidden: the hidden state's.
        others: those of every other tensor that was seen.
    """

    hidden: Axes
    others: Mapping[Path, Axes]

    def of(self, path: Path, tensor: Tensor, n_rows: int, n_tokens: int) -> Axes:
        """The axes of an argument; one that the calls did not have is judged by its sizes."""
        known = self.others.get(path)
        return known if known is not None else _by_size(tensor, n_rows, n_tokens)


def input_axes(model: nn.Module, module: nn.Module, device: torch.device) -> InputAxes:
    """Calls a model twice, up to a module, and reads the axes of the module's arguments.

    Raises:
        ModelError: the hidden state does not have the prompt's tokens.
    """
    seen = [_arguments(model, module, device, *sizes) for sizes in SIZES]
    hidden, others = zip(*seen, strict=True)
    shapes = tuple(tuple(tensor.shape) for tensor in hidden)
    axes = _axes(*shapes)
    if len(axes.token) != 1:
        raise ModelError(
            f"{type(module).__name__} of {type(model).__name__} gets hidden states of shape {list(shapes[0])} for "
            f"{SIZES[0][0]} prompts of {SIZES[0][1]} tokens: positions in the prompt are not positions in the model"
        )
    both = others[0].keys() & others[1].keys()
    return InputAxes(axes, {path: _axes(*(tuple(call[path].shape) for call in others)) for path in both})


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors in nested arguments, with their paths."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from tensors_in(item, (*path, number))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from tensors_in(item, (*path, name))


class _Reached(Exception):  # noqa: N818 - not an error
    """Ends a call of the model once the arguments are known."""


def _arguments(model: Any, module: nn.Module, device: torch.device, rows: int, tokens: int) -> tuple[Tensor, dict]:
    found: list[tuple[Tensor, dict]] = []

    def record(args: tuple, kwargs: dict) -> None:
        hidden = hidden_argument(args, kwargs)
        args, kwargs = with_hidden_argument(args, kwargs, None)
        found.append((hidden, dict(tensors_in(args)) | dict(tensors_in(kwargs))))
        raise _Reached

    ids = torch.ones(rows, tokens, dtype=torch.long, device=device)
    with evaluating(model), input_hook(module, record), suppress(_Reached):
        model(input_ids=ids, use_cache=False)
    _offload_again(model)
    if not found:
        raise ModelError(f"{type(model).__name__} never calls its {type(module).__name__}; check modules=...")
    return found[0]


def _offload_again(model: nn.Module) -> None:
    """Takes back the weights of modules that never returned: accelerate does so after a module's forward."""
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "offload", False):
                parameters = module.parameters(recurse=part.place_submodules)
                if not all(parameter.is_meta for parameter in parameters):
                    part.post_forward(module, None)


def _axes(first: tuple[int, ...], second: tuple[int, ...]) -> Axes:
    (rows, tokens), (more_rows, more_tokens) = SIZES
    row, per_row, token = None, 1, []
    for axis, (size, other) in enumerate(zip(first, second, strict=False)):
        if (size, other) == (tokens, more_tokens):
            token.append(axis)
        elif size % rows == 0 and size > 0 and other * rows == size * more_rows and row is None:
            row, per_row = axis, size // rows
    return Axes(row, per_row, tuple(token))


def _by_size(tensor: Tensor, n_rows: int, n_tokens: int) -> Axes:
    shape = tensor.shape
    if len(shape) == 4 and shape[-2:] == (n_tokens, n_tokens):
        return Axes(0 if shape[0] == n_rows else None, 1, (2, 3))
    if len(shape) >= 2 and shape[0] in (1, n_rows) and shape[1] == n_tokens:
        return Axes(0 if shape[0] == n_rows else None, 1, (1,))
    return Axes(0 if len(shape) > 1 and shape[0] == n_rows else None)
