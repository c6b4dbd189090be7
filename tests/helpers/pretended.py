"""A pretended GPU: tensors of the CPU that say they are on cuda:0, and a log of what a real one would do.

    with PretendedCuda() as gpu:
        Tracer(placed(model)).trace(...)
    gpu.log

It is strict where CUDA is: tensors of two devices do not meet, apart from single numbers of the host. A launch is an
operation that is no view; a wait is a value or a size read by the host, a copy to it, or a copy from memory that is not
pinned. Only the thread that opens it sees it.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from fasttrace_kernels import suffix_attention as attention
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._pytree import tree_leaves, tree_map

import fasttrace

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
FREE = 80 << 30
MOVES = (aten._to_copy.default, aten.copy_.default)
READS = (
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "equal",
    "bincount",
    "is_nonzero",
)
"""Operations whose result is a value on the host, or has a size that depends on values."""
VALUES = ("__int__", "__index__", "__float__", "__bool__", "item", "tolist")
NO_LAUNCH = (
    "_unsafe_view",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "set_",
)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
OURS = str(Path(fasttrace.__file__).parent)


class Event(NamedTuple):
    """One entry of the log.

    Attributes:
        kind: "launch", "wait", "copy" (pinned, to the device) or a mark of the test.
        what: the operation.
        by: the innermost line of the package that asked for it, if it did.
    """

    kind: str
    what: str
    by: str = ""


class Placed(torch.Tensor):
    """A CPU tensor that says it is on cuda:0."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Placed":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def numpy(self, *_args: Any, **_kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return PretendedCuda.open[-1].computed(operation, args, kwargs or {})


class _Dispatch(_python_dispatch.TorchDispatchMode):
    """Sees what makes tensors out of nothing."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return PretendedCuda.open[-1].computed(operation, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch does before it dispatches: pinning, literals, and the choice of an attention."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        gpu, kwargs = PretendedCuda.open[-1], dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "pin_memory":
            gpu.pinned.append(args[0].clone())
            return gpu.pinned[-1]
        numbered: Any = tree_map(_numbered, (args, kwargs), is_leaf=lambda x: isinstance(x, list))
        return self._with_numbers(gpu, function, name, *numbered)

    def _with_numbers(self, gpu: "PretendedCuda", function: Any, name: str, args: tuple, kwargs: dict) -> Any:
        if function is torch.tensor and kwargs.get("device") == DEVICE:
            return function(*args, **(kwargs | {"device": "cpu"})).to(DEVICE)
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], Placed):
            return gpu.indexed(function, *args)
        if name in VALUES and isinstance(args[0], Placed):
            gpu.note("wait", name)
            with outside():
                return function(args[0].inner, *args[1:])
        if name == "copy_" and any(isinstance(x, Placed) for x in args):  # as indexing
            with outside():
                return gpu.computed(aten.copy_.default, args, kwargs)
        if name == "contiguous" and isinstance(args[0], Placed):
            return args[0] if args[0].inner.is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if name == "scaled_dot_product_attention" and isinstance(args[0], Placed):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            assert all(isinstance(x, Placed) for x in tensors), "attention of tensors on two devices"
            gpu.note("launch", name)
            with outside():
                inner: Any = tree_map(inner_of, (args, kwargs))
                return Placed(function(*inner[0], **inner[1]))
        return function(*args, **kwargs)


def _numbered(value: Any) -> Any:
    """The device in place of one without a number, which torch would ask the driver for."""
    is_cuda = isinstance(value, torch.device) and value.type == "cuda"
    return DEVICE if is_cuda or (isinstance(value, str) and value == "cuda") else value


def placed(model: nn.Module) -> nn.Module:
    """The model with its weights on the pretended device; `nn.Module.to` would keep their Python type."""
    of_weight = {id(weight): nn.Parameter(Placed(weight.data), requires_grad=False) for weight in model.parameters()}
    for module in model.modules():
        for name, weight in module._parameters.items():
            module._parameters[name] = None if weight is None else of_weight[id(weight)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else Placed(buffer)
    return model


def inner_of(value: Any) -> Any:
    """The CPU tensor inside."""
    return value.inner if isinstance(value, Placed) else value


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """While open, torch computes as if nothing were pretended."""
    with _python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class PretendedCuda:
    """While open, there is a GPU.

    Attributes:
        device: its name.
        log: what happened since it was opened, or since it was cleared.
    """

    open: ClassVar[list["PretendedCuda"]] = []

    def __init__(self):
        self.device = DEVICE
        self.log: list[Event] = []
        self.pinned: list[torch.Tensor] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "PretendedCuda":
        torch._C._ensureCUDADeviceGuardSet()  # as torch's fake tensors do: a guard that does nothing
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in _TORCH_CUDA.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(attention, "_launch", self._attention)
        self.open.append(self)
        self._stack.callback(self.open.remove, self)
        self._stack.enter_context(_Functions())
        self._stack.enter_context(_Dispatch())
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def note(self, kind: str, what: Any) -> None:
        """Adds to the log."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        by = "" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        self.log.append(Event(kind, str(what), by))

    def between(self, begin: str, end: str) -> list[Event]:
        """Events from the first mark of one kind to the first of another that follows."""
        kinds = [event.kind for event in self.log]
        first = kinds.index(begin)
        return self.log[first : kinds.index(end, first)]

    def computed(self, operation: Any, args: tuple, kwargs: dict) -> Any:
        """Runs an operation on the CPU; its result is where a real one would be."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        from_gpu = any(isinstance(tensor, Placed) for tensor in tensors)
        to_gpu = from_gpu if kwargs.get("device") is None else torch.device(kwargs["device"]).type == "cuda"
        if operation is aten.copy_.default:
            to_gpu = isinstance(args[0], Placed)
        if from_gpu or to_gpu:
            self._check(operation, args, tensors)
            self._account(operation, args, kwargs, to_gpu)
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        inner_args, inner_kwargs = tree_map(inner_of, (args, kwargs))
        if operation is aten.histc.default and not inner_args[0].is_floating_point():  # CUDA alone counts integers
            return Placed(operation(inner_args[0].float(), *inner_args[1:]).to(inner_args[0].dtype))
        result = operation(*inner_args, **inner_kwargs)
        if operation._schema.is_mutable:
            written = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and inner_of(x) is result]
            return written[0] if written else result
        return tree_map(lambda x: Placed(x) if isinstance(x, torch.Tensor) else x, result) if to_gpu else result

    def indexed(self, function: Any, tensor: Placed, index: Any, *value: Any) -> Any:
        """Indexing, whose C++ asks for the device before it dispatches."""
        used = [x for x in (index if isinstance(index, tuple) else (index,)) if isinstance(x, (list, torch.Tensor))]
        reads = any(not isinstance(x, Placed) or x.dtype in (torch.bool, torch.uint8) for x in used)
        if reads or used or value:
            self.note("wait" if reads else "launch", function.__name__)
        with outside():
            result = function(tensor.inner, tree_map(inner_of, index), *map(inner_of, value))
            return Placed(result) if isinstance(result, torch.Tensor) else result

    def _check(self, operation: Any, args: tuple, tensors: list[torch.Tensor]) -> None:
        strangers = [tensor for tensor in tensors if not isinstance(tensor, Placed) and tensor.dim()]
        mixes = strangers and len(strangers) < len(tensors) and operation not in MOVES
        if mixes and not (operation in INDEXING and isinstance(args[0], Placed)):
            raise RuntimeError(f"{operation} of tensors on two devices")

    def _account(self, operation: Any, args: tuple, kwargs: dict, to_gpu: bool) -> None:
        name = operation._schema.name.removeprefix("aten::")
        if operation in MOVES:
            return self._account_move(operation, args, kwargs, to_gpu)
        by_host = operation in INDEXING and any(
            x is not None and (not isinstance(x, Placed) or x.dtype in (torch.bool, torch.uint8)) for x in args[1]
        )
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        is_view = not operation._schema.is_mutable and any(x.alias_info is not None for x in operation._schema.returns)
        if name in READS or by_host or sized:
            self.note("wait", operation)
        elif not is_view and name not in NO_LAUNCH:
            self.note("launch", operation)

    def _account_move(self, operation: Any, args: tuple, kwargs: dict, to_gpu: bool) -> None:
        taken_from = args[0] if operation is aten._to_copy.default else args[1]
        if isinstance(taken_from, Placed):
            self.note("launch" if to_gpu else "wait", operation)
        elif taken_from.numel() and not (taken_from.dim() == 0 and operation is aten.copy_.default):
            waits_not = kwargs.get("non_blocking") or True in args[2:]
            is_pinned = any(
                taken_from.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in self.pinned
            )
            self.note("copy" if waits_not and is_pinned else "wait", operation)

    def _attention(self, q, k, v, layout, scale, window, softcap, sinks, out) -> None:
        """The kernel's tiles by torch; one launch."""
        self.note("launch", "suffix_attention")
        attention.launch_arguments(q, k, v, layout, scale, window, softcap, sinks, out)
        layout = replace(layout, tiles=layout.tiles.inner, tokens=layout.tokens.inner)
        with outside():
            attention._in_tiles(q.inner, k.inner, v.inner, layout, scale, window, softcap, inner_of(sinks), out.inner)


class _Generator(torch.Generator):
    """Of the CPU, whatever is asked for."""

    def __new__(cls, _device: Any = "cpu") -> "_Generator":
        return super().__new__(cls)


class _Properties(NamedTuple):
    """Of an H100."""

    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132
    total_memory: int = FREE
    name: str = "NVIDIA H100 80GB HBM3 (pretended)"


_TORCH_CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda *_: None,
    "init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda *_: None,
    "device": lambda *_: contextlib.nullcontext(),
    "device_of": lambda *_: contextlib.nullcontext(),
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "get_device_name": lambda *_: _Properties().name,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: _Properties(),
    "mem_get_info": lambda *_: (FREE, FREE),
    "memory_reserved": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
}
