"""Hooks as context managers: what replaces a module's input, output or forward, and takes itself away again.

The only caller of torch's hook registration. Other people's hooks are left alone. Outputs may be a tensor, or a
tuple or list whose first item is the hidden state; what is returned has the same form.

Everything here works for the thread that opened it alone: calls of the model by other threads go through as if nothing
were there. Threads that trace one model take turns, see `exclusive`.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fasttrace.errors import EngineError


class _Here(threading.local):
    """Whose calls a thread makes: hooks work for the one that put them on."""

    def __init__(self):
        self.owner = object()


_HERE = _Here()


def here() -> object:
    """Whose calls this thread makes now; another in every thread, and inside `apart`."""
    return _HERE.owner


@contextmanager
def apart() -> Iterator[None]:
    """While open, this thread's calls of a model are treated as another thread's: for the user's code in a pass."""
    before, _HERE.owner = _HERE.owner, object()
    try:
        yield
    finally:
        _HERE.owner = before


class _Turn:
    """Whose turn it is to work on a model.

    Attributes:
        lock: held by the thread whose turn it is.
        in_pass: whether a pass of an engine is running.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.in_pass = False


_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TURNS.clear)  # a lock that another thread held would never be let go there


def _turn_of(model: nn.Module) -> _Turn:
    """By the model's embedding, which a model and its wrappers have in common."""
    embedding: Any = None
    with suppress(NotImplementedError):
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return _TURNS.setdefault(embedding if isinstance(embedding, nn.Module) else model, _Turn())


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """While open, no other thread traces this model; they wait. A thread may open it several times."""
    with _turn_of(model).lock:
        yield


def refuse_inside_a_pass(model: nn.Module) -> None:
    """Raises where a pass over the model would begin inside another.

    Raises:
        EngineError: this thread is in a pass over the model.
    """
    turn = _turn_of(model)
    with turn.lock:
        if turn.in_pass:
            raise EngineError(
                f"a pass over this {type(model).__name__} is running in this context already: a hook on the model, or "
                "progress=, cannot trace it again; trace when the first trace is done"
            )


@contextmanager
def forward_pass(model: nn.Module) -> Iterator[None]:
    """While open, an engine's pass is the only thing that is done to a model, in evaluation mode without gradients.

    Raises:
        EngineError: this thread is in a pass over the model.
    """
    turn = _turn_of(model)
    with turn.lock, evaluating(model):
        refuse_inside_a_pass(model)
        turn.in_pass = True
        try:
            yield
        finally:
            turn.in_pass = False


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """All modules once; `nn.Module.modules` makes names for them, which takes longer."""
    waiting, met = [model], {id(model)}
    while waiting:
        module = waiting.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in met:
                met.add(id(child))
                waiting.append(child)


def first_of(output: Any) -> Tensor:
    """The hidden state in a module's output."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden state replaced."""
    return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))


def raw_output_hook(module: nn.Module, rewrite: Callable[[Any], Any]) -> AbstractContextManager[Any]:
    """Until it is closed, `module` returns `rewrite(output)`; None keeps the output."""
    owner = here()
    return module.register_forward_hook(
        lambda _module, _args, output: rewrite(output) if _HERE.owner is owner else None
    )


def output_hook(module: nn.Module, rewrite: Callable[[Tensor], Tensor | None]) -> AbstractContextManager[Any]:
    """Until it is closed, the hidden state that `module` returns is `rewrite(hidden)`; None keeps it."""

    def rewrite_output(output: Any) -> Any:
        hidden = rewrite(first_of(output))
        return None if hidden is None else with_first(output, hidden)

    return raw_output_hook(module, rewrite_output)


def input_hook(
    module: nn.Module, rewrite: Callable[[tuple, dict], tuple[tuple, dict] | None]
) -> AbstractContextManager[Any]:
    """Until it is closed, `module` is called with `rewrite(args, kwargs)`; None keeps them."""
    owner = here()

    def hook(_module: nn.Module, args: tuple, kwargs: Any = None) -> Any:
        """Without kwargs where torch, in another thread, finds the hook as it is being removed."""
        return rewrite(args, kwargs) if _HERE.owner is owner else None

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def hidden_hook(module: nn.Module, rewrite: Callable[[Tensor], Tensor | None]) -> AbstractContextManager[Any]:
    """Until it is closed, the first argument of `module` is `rewrite(argument)`; None keeps it."""

    def rewrite_input(args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden = rewrite(hidden_argument(args, kwargs))
        return None if hidden is None else with_hidden_argument(args, kwargs, hidden)

    return input_hook(module, rewrite_input)


def hidden_argument(args: tuple, kwargs: dict) -> Tensor:
    """The hidden state in a module's arguments: the first one, or the one named `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden_argument(args: tuple, kwargs: dict, hidden: Tensor | None) -> tuple[tuple, dict]:
    """Arguments with the hidden state replaced."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


class Replaced:
    """Stands where a method stood: another method for whoever put it there, what stood there before for all others.

    Attributes:
        before: what stood there.
        was_own: whether it stood in the instance, and not in its class.
        method: the other method; None when its time is over.
        owner: whoever put it there.
    """

    def __init__(self, before: Callable[..., Any], was_own: bool, method: Callable[..., Any] | None):
        self.before = self.__wrapped__ = before
        self.was_own, self.method, self.owner = was_own, method, here()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the one or the other."""
        method = self.method
        return (self.before if method is None or _HERE.owner is not self.owner else method)(*args, **kwargs)


_REPLACING = threading.Lock()


class replaced_method:  # noqa: N801 - called as the functions beside it; a class, because passes open hundreds
    """While open, a method of one module is another for this thread; also replaces a function of a Python module.

    Afterwards the module is as it was, whatever others replaced meanwhile, and in whatever order they end.
    """

    def __init__(self, module: nn.Module | ModuleType, name: str, method: Callable[..., Any]):
        self.module, self.name, self.method = module, name, method

    def __enter__(self) -> None:
        with _REPLACING:
            before, was_own = getattr(self.module, self.name), self.name in vars(self.module)
            self.replaced = Replaced(before, was_own, self.method)
            setattr(self.module, self.name, self.replaced)

    def __exit__(self, *_exception: object) -> None:
        with _REPLACING:
            _take_out(self.module, self.name, self.replaced)


def _take_out(module: nn.Module | ModuleType, name: str, replaced: Replaced) -> None:
    replaced.method = None  # where somebody kept it, it is what stood there before
    top = vars(module).get(name)
    if top is replaced:
        if replaced.was_own:
            setattr(module, name, replaced.before)
        else:
            delattr(module, name)
        return
    while isinstance(top, Replaced):
        if top.before is replaced:
            top.before = top.__wrapped__ = replaced.before
            top.was_own = replaced.was_own
            return
        top = top.before


def set_by_others(value: Any) -> Any:
    """What others have set in an instance, where `value` is found there now; None if only fasttrace did."""
    while isinstance(value, Replaced):
        value = value.before if value.was_own else None
    return value


def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """While open, `module.forward` is `forward`."""
    return replaced_method(module, "forward", forward)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, the model is in evaluation mode, for other threads too, and this thread records no gradients."""
    with exclusive(model):
        training = [module for module in modules_of(model) if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
