"""Names to models: a Hugging Face id, a local folder or "smollm2"; dtype and device by name."""

import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fasttrace.errors import ModelError

logger = logging.getLogger("fasttrace")

EMBEDDED = "smollm2"
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto" is the first GPU if there is one.

    Raises:
        ModelError: a device that torch does not know or does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:0") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {device!r} is not there: torch sees {torch.cuda.device_count()} GPUs; give device='cpu'"
        )
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The type of that name; "auto" is float16 on a GPU and float32 on a CPU.

    On a CPU float16 is unusably slow and becomes bfloat16, with a message.

    Raises:
        ModelError: not a name of a floating-point type.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {name!r}; choose from auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        logger.warning("float16 runs at a hundredth of float32's speed on a CPU; using bfloat16")
        return torch.bfloat16
    return DTYPES[name]


def load(name: str, dtype: torch.dtype, device: torch.device, revision: str | None) -> tuple[nn.Module, Any]:
    """A model in evaluation mode on its device, and its tokenizer (None where there is none).

    Raises:
        ModelError: it cannot be found or read, or it is not a decoder-only language model.
    """
    source = _source_of(name)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        if config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder model; causal tracing needs a decoder-only one")
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype)
    except OSError as error:
        raise ModelError(_not_found(name)) from error
    except (ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{name} is not a model with a causal language-model head: {_first_line(error)}") from error
    cast(nn.Module, model).to(device)
    return model.eval(), _tokenizer_of(source, revision)


def _source_of(name: str) -> str:
    if name != EMBEDDED:
        return name
    from fasttrace.demo import model_folder

    return str(model_folder())


def _tokenizer_of(source: str, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError):
        logger.warning("%s has no tokenizer that can be read; give prompts as token ids", source)
        return None


def _not_found(name: str) -> str:
    return (
        f"model {name!r} is not a local folder with a model, not in the local cache, and cannot be fetched; "
        f"check the name and the network, or use the embedded model {EMBEDDED!r}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
