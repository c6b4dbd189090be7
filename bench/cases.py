"""Named workloads: a model with seeded random weights (nothing is downloaded), a prompt, a sweep."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import psutil
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

STREAMS = ("block_output", "mlp_activation", "attention_output")
WINDOW = 10
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""A tiny vocabulary does not reach the usual ids."""

MEMORY_SHARE = 0.5
"""Part of the free memory that the weights of a case with `fits` may take."""

CPU_BLOCKS = 2
"""Most blocks of such a case on a CPU, where time is short before memory is."""

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


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
        seed: of the weights, the prompts' tokens and the noise, which is the same for every prompt of a length.
        prompts: how many there are; they share passes.
        longest: of several prompts; their lengths are drawn between `tokens` and this one. 0: all have `tokens`.
        number: of several prompts, which one this is.
        fits: the model has only as many of its blocks as fit into the device's memory, see `fitted`.
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
    prompts: int = 1
    longest: int = 0
    number: int = 0
    fits: bool = False

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.config[self._layers_key]

    @property
    def _layers_key(self) -> str:
        return "n_layer" if self.is_gpt2 else "num_hidden_layers"

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

    def with_dtype(self, dtype: str | None) -> Self:
        """The same case in another dtype; None keeps it.

        Raises:
            KeyError: a dtype that is not in DTYPES.
        """
        return self if dtype is None else replace(self, dtype=DTYPES[dtype])

    def with_layers(self, n_layers: int) -> Self:
        """The same case with another number of blocks."""
        return replace(self, config=self.config | {self._layers_key: n_layers})

    def each(self) -> list[Self]:
        """One case per prompt: of several prompts, with lengths, subjects and tokens of their own."""
        if self.prompts == 1:
            return [self]
        random = np.random.RandomState(self.seed)
        lengths = random.randint(self.tokens, max(self.tokens, self.longest) + 1, self.prompts)
        return [self._one(number, int(length), random) for number, length in enumerate(lengths)]

    def _one(self, number: int, length: int, random: np.random.RandomState) -> Self:
        """Prompts of one length keep the subject; others have one of their own, as wide, before the last token."""
        begin, end = self.subject
        shift = random.randint(0, length - end) - begin if self.longest else 0
        subject = (begin + int(shift), end + int(shift))
        return replace(self, prompts=1, tokens=length, subject=subject, number=number)

    def summary(self) -> str:
        """One line: shapes, dtype, corruption."""
        shape = ", ".join(f"{key}={value}" for key, value in self.config.items() if value is not None)
        return (
            f"{self.name}: {shape}, {self.dtype_name}, {self._prompts_in_words()}, "
            f"noise {self.noise:.4g}, samples {self.samples}, window {WINDOW}"
        )

    def _prompts_in_words(self) -> str:
        begin, end = self.subject
        if self.prompts == 1:
            return f"{self.tokens} tokens, subject [{begin}, {end})"
        lengths = f"{self.tokens} to {self.longest}" if self.longest else str(self.tokens)
        return f"{self.prompts} prompts of {lengths} tokens in common passes, subjects of {end - begin} tokens"

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


def _llama(
    n_layers: int, width: int, heads: tuple[int, int], mlp: int, vocab_size: int, tied: bool = True
) -> dict[str, Any]:
    config = {
        "num_hidden_layers": n_layers,
        "hidden_size": width,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": mlp,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
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

LLAMA3 = Case(
    "llama3-8b",
    **_llama(32, 4096, heads=(32, 8), mlp=14336, vocab_size=128256, tied=False),
    tokens=12,
    subject=(3, 7),
    noise=0.1,
    dtype=torch.bfloat16,
    fits=True,
)

CASES = {
    case.name: case
    for case in (
        GPT2,
        replace(GPT2, name="gpt2-12-n10", samples=10),
        replace(GPT2, name="gpt2-12-t25", tokens=25, subject=(8, 12)),
        replace(GPT2, name="gpt2-12-t200", tokens=200, subject=(40, 46)),
        replace(GPT2, name="gpt2-12-mixed32", tokens=5, longest=28, prompts=32),
        SMOLLM2,
        LLAMA3,
        XL,
        replace(XL, name="gpt2-xl-n10", samples=10),
        replace(XL, name="gpt2-xl-t25", tokens=25, subject=(8, 12)),
        TINY_GPT2,
        replace(TINY_GPT2, name="tiny-mixed3", tokens=4, longest=7, prompts=3),
        TINY_LLAMA,
    )
}


def fitted(case: Case, device: torch.device | str = "cpu") -> Case:
    """The case with as many of its blocks as fit; other cases than those with `fits` stay.

    Raises:
        MemoryError: not one block fits.
    """
    if not case.fits:
        return case
    none, one = (weight_bytes(empty_model(case.with_layers(n_layers))) for n_layers in (0, 1))
    allowed = MEMORY_SHARE * free_bytes(device)
    blocks = min(case.n_layers, int((allowed - none) // (one - none)))
    if torch.device(device).type == "cpu":
        blocks = min(blocks, CPU_BLOCKS)
    if blocks < 1:
        raise MemoryError(f"{case.name}: {one / 1e9:.1f} GB for one block, {allowed / 1e9:.1f} GB may be used")
    return case.with_layers(blocks)


def free_bytes(device: torch.device | str) -> int:
    """Memory that is free on a device."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def weight_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters, on a device or not yet."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def build(case: Case, device: torch.device | str = "cpu") -> Workload:
    """The case's only prompt, on a model of its own; see `build_all`."""
    (workload,) = build_all(case, device)
    return workload


def build_all(case: Case, device: torch.device | str = "cpu") -> list[Workload]:
    """Make the case's model, its prompts and their targets, the clean run's most probable next token."""
    device = torch.device(device)
    model = build_model(case, device)
    return [_workload(each, model, device) for each in case.each()]


def _workload(case: Case, model: PreTrainedModel, device: torch.device) -> Workload:
    generator = torch.Generator().manual_seed(case.seed + case.number)
    prompt = torch.randint(model.config.vocab_size, (1, case.tokens), generator=generator)
    with torch.no_grad():
        logits = model(prompt.to(device), use_cache=False).logits
    return Workload(case, model, prompt[0].tolist(), int(logits[0, -1].argmax()), device)


def empty_model(case: Case) -> PreTrainedModel:
    """The case's model without its weights."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(case.config_class(**case.config), dtype=case.dtype)


def build_model(case: Case, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The case's model in eval mode. Its weights are drawn once, where they stay, from the case's seed.

    A GPU draws other numbers than a CPU; what is compared runs on one device.
    """
    model = empty_model(case)
    generator = torch.Generator(device).manual_seed(case.seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
            if name != "bias" and "norm" in type(module).__name__.lower():
                value.fill_(1)
            elif name != "bias":
                value.normal_(0, case.weight_std, generator=generator)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    nn.Module.to(model, device)  # the buffers
    model.config.architectures = [type(model).__name__]  # a checkpoint has it, and pyvene's read-out asks
    return model.eval()
