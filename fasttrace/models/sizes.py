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


def config_of_block(config: Any, number: int) -> Any:
    """The configuration of one block: its own where blocks differ, as with heads of two sizes, else that of all."""
    return config.per_layer_config[number] if getattr(config, "is_heterogeneous", False) else config


def pair_flops(config: Any, d_model: int) -> int:
    """Floating-point operations of the scores and weighted values of one query-key pair, all heads of a block.

    Args:
        config: the block's.
        d_model: width of the hidden state, which the heads share where they say no size.
    """
    heads = getattr(config, "num_attention_heads", 0)
    heads = heads if isinstance(heads, int) else max(heads, default=0)
    size = getattr(config, "head_dim", None)
    return 4 * heads * (size if isinstance(size, int) and size else d_model // max(1, heads))


def flops_of(module: nn.Module | None, config: Any = None) -> int:
    """Floating-point operations for one token, from the sizes of the weight matrices.

    Args:
        module: any; None counts nothing.
        config: the configuration of its block. Experts count by the share that one token visits.
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
