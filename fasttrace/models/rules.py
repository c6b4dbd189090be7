"""Rules that find the parts of a model: its list of blocks, and of each block the attention and the MLP."""

import inspect
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fasttrace.errors import ModelError
from fasttrace.models.names import ATTENTION, DOWN, EXPERTS, MLP, RESIDUAL_ARGUMENTS
from fasttrace.models.sizes import width_of

PATHS = ("embedding", "blocks", "attention", "mlp", "down")
"""What a user can name: `embedding` and `blocks` from the model, the others from a block."""


@dataclass(frozen=True)
class Parts:
    """Modules of a model, one for each block, or None where a block has no such module.

    Attributes:
        embedding: input embedding.
        blocks: transformer blocks, in order.
        mixers: whole attention modules, as the blocks call them.
        attention: modules whose output is the attention output. They are the mixers, or the last linear module
            inside where the mixer adds the residual stream itself.
        mlp: modules whose output is the MLP output.
        down: the MLPs' down projections; their input is the MLP activation.
    """

    embedding: nn.Module
    blocks: tuple[nn.Module, ...]
    mixers: tuple[nn.Module | None, ...]
    attention: tuple[nn.Module | None, ...]
    mlp: tuple[nn.Module | None, ...]
    down: tuple[nn.Module | None, ...]


def find_parts(model: Any, modules: Mapping[str, str] | None) -> Parts:
    """Finds the parts of a model, by rule or where the user says.

    Args:
        model: a causal language model.
        modules: paths by the names in PATHS; they win over the rules.

    Raises:
        ModelError: a path that leads nowhere, or no list of blocks.
    """
    paths = dict(modules or {})
    if unknown := set(paths) - set(PATHS):
        raise ModelError(f"modules has {sorted(unknown)[0]!r}; its keys are {', '.join(PATHS)}")
    embedding = _at(model, paths["embedding"], "embedding") if "embedding" in paths else model.get_input_embeddings()
    if not isinstance(embedding, nn.Module) or isinstance(embedding, nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no single input embedding to add noise to")
    blocks = _blocks_at(model, paths["blocks"]) if "blocks" in paths else _found_blocks(model)
    mixers = _in_blocks(blocks, paths, "attention", ATTENTION)
    mlps = _in_blocks(blocks, paths, "mlp", MLP)
    attention = mixers if "attention" in paths else tuple(map(_without_residual, mixers))
    mlp = mlps if "mlp" in paths else tuple(map(_without_residual, mlps))
    down = _in_blocks(blocks, paths, "down", ()) if "down" in paths else tuple(map(_down_of, mlp))
    parts = Parts(embedding, blocks, mixers, attention, mlp, down)
    _refuse_shared(type(model).__name__, parts)
    return parts


def _refuse_shared(name: str, parts: Parts) -> None:
    """Raises if a module is part of several blocks: what a hook does for one of them it would do for all."""
    for what, modules in (("block", parts.blocks), ("attention", parts.mixers), ("MLP", parts.mlp)):
        first: dict[int, int] = {}
        for number, module in enumerate(modules):
            if module is not None and first.setdefault(id(module), number) != number:
                raise ModelError(
                    f"blocks {first[id(module)]} and {number} of {name} have one {what} module in common, so a value "
                    "restored in one block would be restored in both: give each a module of its own (copy.deepcopy), "
                    "whose weights may be the same tensors"
                )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one matrix product: any class that says its width, whatever is inside it."""
    return width_of(module) is not None


def _linears_in(module: nn.Module) -> list[nn.Module]:
    """Linear modules, in order; the parts of one (an adapter's, a quantized one's) are not others."""
    if is_linear(module):
        return [module]
    return [linear for child in module.children() for linear in _linears_in(child)]


def _at(root: Any, path: str, what: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        children = ", ".join(name for name, _ in root.named_children()) or "no modules"
        raise ModelError(
            f"modules[{what!r}] is {path!r}, and {type(root).__name__} has no such module; it has {children}"
        ) from None


def _blocks_at(model: Any, path: str) -> tuple[nn.Module, ...]:
    found = _at(model, path, "blocks")
    blocks = tuple(found.children())
    if not isinstance(found, nn.ModuleList) or not blocks:
        raise ModelError(f"modules['blocks'] is {path!r}, a {type(found).__name__}; it must be the list of blocks")
    return blocks


def _found_blocks(model: Any) -> tuple[nn.Module, ...]:
    config = model.config.get_text_config(decoder=True)
    n_layers = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for root in (decoder, model):
        for module in _nearest_first(root):
            if isinstance(module, nn.ModuleList) and len(module) == n_layers:
                return tuple(module)
    raise ModelError(
        f"no list of {n_layers or 'its'} blocks in {type(model).__name__}; say where it is: Tracer(model, tokenizer, "
        "modules={'blocks': 'path.to.blocks', 'attention': 'path.in.block', 'mlp': 'path.in.block'})"
    )


def _nearest_first(root: nn.Module):
    waiting = deque([root])
    while waiting:
        module = waiting.popleft()
        yield module
        waiting.extend(module.children())


def _in_blocks(
    blocks: tuple[nn.Module, ...], paths: Mapping[str, str], what: str, names: tuple[str, ...]
) -> tuple[nn.Module | None, ...]:
    if what in paths:
        return tuple(_at(block, paths[what], what) for block in blocks)
    return tuple(_named(block, names) for block in blocks)


def _named(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The nearest descendant with one of the names; among equally near ones the first name wins."""
    level = [block]
    while level:
        children = [item for module in level for item in module.named_children()]
        for name in names:
            for given, child in children:
                if given == name:
                    return child
        level = [child for _, child in children]
    return None


def _without_residual(module: nn.Module | None) -> nn.Module | None:
    """The module itself, or what it computes before it adds the residual stream."""
    for inner in module.modules() if module is not None else ():
        if RESIDUAL_ARGUMENTS & set(inspect.signature(inner.forward).parameters):
            linears = [child for child in inner.children() if is_linear(child)] or _linears_in(inner)
            return linears[-1] if linears else module
    return module


def _down_of(mlp: nn.Module | None) -> nn.Module | None:
    """The down projection; None for a mixture of experts, which has several."""
    if mlp is None or is_linear(mlp):
        return mlp
    children = dict(mlp.named_children())
    words = {word for name, _ in mlp.named_modules() for word in name.split(".")}
    if words & EXPERTS or any(parameter.dim() == 3 for parameter in mlp.parameters()):
        return None
    named = [children[name] for name in DOWN if name in children and is_linear(children[name])]
    return next(iter(named + _linears_in(mlp)[-1:]), None)
