"""Two devices for machines without a GPU: tensors that say where they are, computed on the CPU, and refuse to mix.

They are neither CPU nor CUDA, and refuse float64, as Apple's GPUs do.

A script, because torch takes a new kind of device once and for good:
`python -m tests.helpers.two_devices FAMILY...` traces tiny models whose blocks are split between the two and prints, as
JSON,
how far each engine is from the same engine on one device, over the spread of the grids.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from accelerate import dispatch_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fasttrace.engines import ENGINES
from fasttrace.engines.readout import Scores
from fasttrace.models.anatomy import Anatomy, anatomy_of
from tests.conftest import all_grids, make_job
from tests.helpers.zoo import tiny_model

MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""The operations that take tensors of two devices."""


class Placed(torch.Tensor):
    """A CPU tensor that says it is on another device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> "Placed":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )

    def __init__(self, inner: torch.Tensor, device: torch.device):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(operation, args, kwargs or {})


def compute(operation: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an operation on the CPU, if its tensors are on one device; the result is there too."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    places = {tensor.device for tensor in tensors if isinstance(tensor, Placed) or tensor.dim()}
    if operation not in MOVES and len(places) > 1:
        raise RuntimeError(f"{operation} of tensors on {sorted(map(str, places))}")
    place = args[0].device if operation is MOVES[1] else next(iter(places), torch.device("cpu"))
    if kwargs.get("device") is not None:
        place = torch.device(kwargs["device"])
        kwargs = kwargs | {"device": "cpu"}
    inner_args, inner_kwargs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, Placed) else leaf, (args, kwargs))
    result = operation(*inner_args, **inner_kwargs)
    if operation._schema.is_mutable:
        return args[0]
    if place.type == "cpu":
        return result
    if any(leaf.dtype == torch.float64 for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
        raise TypeError(f"{operation} makes float64, which Apple's GPUs do not have")
    return tree_map(lambda leaf: Placed(leaf, place) if isinstance(leaf, torch.Tensor) else leaf, result)


class NewTensors(TorchDispatchMode):
    """Sees what makes tensors out of nothing."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(operation, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Sees `torch.tensor`, which no dispatch mode sees."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        place = kwargs.pop("device", None) if function is torch.tensor else None
        made = function(*args, **kwargs)
        return made if place is None else made.to(place)


def device_map_of(model: Any, of_blocks: Sequence[str], elsewhere: str) -> dict[str, str]:
    """Where each block goes, and everything else: the largest modules that have no block in them."""
    names = {module: name for name, module in model.named_modules()}
    blocks = [names[block] for block in anatomy_of(model).blocks]
    above = set(_prefixes(blocks[0])) - {blocks[0]}
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    others = {next(path for path in _prefixes(tensor) if path not in above): elsewhere for tensor in tensors}
    return others | dict(zip(blocks, of_blocks, strict=True))


def _prefixes(path: str) -> Iterator[str]:
    return accumulate(path.split("."), "{}.{}".format)


def split(model: Any) -> Any:
    """A model with half of its blocks on one device, and the other half, final norm and head on the other."""
    first, second = ("pretend:0", "pretend:1")
    device_map = device_map_of(model, [first, first, second, second], first)
    last = {name: second for name in device_map if name.rpartition(".")[2] in ("norm", "ln_f", "lm_head")}
    skipped = model._skip_keys_device_placement
    return dispatch_model(model, device_map | last, main_device=first, skip_keys=skipped)


def scores_of(anatomy: Anatomy) -> dict[str, Scores]:
    """What each engine gives that can run the model."""
    job = make_job(7, (1, 3), 2, all_grids(anatomy.streams, 3, 7))
    packed = "fork" if anatomy.config.model_type == "bloom" else "wavefront"
    return {engine: ENGINES[engine](anatomy, job, lambda: None) for engine in (packed, "rows")}


def plain(family: str) -> Any:
    """A tiny model that calls nothing that torch has for real devices only."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    model.config.pad_token_id = None
    return model


def check_what_is_refused() -> None:
    """Raises where the pretence would let an error pass."""
    with NewTensors():
        here, there = (torch.zeros(2, device=f"pretend:{index}") for index in (0, 1))
        exact = torch.zeros(2, dtype=torch.float64, device="cpu")
        for refused in (lambda: here + there, lambda: here.double(), lambda: exact.to("pretend:0")):
            try:
                refused()
            except (RuntimeError, TypeError):
                continue
            raise AssertionError("a sum of tensors on two devices, or float64, went through")


def errors_of(family: str) -> dict[str, float]:
    """Of each engine."""
    expected = scores_of(anatomy_of(plain(family)))
    with NewTensors(), Literals():
        given = scores_of(anatomy_of(split(plain(family))))
    return {
        engine: float(np.abs(given[engine].cells - scores.cells).max() / np.ptp(scores.cells))
        for engine, scores in expected.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("pretend")
    check_what_is_refused()
    print(json.dumps({family: errors_of(family) for family in sys.argv[1:]}))  # noqa: T201
