"""Named workloads: a model with seeded random weights (nothing is downloaded), a prompt, a sweep."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

STREAMS = ("block_output", "mlp_activation", "attention_output")
WINDOW = 10
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""A tiny vocabulary does not reach the usual ids."""


class Cell(NamedTuple):
    """One square of a grid."""

    stream: str
    layer: int
    position: int


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        config: the model's shape, as the arguments of its Hugging Face configuration.
        tokens: length of the prompt.
        subject: half-open token span that is corrupted.
        noise: standard deviation of the corruption.
        weight_std: standard deviation of the random weights: large enough for the grids to vary.
    """

    name: str
    config_class: type[PreTrainedConfig]
    config: dict[str, Any]
    tokens: int
    subject: tuple[int, int]
    noise: float
    weight_std: float = 0.02
    samples: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 1

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.config.get("n_layer") or self.config["num_hidden_layers"]

    @property
    def is_gpt2(self) -> bool:
        """Whether the model is of the GPT-2 family."""
        return self.config_class is GPT2Config

    @property
    def dtype_name(self) -> str:
        """The weights' dtype, without its package."""
        return str(self.dtype).removeprefix("torch.")

    def with_samples(self, samples: int | None) -> Self:
        """The same case with another number of noise samples; None keeps it."""
        return self if samples is None else replace(self, samples=samples)

    def summary(self) -> str:
        """One line: shapes, dtype, corruption."""
        shape = ", ".join(f"{key}={value}" for key, value in self.config.items() if value is not None)
        begin, end = self.subject
        return (
            f"{self.name}: {shape}, {self.dtype_name}, {self.tokens} tokens, subject [{begin}, {end}), "
            f"noise {self.noise:.4g}, samples {self.samples}, window {WINDOW}"
        )

    def cells(self) -> list[Cell]:
        """Every cell of the three grids."""
        layers, positions = range(self.n_layers), range(self.tokens)
        return [Cell(stream, layer, pos) for stream in STREAMS for layer in layers for pos in positions]

    def window(self, stream: str, layer: int) -> range:
        """The blocks that a cell restores."""
        if stream == "block_output":
            return range(layer, layer + 1)
        return range(max(0, layer - WINDOW // 2), min(self.n_layers, layer + WINDOW // 2))


@dataclass(frozen=True)
class Workload:
    """A case with its model built, its prompt drawn and its target found."""

    case: Case
    model: PreTrainedModel
    prompt: list[int]
    target: int
    device: torch.device

    def trace_options(self) -> dict[str, Any]:
        """The arguments of `Tracer.trace` beside the prompt."""
        case = self.case
        return {
            "subject": case.subject,
            "target": self.target,
            "streams": STREAMS,
            "window": WINDOW,
            "noise": case.noise,
            "samples": case.samples,
            "seed": case.seed,
        }


def _gpt2(n_layer: int, n_embd: int, n_head: int, vocab_size: int = 50257) -> dict[str, Any]:
    config = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "vocab_size": vocab_size}
    return {"config_class": GPT2Config, "config": config | NO_SPECIAL}


def _llama(n_layers: int, width: int, heads: tuple[int, int], mlp: int, vocab_size: int) -> dict[str, Any]:
    config = {
        "num_hidden_layers": n_layers,
        "hidden_size": width,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": mlp,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
    }
    return {"config_class": LlamaConfig, "config": config | NO_SPECIAL}


GPT2 = Case("gpt2-12", **_gpt2(12, 768, 12), tokens=7, subject=(0, 4), noise=0.5, weight_std=0.05)
XL = Case("gpt2-xl", **_gpt2(48, 1600, 25), tokens=7, subject=(0, 4), noise=0.13462981581687927, weight_std=0.03)
SMOLLM2 = Case(
    "smollm2",
    **_llama(30, 576, heads=(9, 3), mlp=1536, vocab_size=49152),
    tokens=11,
    subject=(1, 4),
    noise=0.15,
    weight_std=0.03,
)
TINY_GPT2 = Case("tiny-gpt2", **_gpt2(12, 32, 4, 101), tokens=6, subject=(1, 3), noise=0.5, weight_std=0.2)
TINY_LLAMA = Case(
    "tiny-llama",
    **_llama(12, 32, heads=(4, 2), mlp=64, vocab_size=101),
    tokens=6,
    subject=(1, 3),
    noise=0.5,
    weight_std=0.2,
    samples=2,
)

CASES = {
    case.name: case
    for case in (
        GPT2,
        replace(GPT2, name="gpt2-12-n10", samples=10),
        XL,
        replace(XL, name="gpt2-xl-bf16", dtype=torch.bfloat16),
        SMOLLM2,
        TINY_GPT2,
        TINY_LLAMA,
    )
}


def build(case: Case, device: torch.device | str = "cpu") -> Workload:
    """Make the case's model, its prompt and its target, the clean run's most probable next token."""
    device = torch.device(device)
    model = build_model(case)
    nn.Module.to(model, device)
    generator = torch.Generator().manual_seed(case.seed)
    prompt = torch.randint(model.config.vocab_size, (1, case.tokens), generator=generator)
    with torch.no_grad():
        logits = model(prompt.to(device), use_cache=False).logits
    return Workload(case, model, prompt[0].tolist(), int(logits[0, -1].argmax()), device)


def build_model(case: Case) -> PreTrainedModel:
    """The case's model in eval mode. Its weights are made empty and drawn here, once, from the case's seed."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(case.config_class(**case.config), dtype=case.dtype)
    generator = torch.Generator().manual_seed(case.seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.zeros(parameter.shape, dtype=parameter.dtype)
            if name != "bias" and "norm" in type(module).__name__.lower():
                value.fill_(1)
            elif name != "bias":
                value.normal_(0, case.weight_std, generator=generator)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    model.config.architectures = [type(model).__name__]  # a checkpoint has it, and pyvene's read-out asks
    return model.eval()
