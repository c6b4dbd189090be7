"""Adapters: the parts of a Hugging Face model that the engines touch, found by family."""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fasttrace.adapters.families import FAMILIES, Family
from fasttrace.cost import UnitWork
from fasttrace.errors import ModelError

__all__ = ["Anatomy", "anatomy_of"]


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one model.

    Attributes:
        model: the causal language model itself, unmodified.
        embedding: its input embedding module.
        blocks: the transformer blocks, in order.
        attention, mlp, down: of each block, the modules named in `Family`.
    """

    model: PreTrainedModel
    embedding: nn.Module
    blocks: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...]
    mlp: tuple[nn.Module, ...]
    down: tuple[nn.Module, ...]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @cached_property
    def device(self) -> torch.device:
        """Where the model takes its token ids."""
        hook = getattr(self.embedding, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return torch.device(device) if device is not None else next(self.embedding.parameters()).device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the embeddings, hence of the residual stream."""
        return next(self.embedding.parameters()).dtype

    @cached_property
    def d_model(self) -> int:
        """Width of the embedding outputs."""
        with torch.no_grad():
            return self.embedding(torch.zeros(1, 1, dtype=torch.long, device=self.device)).shape[-1]

    @cached_property
    def max_positions(self) -> int | None:
        """Longest prompt the model has positions for, if it says."""
        config = self.model.config
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return _head_of(self.model).weight.shape[0]

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether the model can be asked for the logits of some positions only."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @cached_property
    def bytes_per_token(self) -> int:
        """Memory that one token of a pack takes at its peak: hidden states, projections, MLP activations.

        Three copies of the widest activation and ten of the hidden state hold for GPT-2 and Llama-like blocks.
        """
        widest = max(_input_width(down) for down in self.down)
        return self.dtype.itemsize * (3 * widest + 10 * self.d_model)

    @cached_property
    def unit_work(self) -> UnitWork:
        """Floating-point operations of each part, from the sizes of its weight matrices."""
        config = self.model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return UnitWork(
            attention=tuple(map(_matrix_flops, self.attention)),
            mlp=tuple(map(_matrix_flops, self.mlp)),
            pair=4 * config.num_attention_heads * head_dim,
            head=_matrix_flops(_head_of(self.model)),
        )


def anatomy_of(model: Any) -> Anatomy:
    """Finds the parts of a model.

    Raises:
        ModelError: not a decoder-only language model, or of a family without an adapter.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise ModelError(f"{type(model).__name__} is not a Hugging Face model; load one with AutoModelForCausalLM")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{type(model).__name__} is an encoder-decoder model; causal tracing needs a decoder-only one")
    if model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise ModelError("the model has no weights (meta device); load it with from_pretrained, or call to_empty first")
    return _dissected(model, _family_of(config.model_type))


def _family_of(model_type: str) -> Family:
    family = FAMILIES.get(model_type)
    if family is None:
        raise ModelError(f"no adapter for model type {model_type!r}; supported: {', '.join(sorted(FAMILIES))}")
    return family


def _dissected(model: PreTrainedModel, family: Family) -> Anatomy:
    blocks = tuple(model.get_submodule(family.blocks).children())

    def of_each_block(path: str) -> tuple[nn.Module, ...]:
        return tuple(block.get_submodule(path) for block in blocks)

    return Anatomy(
        model=model,
        embedding=model.get_input_embeddings(),
        blocks=blocks,
        attention=of_each_block(family.attention),
        mlp=of_each_block(family.mlp),
        down=of_each_block(family.down),
    )


def _matrix_flops(module: nn.Module) -> int:
    return 2 * sum(parameter.numel() for parameter in module.parameters() if parameter.dim() >= 2)


def _head_of(model: PreTrainedModel) -> Any:
    return model.get_output_embeddings()


def _input_width(projection: nn.Module) -> int:
    return max(max(parameter.shape) for parameter in projection.parameters())
