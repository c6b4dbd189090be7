"""Adapters: the parts of a Hugging Face model that the engines touch, found by rules rather than by family."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from fasttrace.errors import ModelError, kind_and_line
from fasttrace.experiment.sites import SITE
from fasttrace.models.axes import InputAxes, input_axes
from fasttrace.models.hooks import evaluating
from fasttrace.models.rules import Parts, find_parts
from fasttrace.models.second_look import LONG_PROMPT, N_TOKENS, looks_twice, neutral_token, second_look_note, words
from fasttrace.models.sizes import config_of_block, flops_of, pair_flops, width_of
from fasttrace.planning.cost import UnitWork

__all__ = ["Anatomy", "anatomy_of", "module_paths"]

logger = logging.getLogger("fasttrace")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one model.

    Attributes:
        model: the causal language model itself, unmodified.
        parts: its modules.
        cpu_matmul: the library asked for on a CPU, see `fasttrace.fusing.cpu_linears`.
    """

    model: PreTrainedModel
    parts: Parts
    cpu_matmul: str = "auto"

    @property
    def embedding(self) -> nn.Module:
        """The input embedding."""
        return self.parts.embedding

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The transformer blocks, in order."""
        return self.parts.blocks

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @cached_property
    def decoder(self) -> Any:
        """The language model's trunk; in a model of text and images not the whole model."""
        return self.model.get_decoder()

    @cached_property
    def config(self) -> Any:
        """The text part's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @cached_property
    def streams(self) -> tuple[str, ...]:
        """The figure's streams, as far as this model has them.

        A mixture of experts has no single down projection: its stream is `mlp_output`. Some recurrent models have
        no MLP at all.
        """
        mlp = "mlp_activation" if all(self.parts.down) else "mlp_output"
        return ("block_output", *([mlp] if all(self.parts.mlp) else []), *self._attention_stream)

    @property
    def _attention_stream(self) -> tuple[str, ...]:
        return ("attention_output",) if all(self.parts.attention) else ()

    def modules_at(self, site: str) -> tuple[nn.Module, ...]:
        """The modules whose output or input a site is, one a block.

        Raises:
            ModelError: a block has no such module.
        """
        modules = getattr(self.parts, SITE[site].part)
        missing = [number for number, module in enumerate(modules) if module is None]
        if missing:
            raise ModelError(
                f"block {missing[0]} of {type(self.model).__name__} has no {site}; it has {', '.join(self.streams)}: "
                "pass some of these as streams, or name the module with Tracer(modules=...)"
            )
        return modules

    @cached_property
    def block_axes(self) -> InputAxes:
        """Axes of the blocks' arguments."""
        return input_axes(self.model, self.blocks[0], self.device)

    @cached_property
    def row_axis(self) -> int:
        """Axis of the rows in the residual stream; the axis after it counts tokens.

        Raises:
            ModelError: rows and tokens are not neighbors in this model.
        """
        axes = self.block_axes.hidden
        if axes.row is None or axes.token != (axes.row + 1,) or axes.per_row != 1:
            raise ModelError(f"{type(self.model).__name__} does not keep hidden states as [row, position, d_model]")
        return axes.row

    @cached_property
    def mixer_axes(self) -> InputAxes:
        """Axes of the attention modules' arguments.

        Raises:
            ModelError: the first block has no attention module.
        """
        self.modules_at("attention_output")
        mixer: Any = self.parts.mixers[0]
        return input_axes(self.model, mixer, self.device)

    @property
    def device(self) -> torch.device:
        """Where the model takes its token ids."""
        hook = getattr(self.embedding, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        return torch.device(device) if device is not None else next(self.embedding.parameters()).device

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """All devices that the model computes on."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.model.modules())
        named = (getattr(hook, "execution_device", None) for hook in hooks)
        held = {parameter.device for parameter in self.model.parameters() if not parameter.is_meta}
        return frozenset({self.device} | held | {torch.device(place) for place in named if place is not None})

    @cached_property
    def is_offloaded(self) -> bool:
        """Whether some weights come to their device only when they are used."""
        return any(parameter.is_meta for parameter in self.model.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Type of the embeddings, hence of the residual stream."""
        return next(self.embedding.parameters()).dtype

    @cached_property
    def d_model(self) -> int:
        """Width of the embedding outputs."""
        with torch.no_grad():
            return self.embedding(torch.zeros(1, 1, dtype=torch.long, device=self.device)).shape[-1]

    @cached_property
    def max_positions(self) -> int | None:
        """Longest prompt the model has positions for, if it says."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return width_of(self.model.get_output_embeddings()) or self.config.vocab_size

    @cached_property
    def neutral_token(self) -> int | None:
        """What the model's other lookups see in place of the subject; None: the input embedding is the only one."""
        vocabulary = getattr(self.config, "vocab_size", None) or self.vocabulary
        if not self._looks_twice(vocabulary, N_TOKENS):
            return None
        token = neutral_token(self.model, vocabulary)
        logger.warning("%s", second_look_note(self.model, token))
        return token

    def _looks_twice(self, vocabulary: int, n_tokens: int) -> bool:
        ids = words(self.model, vocabulary, min(n_tokens, self.max_positions or n_tokens))
        try:
            return looks_twice(self.model, self.embedding, ids.to(self.device))
        except Exception as error:
            if n_tokens < LONG_PROMPT:  # a hook of somebody's may be made for longer prompts
                return self._looks_twice(vocabulary, LONG_PROMPT)
            raise ModelError(
                f"{type(self.model).__name__} fails on a prompt of {ids.shape[1]} tokens ({kind_and_line(error)})"
            ) from error

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether the model can be asked for the logits of some positions only."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @cached_property
    def widest(self) -> int:
        """Width of the widest activation of a token in a block, from the linear modules' own words."""
        widths = [width_of(module) or 0 for block in self.blocks for module in block.modules()]
        return max([4 * self.d_model, *widths])

    @cached_property
    def unit_work(self) -> UnitWork:
        """Floating-point operations of each part, from the sizes of its weight matrices."""
        configs = [config_of_block(self.config, number) for number in range(self.n_layers)]
        blocks = [flops_of(block, config) for block, config in zip(self.blocks, configs, strict=True)]
        mixers = [flops_of(mixer, config) for mixer, config in zip(self.parts.mixers, configs, strict=True)]
        return UnitWork(
            attention=tuple(mixers),
            mlp=tuple(block - mixer for block, mixer in zip(blocks, mixers, strict=True)),
            pair=tuple(pair_flops(config, self.d_model) for config in configs),
            head=flops_of(self.model.get_output_embeddings()),
        )


def anatomy_of(model: Any, modules: Mapping[str, str] | None = None, cpu_matmul: str = "auto") -> Anatomy:
    """Finds the parts of a model.

    Args:
        model: a causal language model.
        modules: paths of modules that the rules do not find; see `Tracer`.
        cpu_matmul: see `Anatomy`.

    Raises:
        ModelError: not a decoder-only language model, without weights, with blocks that no rule finds, or with
            hidden states that are not [..., row, position, ...].
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise ModelError(f"{type(model).__name__} is not a Hugging Face model; load one with AutoModelForCausalLM")
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; causal tracing needs a decoder-only one")
    if name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelError(f"{name} fills in masked words; causal tracing needs a model that predicts the next token")
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM")
    if getattr(getattr(config, "distributed_config", None), "pp_size", None) not in (None, 1):
        raise ModelError(f"the blocks of {name} are in several processes; load it with tp_size or device_map='auto'")
    if _has_no_weights(model):
        raise ModelError("the model has no weights (meta device); load it with from_pretrained, or call to_empty first")
    anatomy = Anatomy(model, find_parts(model, modules), cpu_matmul)
    _ = anatomy.row_axis  # two short calls of the model, before anybody's hooks are on it
    if getattr(anatomy.config, "num_kv_shared_layers", None):
        _check_shares_without_cache(anatomy)
    return anatomy


def _check_shares_without_cache(anatomy: Anatomy) -> None:
    """Raises where blocks share keys and values only through a cache: early transformers 5 has such a Gemma 3n."""
    ids = words(anatomy.model, anatomy.vocabulary, 2).to(anatomy.device)
    with evaluating(anatomy.model):
        without, cached = (anatomy.model(input_ids=ids, use_cache=use).logits.float() for use in (False, True))
    moved = (without - cached).abs().max()
    if moved > 0.1 * cached.std():
        raise ModelError(
            f"{type(anatomy.model).__name__} of transformers {version('transformers')} gives other logits without a "
            "cache of keys and values, which its last blocks share; update transformers"
        )


def module_paths(anatomy: Anatomy) -> dict[str, str]:
    """Where the parts were found, the parts of a block in the first block; for results and people."""
    names = {module: name for name, module in anatomy.model.named_modules()}
    parts = anatomy.parts
    found = {"embedding": parts.embedding, "attention": parts.attention[0], "mlp": parts.mlp[0], "down": parts.down[0]}
    blocks = names[anatomy.blocks[0]].rpartition(".")[0]
    return {"blocks": blocks} | {what: names[module] for what, module in found.items() if module is not None}


def _has_no_weights(module: nn.Module) -> bool:
    """Whether there are parameters on the meta device that no hook of accelerate's brings when they are used."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return True
    brings_all = getattr(hook, "offload", False) and getattr(hook, "place_submodules", False)
    return not brings_all and any(map(_has_no_weights, module.children()))
