"""Names to models: an id, a folder, a GGUF file or an embedded model; dtype, device or devices by name."""

import copy
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from fasttrace.errors import ModelError, first_line
from fasttrace.models import checkpoints, embedded, gguf
from fasttrace.models.arguments import checked_name
from fasttrace.models.loading_errors import explained, is_failure, wants_trust
from fasttrace.models.peft_adapters import adapter_of, add_adapter

logger = logging.getLogger("fasttrace")

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
    if not isinstance(device, (str, torch.device)):
        raise ModelError(f"device is {device!r}, expected auto, cpu, cuda or cuda:0")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:0") from None
    if chosen.type == "meta":
        raise ModelError("device 'meta' holds no numbers; give auto, cpu, cuda or cuda:0")
    if chosen.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=chosen)
        except Exception as error:
            raise ModelError(
                f"device {str(device)!r} is not there ({first_line(error, 80)}); give device='cpu'"
            ) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {str(device)!r} is not there: torch sees {torch.cuda.device_count()} GPUs; give device='cpu'"
        )
    return chosen


def check_place(
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: DeviceMap | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Raises what `load` would raise of these, before anything is fetched or read.

    Raises:
        ModelError: an unknown dtype or device, one that is not there, or both a device and a device map.
    """
    _dtype_name(dtype)
    _place(device, device_map, None, offload_folder)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The type of that name; "auto" is float16 on a GPU and float32 on a CPU.

    On a CPU float16 is unusably slow and becomes bfloat16, with a message.

    Raises:
        ModelError: not a name of a floating-point type.
    """
    name = _dtype_name(dtype)
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "float16" and device.type == "cpu":
        logger.warning("float16 runs at a hundredth of float32's speed on a CPU; using bfloat16")
        return torch.bfloat16
    return DTYPES[name]


def _dtype_name(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ("auto", *DTYPES):
        raise ModelError(f"unknown dtype {name!r}; choose from auto, {', '.join(DTYPES)}")
    return name


def load(
    name: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    *,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """A model in evaluation mode, and its tokenizer (None where there is none).

    Args:
        name: Hugging Face id, local folder (of a PEFT adapter too), GGUF file (a path, or owner/name/file.gguf of the
            Hub), or an embedded model: "smollm2", "gemma3-270m".
        dtype: see `choose_dtype`. A quantized checkpoint keeps its quantized weights.
        device: see `choose_device`.
        revision: of the Hugging Face repository.
        device_map: in place of `device`, for a model that is larger than one device. What "cpu" and "disk" hold
            comes to the first GPU when it is used, if there is one.
        max_memory: of each device that `device_map` may fill, such as {0: "20GiB", "cpu": "60GiB"}.
        offload_folder: where `device_map` may write the weights that it keeps on disk.
        trust_remote_code: run code that comes with the model. Without it none is run, and nobody is asked.

    Raises:
        ModelError: it cannot be found or read, is not a decoder-only language model, or cannot be placed so; its
            files lack weights, or have others than the model; it comes with code, and that is not allowed.
    """
    name = checked_name(name)
    if not isinstance(trust_remote_code, bool):  # "false" would be true
        raise ModelError(f"trust_remote_code is {trust_remote_code!r}, expected True or False")
    if revision is not None and not (isinstance(revision, str) and revision.strip()):
        raise ModelError(f"revision is {revision!r}, expected a branch, a tag or a commit, or None")
    chosen, place = _place(device, device_map, max_memory, offload_folder)
    place["dtype"] = choose_dtype(dtype, chosen)
    if revision is not None and (os.path.exists(name) or name in embedded.MODELS):
        logger.warning("%s is local and has no revisions; revision %r is not looked for", name, revision)
    source = _source_of(name, revision)
    files = {"revision": revision, "trust_remote_code": trust_remote_code}
    with explained(name, source, revision):
        adapter = adapter_of(source, revision)
    if adapter is None:
        model = _model_of(name, source, files, place)
        return _ready(model), _tokenizer_of(source, files)
    base, base_files = adapter.base, files | {"revision": adapter.revision}
    model = _model_of(f"{base}, the base model of the adapter {name},", base, base_files, place)
    with explained(name, source, revision):
        model = add_adapter(model, name, source, revision)
        own = cached_file(source, "tokenizer_config.json", revision=revision, **checkpoints.QUIETLY)
    tokenizer = _tokenizer_of(base, base_files) if own is None else _tokenizer_of(source, files, config=model.config)
    return _ready(model), tokenizer


def _model_of(name: str, source: str, files: dict[str, Any], place: dict[str, Any]) -> nn.Module:
    """A model whose weights are all its files', and whose files' weights are all its own."""
    with explained(name, source, files["revision"]):
        raw = _config_of(source, files["revision"])
        checkpoints.check_config(raw, name, trusted=files["trust_remote_code"])
        config = AutoConfig.from_pretrained(source, **files)
        if config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder model; causal tracing needs a decoder-only one")
        skeleton = _skeleton(config, files["trust_remote_code"])
        if skeleton is not None:
            if isinstance(place["device_map"], Mapping):
                _check_covers(place["device_map"], skeleton)
            spread, quantized = "max_memory" in place, "quantization_config" in raw
            itemsize = place["dtype"].itemsize
            checkpoints.check_size(skeleton, source, itemsize, quantized=quantized, spread=spread)
        asked = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which would not be named otherwise
        with checkpoints.report_dropped():
            loaded = AutoModelForCausalLM.from_pretrained(source, **files, **place, **asked)
        if not isinstance(loaded, tuple):
            raise ModelError(f"the code of {name} does not say which weights it found: Tracer(model) takes it loaded")
        checkpoints.check_weights(name, *loaded)
    return loaded[0]


def _config_of(source: str, revision: str | None) -> dict[str, Any]:
    """What config.json holds, before transformers makes anything of it."""
    if os.path.isdir(source):
        return checkpoints.read_json(Path(source) / checkpoints.CONFIG)
    found = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    if not found:
        raise ModelError(f"{source} has no {checkpoints.CONFIG}: it is no transformers model ({checkpoints.GGUF})")
    return found


def _skeleton(config: Any, trust_remote_code: bool) -> nn.Module | None:
    """The model without its weights; None where it cannot be made, of which loading will say the reason."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except Exception:
        return None


def _ready(model: nn.Module) -> nn.Module:
    """In evaluation mode, and with outputs by name, which engines read, whatever the configuration says."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "return_dict", True) is not True:
            config.return_dict = True
    return model.eval()


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
        _make_folder(offload_folder)
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


def _make_folder(folder: Any) -> None:
    if not isinstance(folder, (str, os.PathLike)):
        raise ModelError(f"offload_folder is {folder!r}, expected the path of a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"offload_folder {str(folder)!r} cannot be made: {reason}") from error


def _check_covers(device_map: Mapping[str, Any], model: nn.Module) -> None:
    """Raises before anything is read if a device map names what the model does not have, or leaves parts out."""
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


def _source_of(name: str, revision: str | None) -> str:
    """The folder or id that transformers reads."""
    if name in embedded.MODELS:
        return str(embedded.model_folder(name))
    path = gguf.file_in(Path(name)) if os.path.isdir(name) else _gguf_file(name, revision)
    return name if path is None else str(gguf.folder_of_file(path, name))


def _gguf_file(name: str, revision: str | None) -> Path | None:
    """A GGUF file, of the Hub or local; None for another name."""
    if not name.endswith(gguf.SUFFIX) or os.path.isfile(name):
        return Path(name) if name.endswith(gguf.SUFFIX) else None
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if not (owner.strip(".~") and repository and file):
        raise ModelError(f"there is no GGUF file {name}; one of the Hub is given as owner/name/file.gguf")
    with explained(name, f"{owner}/{repository}", revision):
        found = cached_file(f"{owner}/{repository}", file, revision=revision)
    return Path(found) if found else None


def _tokenizer_of(source: str, files: dict[str, Any], **more: Any) -> Any:
    """Its tokenizer, or None with the reason in the log.

    Raises:
        ModelError: its files are not there, but pointers to them.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **files, **more)
        # Early transformers 5 makes one that knows its special tokens alone where there are no files.
        if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
            raise OSError("there are no files of a tokenizer")
        return tokenizer
    except BaseException as error:
        if not is_failure(error):
            raise
        folder = checkpoints.folder_of(source, files["revision"])
        damage = folder and checkpoints.damaged_tokenizer(folder)
        if damage and "Git LFS" in damage:
            raise ModelError(f"{damage} ({folder})") from error
        reason = f"it comes with code, and {checkpoints.TRUST}" if wants_trust(error) else damage or first_line(error)
        logger.warning("%s has no tokenizer that can be read (%s); give prompts as token ids", source, reason)
        return None
