"""Names to models: a Hugging Face id, a local folder or "smollm2"; dtype, device or devices by name."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fasttrace.errors import ModelError

logger = logging.getLogger("fasttrace")

EMBEDDED = "smollm2"
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate makes itself."""

DeviceMap = str | Mapping[str, int | str | torch.device]
"""One of STRATEGIES, or module paths and the device of each: a GPU, "cpu" or "disk"."""


def choose_device(device: str | torch.device) -> torch.device:
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
            f"device {str(device)!r} is not there: torch sees {torch.cuda.device_count()} GPUs; give device='cpu'"
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


def load(
    name: str,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    *,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> tuple[nn.Module, Any]:
    """A model in evaluation mode, and its tokenizer (None where there is none).

    Args:
        name: Hugging Face id, local folder, or "smollm2", the embedded model.
        dtype: see `choose_dtype`. A quantized checkpoint keeps its quantized weights.
        device: see `choose_device`.
        revision: of the Hugging Face repository.
        device_map: in place of `device`, for a model that is larger than one device. What "cpu" and "disk" hold
            comes to the first GPU when it is used, if there is one.
        max_memory: of each device that `device_map` may fill, such as {0: "20GiB", "cpu": "60GiB"}.
        offload_folder: where `device_map` may write the weights that it keeps on disk.

    Raises:
        ModelError: it cannot be found or read, is not a decoder-only language model, or cannot be placed so.
    """
    chosen, place = _place(device, device_map, max_memory, offload_folder)
    place["dtype"] = choose_dtype(dtype, chosen)
    source = _source_of(name)
    with _explained(name):
        config = AutoConfig.from_pretrained(source, revision=revision)
        if config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder model; causal tracing needs a decoder-only one")
        if isinstance(device_map, Mapping):
            _check_covers(device_map, config)
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, **place)
    return model.eval(), _tokenizer_of(source, revision)


def _place(device: Any, device_map: Any, max_memory: Any, offload_folder: Any) -> tuple[torch.device, dict[str, Any]]:
    """The device that computes (of several, the first), and what tells from_pretrained where weights go."""
    if device_map is None:
        if max_memory is not None or offload_folder is not None:
            raise ModelError("max_memory and offload_folder are limits of a device_map; pass device_map='auto' too")
        chosen = choose_device(device)
        return chosen, {"device_map": str(chosen)}
    if device != "auto":
        raise ModelError(f"device is {str(device)!r}, and device_map names devices too; give one of them")
    if offload_folder is not None:
        _make_folder(Path(offload_folder))
    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise ModelError(
            f"max_memory is {max_memory!r}, expected memory by device, such as {{0: '20GiB', 'cpu': '60GiB'}}"
        )
    chosen = _computing_device(device_map, max_memory)
    device_map = device_map if isinstance(device_map, str) else dict(device_map)
    limits = {"max_memory": max_memory and dict(max_memory), "offload_folder": offload_folder}
    return chosen, {"device_map": device_map, **limits}


def _computing_device(device_map: Any, max_memory: Any) -> torch.device:
    if isinstance(device_map, str) and device_map in STRATEGIES:
        without_gpus = max_memory is not None and set(max_memory) <= {"cpu", "disk"}
        return choose_device("cpu" if without_gpus else "auto")
    if not isinstance(device_map, Mapping) or not device_map:
        raise ModelError(
            f"device_map is {device_map!r}: give {', '.join(STRATEGIES)}, or {{module path: device}}; "
            "for a single device there is device='cuda:0'"
        )
    names = [f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values()]
    computing = [choose_device(place) for place in names if place not in ("cpu", "disk")]
    return computing[0] if computing else torch.device("cpu")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"offload_folder {str(folder)!r} cannot be made: {error.strerror}") from error


def _check_covers(device_map: Mapping[str, Any], config: Any) -> None:
    """Raises before anything is read if a device map names what the model does not have, or leaves parts out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = list(model.state_dict())
    modules_and_buffers = (*model.named_modules(), *model.named_buffers())
    names = {*weights, *(path for path, _ in modules_and_buffers)}
    if unknown := [path for path in device_map if path not in names]:
        raise ModelError(f"device_map names {unknown[0]!r}, and {type(model).__name__} has no such module")
    if "" in device_map and len(device_map) > 1:
        raise ModelError("device_map has '', the whole model, beside other modules; name what it should stand for")
    left_out = [weight for weight in weights if not any(_is_in(weight, path) for path in device_map)]
    if left_out:
        raise ModelError(
            f"device_map has no device for {left_out[0]} ({len(left_out)} of {len(weights)} weights are left out); "
            "name their modules too, or let device_map='auto' place them"
        )


def _is_in(weight: str, path: str) -> bool:
    return path in ("", weight) or weight.startswith(f"{path}.")


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


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors of transformers, accelerate and quantizing packages into ones that say what to do."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ImportError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(_advice(name, error, _first_line(error))) from error


def _advice(name: str, error: Exception, reason: str) -> str:
    if isinstance(error, OSError) and error.errno is None:  # a full disk's has a number
        return (
            f"model {name!r} is not a local folder with a model, not in the local cache, and cannot be fetched; "
            f"check the name and the network, or use the embedded model {EMBEDDED!r}"
        )
    if isinstance(error, ImportError):
        return f"{name} needs a package that is not installed: {reason}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{name} does not fit ({reason}); device_map='auto' uses all GPUs, main memory and disk"
    if "offload_folder" in str(error) or "offload_dir" in str(error):
        return f"weights of {name} would go to disk and have to be written there: pass offload_folder='a/folder'"
    if "AutoModelForCausalLM" in str(error):
        return f"{name} is not a model with a causal language-model head: {reason}"
    return f"{name} cannot be loaded: {reason}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
