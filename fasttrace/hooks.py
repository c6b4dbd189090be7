"""Hooks as context managers: what replaces a module's input, output or forward, and takes itself away again.

The only caller of torch's hook registration. Other people's hooks are left alone. Outputs may be a tensor, or a
tuple or list whose first item is the hidden state; what is returned has the same form.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def first_of(output: Any) -> Tensor:
    """The hidden state in a module's output."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden state replaced."""
    return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))


@contextmanager
def raw_output_hook(module: nn.Module, rewrite: Callable[[Any], Any]) -> Iterator[None]:
    """While open, `module` returns `rewrite(output)`; None keeps the output."""
    handle = module.register_forward_hook(lambda _module, _args, output: rewrite(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def output_hook(module: nn.Module, rewrite: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While open, the hidden state that `module` returns is `rewrite(hidden)`; None keeps it."""

    def rewrite_output(output: Any) -> Any:
        hidden = rewrite(first_of(output))
        return None if hidden is None else with_first(output, hidden)

    with raw_output_hook(module, rewrite_output):
        yield


@contextmanager
def input_hook(module: nn.Module, rewrite: Callable[[tuple, dict], tuple[tuple, dict] | None]) -> Iterator[None]:
    """While open, `module` is called with `rewrite(args, kwargs)`; None keeps them."""
    handle = module.register_forward_pre_hook(lambda _module, args, kwargs: rewrite(args, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def hidden_hook(module: nn.Module, rewrite: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While open, the first argument of `module` is `rewrite(argument)`; None keeps it."""

    def rewrite_input(args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden = rewrite(hidden_argument(args, kwargs))
        return None if hidden is None else with_hidden_argument(args, kwargs, hidden)

    with input_hook(module, rewrite_input):
        yield


def hidden_argument(args: tuple, kwargs: dict) -> Tensor:
    """The hidden state in a module's arguments: the first one, or the one named `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden_argument(args: tuple, kwargs: dict, hidden: Tensor | None) -> tuple[tuple, dict]:
    """Arguments with the hidden state replaced."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


@contextmanager
def replaced_method(module: nn.Module | ModuleType, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """While open, a method of one module is another. Wrappers that others put there come back afterwards.

    Of a Python module, one of its functions is.
    """
    own = name in vars(module)
    before = getattr(module, name)
    setattr(module, name, method)
    try:
        yield
    finally:
        if own:
            setattr(module, name, before)
        else:
            delattr(module, name)


def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """While open, `module.forward` is `forward`."""
    return replaced_method(module, "forward", forward)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the model is in evaluation mode and records no gradients."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
