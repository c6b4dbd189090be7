"""What the verdict of a self-check holds for: all about a model that an engine's numbers may depend on.

One walk over the modules, a millisecond for 48 blocks, before every trace. Weights may change in place: that moves the
numbers of all engines alike. Nothing here keeps a model or anybody's hooks alive.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PretrainedConfig

from fasttrace.errors import EngineError
from fasttrace.models.anatomy import Anatomy, anatomy_of
from fasttrace.models.hooks import exclusive, modules_of, set_by_others

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = frozenset({list, tuple, set})

_SEEN = "_seen"
"""Under which an anatomy keeps the modules that there were when it was made."""


@dataclass(frozen=True)
class State:
    """A model at one moment; two are equal if a verdict for one holds for the other.

    Attributes:
        structure: of every module its class, and the types, sizes and places of its weights.
        functions: hooks, replaced methods and plain attributes of the modules and their configurations.
        settings: of torch.
        hooks: how many hooks and replaced forwards others have put on the model.
    """

    structure: tuple[Any, ...]
    functions: tuple[Any, ...]
    settings: tuple[Any, ...]
    hooks: int


def state_of(model: nn.Module) -> State:
    """The state of a model as it is now."""
    with exclusive(model):
        structure: list[Any] = []
        found: list[Any] = []
        configs: dict[int, Any] = {}
        hooks = len(_global_hooks())
        for module in modules_of(model):
            own = vars(module)
            _add_structure(module, structure)
            found.append(module.training)
            if module._forward_hooks or module._forward_pre_hooks:
                found.append(_ids(module._forward_hooks) + _ids(module._forward_pre_hooks))
                hooks += len(found[-1])
            if "forward" in own:
                hooks += set_by_others(own["forward"]) is not None and "_hf_hook" not in own
            for name in own.keys() - _OF_EVERY_MODULE:
                value = own[name]
                if type(value) in _PLAIN:
                    found += (name, value)
                elif isinstance(value, PretrainedConfig):
                    configs[id(value)] = value
                elif (others := set_by_others(value)) is not None:
                    found += (name, _comparable(others))
        found += [(name, _comparable(value)) for config in configs.values() for name, value in vars(config).items()]
        return State(tuple(structure), tuple(found), _settings(), hooks)


def follow(anatomy: Anatomy, modules: Mapping[str, str] | None, state: State | None = None) -> Anatomy:
    """The anatomy of a model as it is now: the same, unless modules were exchanged, moved or converted since.

    Args:
        anatomy: of the model as it was.
        modules: paths of parts, see `Tracer`.
        state: of the model as it is, if it is known.

    Raises:
        ModelError: the model can no longer be traced.
    """
    with exclusive(anatomy.model):
        now = structure_of(anatomy.model) if state is None else state.structure
        if vars(anatomy).setdefault(_SEEN, now) != now:
            anatomy = anatomy_of(anatomy.model, modules, anatomy.cpu_matmul)
            vars(anatomy)[_SEEN] = now
    return anatomy


def structure_of(model: nn.Module) -> tuple[Any, ...]:
    """See `State`."""
    structure: list[Any] = []
    for module in modules_of(model):
        _add_structure(module, structure)
    return tuple(structure)


def refuse_autocast(anatomy: Anatomy) -> None:
    """Raises under `torch.autocast`, which would round plain passes and an engine's in different places.

    Raises:
        EngineError: it is on for a device of the model.
    """
    for kind in sorted({device.type for device in anatomy.devices}):
        if torch.is_autocast_enabled(kind):
            dtype = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
            raise EngineError(
                f"torch.autocast to {dtype} is on, and the model is in {str(anatomy.dtype).removeprefix('torch.')}: "
                f"trace outside of autocast, or load the model with dtype={dtype!r}"
            )


def _add_structure(module: nn.Module, found: list[Any]) -> None:
    found += (id(module), type(module))
    for tensor in module._parameters.values():
        if tensor is not None:
            found += (type(tensor), tensor.dtype, tensor.device, tensor.shape)
    for tensor in module._buffers.values():
        if tensor is not None:
            found += (tensor.dtype, tensor.device, tensor.shape)


def _comparable(value: Any) -> Any:
    """A value that can be compared later, or its type where it may change without another function being computed."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in _CONTAINERS:
        return tuple(map(_comparable, value))
    if kind is dict:
        return tuple((name, _comparable(item)) for name, item in value.items() if type(name) in _PLAIN)
    if callable(value):
        with suppress(TypeError):
            return ref(value)
    return kind


def _ids(hooks: Mapping[int, Callable[..., Any]]) -> tuple[tuple[int, int], ...]:
    """Hooks by number, which torch never gives twice, and function."""
    return tuple((number, id(hook)) for number, hook in hooks.items())


def _global_hooks() -> tuple[tuple[int, int], ...]:
    return _ids(torch_module._global_forward_hooks) + _ids(torch_module._global_forward_pre_hooks)


def _settings() -> tuple[Any, ...]:
    """Of torch, as far as they choose how a pass is computed."""
    cuda = torch.backends.cuda
    return (
        _global_hooks(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        _read(torch.get_float32_matmul_precision),
        _read(lambda: cuda.matmul.allow_tf32),
        _read(lambda: cuda.matmul.allow_fp16_reduced_precision_reduction),
        _read(lambda: cuda.matmul.allow_bf16_reduced_precision_reduction),
    )


def _read(setting: Callable[[], Any]) -> Any:
    """A setting of torch; None where its old and new names were both used, which torch does not read."""
    try:
        return setting()
    except RuntimeError:
        return None
