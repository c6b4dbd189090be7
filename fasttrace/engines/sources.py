"""Sources of an ablation: the vectors that are written in place of a stream's own values."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fasttrace.checks import shown
from fasttrace.errors import PlanError
from fasttrace.experiment.cells import ZERO, Vector
from fasttrace.models.anatomy import Anatomy

__all__ = ["check_source", "vectors_of"]

ZERO_SOURCE = "zero"


def check_source(source: Any) -> Any:
    """A source as it was given.

    Raises:
        PlanError: neither "zero" nor a tensor, nor a mapping with tensors.
    """
    values = list(source.values()) if isinstance(source, Mapping) else [source]
    if isinstance(source, str) and source == ZERO_SOURCE:
        return ZERO_SOURCE
    if not all(isinstance(each, Tensor) for each in values):
        raise PlanError(
            f'source is {shown(source)}: expected "zero", a tensor [width of the stream] or [n_layers, width of the '
            "stream], or a mapping of streams to such tensors"
        )
    return source


def vectors_of(anatomy: Anatomy, streams: Sequence[str], source: Any) -> dict[str, list[Vector]]:
    """Stream -> [block] what is written there.

    Args:
        anatomy: the model.
        streams: sites that it has.
        source: from `check_source`.

    Raises:
        ModelError: the model does not have a stream.
        PlanError: values of another shape than the stream has, no numbers, or not finite; a stream without values.
    """
    found = {}
    for stream in streams:
        modules = anatomy.modules_at(stream)
        if isinstance(source, str):
            found[stream] = [ZERO] * len(modules)
            continue
        if isinstance(source, Mapping) and stream not in source:
            raise PlanError(f"source has no values for {stream}: it has {', '.join(map(str, source))}")
        values = source[stream] if isinstance(source, Mapping) else source
        found[stream] = _vectors(stream, values, len(modules), _width(anatomy, stream))
    return found


def _vectors(stream: str, values: Tensor, n_layers: int, width: int | None) -> list[Vector]:
    shape = list(values.shape)
    name = f"source for {stream}"
    if not values.is_floating_point():
        raise PlanError(f"{name} has values of {values.dtype}: give floating-point numbers")
    fits = shape[:-1] in ([], [n_layers]) and len(shape) > 0 and width in (None, shape[-1])
    if not fits:
        wanted = "width" if width is None else str(width)
        raise PlanError(f"{name} has shape {shape}: give [{wanted}] or [{n_layers}, {wanted}]")
    if values.is_meta or not values.isfinite().all():
        raise PlanError(f"{name} has values that are not finite, or none: give numbers")
    own = values.detach().cpu()
    return [Vector(row) for row in own] if own.dim() == 2 else [Vector(own)] * n_layers


def _width(anatomy: Anatomy, stream: str) -> int | None:
    """Width of a stream; None where the model's modules do not say it."""
    if stream != "mlp_activation":
        return anatomy.d_model
    module: Any = anatomy.modules_at(stream)[0]
    width = getattr(module, "in_features", None)
    if not isinstance(width, int) and isinstance(getattr(module, "nf", None), int):  # transformers' Conv1D
        width = getattr(module, "nx", None)
    return width if isinstance(width, int) else None
