"""Sizes of modules, without looking inside quantized ones."""

from typing import Any

from torch import Tensor, nn


def width_of(module: nn.Module | None) -> int | None:
    """Width of what a linear module returns; None for other modules."""
    for name in ("out_features", "nf"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    return None


def flops_of(module: nn.Module | None, config: Any) -> int:
    """Floating-point operations for one token, from the sizes of the weight matrices.

    Of a mixture of experts, the share of the experts that one token visits.
    """
    if module is None:
        return 0
    share = _experts_visited(config)
    return int(2 * sum(_matrix_size(part, share) for part in module.modules()))


def _matrix_size(module: nn.Module, share: float) -> float:
    inputs, outputs = getattr(module, "in_features", None), width_of(module)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs * outputs
    own = [parameter for parameter in module.parameters(recurse=False) if isinstance(parameter, Tensor)]
    return sum(parameter.numel() * (share if parameter.dim() == 3 else 1) for parameter in own if parameter.dim() >= 2)


def _experts_visited(config: Any) -> float:
    for total in ("num_local_experts", "num_experts", "n_routed_experts"):
        if experts := getattr(config, total, None):
            return min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts)
    return 1.0
