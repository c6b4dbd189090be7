"""What a checkpoint's files say, before and after transformers reads them: sizes, adapters, missing weights, damage."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers.utils import find_adapter_config_file

from fasttrace.errors import ModelError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
POINTER = b"version https://git-lfs"
"""What the small file begins with that Git leaves in place of a large one which it has not fetched."""

GGUF = "GGUF files are not supported yet; give the model as a Hugging Face id, or as a folder with safetensors"

TRUST = (
    "it runs only with trust_remote_code=True (--trust-remote-code), and can then do whatever you can; read it first"
)

QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
"""For transformers' `cached_file`: None for a file that a model does not have."""

COUNTS = re.compile(r"(layer|block|expert|head|codebook|stage)s?$")
MOST = 10_000
"""Largest number of layers, experts and the like: a module is built for each, so a wrong number takes hours."""

RECOMPUTED = re.compile(
    r"(rotary\w*|rope)\.inv_freq$|\.(attn|attention|self_attn|self_attention)\.(bias|masked_bias|causal_mask)$"
)
"""Tensors of older checkpoints that no model reads any more: frequencies and causal masks, made anew."""


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file of a checkpoint.

    Raises:
        ModelError: the file is not there, is not JSON, or holds something else.
    """
    where = f"{path.name} in {path.parent}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{where} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = what_is_wrong(path) or f"is not JSON ({first_line(error)}): fetch the file again"
        raise ModelError(f"{where} {reason}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{where} holds {type(found).__name__} {found!r:.40}, expected an object: fetch it again")
    return found


def check_folder(folder: Path) -> None:
    """Raises where a model's folder cannot be read as one, before anything in it is opened."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ModelError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.exists() and not (entry.is_file() or entry.is_dir()):  # a FIFO would be waited for
            raise ModelError(f"{entry.name} in {folder} is not a regular file; a model's folder holds files alone")
    names = {entry.name for entry in entries}
    if names.isdisjoint({CONFIG, ADAPTER_CONFIG}):
        gguf = [name for name in sorted(names) if name.endswith(".gguf")]
        if gguf:
            raise ModelError(f"{folder} holds {gguf[0]}: {GGUF}")
        raise ModelError(f"{folder} is a folder without {CONFIG}: give the folder that save_pretrained wrote")


@dataclass(frozen=True)
class Adapter:
    """What a PEFT adapter says of its base model: id or folder, and the revision."""

    base: str
    base_revision: str | None


def adapter_of(source: str, revision: str | None) -> Adapter | None:
    """The base model of a PEFT adapter; None where the source is a whole model.

    Raises:
        ModelError: the folder cannot be read, holds adapter and model at once, or names no base model; peft is missing.
    """
    folder = Path(source)
    if folder.is_dir():
        check_folder(folder)
    path = find_adapter_config_file(source, revision=revision)
    if path is None:
        return None
    if any(not file.name.startswith("adapter_") for file in _weight_files(folder)):
        raise ModelError(
            f"{source} holds a model and an adapter ({ADAPTER_CONFIG}): give the adapter's files a folder of their "
            "own to trace with it, or take them away to trace without it"
        )
    settings = read_json(Path(path))
    base, base_revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{ADAPTER_CONFIG} of {source} names no base model: write it there as base_model_name_or_path")
    if find_spec("peft") is None:
        raise ModelError(f"{source} is an adapter of {base} and needs the package peft: pip install peft")
    if os.path.isdir(base) and not (Path(base) / CONFIG).is_file():
        raise ModelError(
            f"{base}, the base model of the adapter {source}, is a folder without {CONFIG}: give a whole model"
        )
    return Adapter(base, base_revision if isinstance(base_revision, str) else None)


def check_config(config: Mapping[str, Any], name: str, *, trusted: bool) -> None:
    """Raises for numbers of layers, experts or heads that no model has, and for code that nobody allowed.

    Args:
        config: what config.json holds.
        name: the model's name, for the message.
        trusted: code that comes with a model may run.
    """
    for key, value in _values(config):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and COUNTS.search(key) and not value <= MOST:
            raise ModelError(f"{CONFIG} of {name} has {key} = {value!r:.24}, expected at most {MOST:,}: correct it")
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value and not trusted:
            raise ModelError(f"{CONFIG} of {name} asks for the kernel {value!r}, which is code: {TRUST}")


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values that are no objects and no lists, with the key that each stands under."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _values(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, key)
    else:
        yield key, value


def check_size(skeleton: nn.Module, name: str, itemsize: int, *, quantized: bool, spread: bool) -> None:
    """Raises where the model that a configuration describes cannot be in its files, or not on this machine.

    transformers makes room for every weight before it misses it: one wrong number takes all memory.

    Args:
        skeleton: the model on the meta device.
        name: a folder, or an id.
        itemsize: bytes of a weight once it is loaded.
        quantized: weights are packed, and shapes say nothing of their size.
        spread: weights may stay on disk.
    """
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    stored = sum(path.stat().st_size for path in _weight_files(Path(name)))
    if stored and weights > stored * (16 if quantized else 2):  # a byte a weight, some counted twice as they are tied
        raise ModelError(
            f"{CONFIG} of {name} describes {weights:,} weights, and its files have {stored:,} bytes: one of them is "
            "another model's, or cut short"
        )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in skeleton.buffers())
    needed = buffers + (0 if quantized or spread else weights * itemsize)
    if needed > (memory := _memory()):
        raise ModelError(
            f"{name} takes {needed / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f} GiB: take a smaller "
            "dtype, or device_map='auto' with an offload_folder"
        )


def _memory() -> int:
    """Bytes of the machine, in main memory, swap and GPUs."""
    found = psutil.virtual_memory().total + psutil.swap_memory().total
    if torch.cuda.is_available():
        with suppress(AssertionError, RuntimeError):  # a driver that does not answer is said where it is used
            found += sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return found


def check_weights(name: str, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Raises where a model's weights are not those of its files; the model's class may allow exceptions.

    Args:
        name: the model's name, for the message.
        model: as it was loaded.
        info: what transformers says of its loading: keys that are missing, unexpected, mismatched.
    """
    buffers = {path for path, _ in model.named_buffers()}
    missing = sorted(key for key in info["missing_keys"] if not RECOMPUTED.search(key))
    unexpected = sorted(key for key in info["unexpected_keys"] if key not in buffers and not RECOMPUTED.search(key))
    shapes = sorted((key, *map(list, both)) for key, *both in info["mismatched_keys"])
    said = []
    if missing:
        said.append(f"{len(missing)} are not in its files ({_few(missing)})")
    if shapes:
        few = _few([f"{key}: {stored}, expected {expected}" for key, stored, expected in shapes])
        said.append(f"{len(shapes)} have another shape there ({few})")
    if unexpected:
        said.append(f"{len(unexpected)} in its files have no place in the model ({_few(unexpected)})")
    said += [first_line(text) for text in info.get("error_msgs") or ()]
    if said:
        raise ModelError(
            f"the weights of {name} are not those of a {type(model).__name__}: {'; '.join(said)}. "
            f"{'Random numbers would stand for them' if missing or shapes else 'They would be left out'}: fetch the "
            f"files again, or correct {CONFIG}; a model of another class is given as Tracer(model, tokenizer)"
        )


def _few(keys: list[str], most: int = 3) -> str:
    more = f", and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


@contextmanager
def report_kept() -> Iterator[list[str]]:
    """Takes transformers' table of missing weights from its log: `check_weights` says it in one sentence."""
    kept: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            kept.append(record.getMessage())
        return not is_report

    loggers = [logging.getLogger(f"transformers.{module}") for module in ("modeling_utils", "integrations.peft")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield kept
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def damaged_file(folder: Path) -> str | None:
    """The first file of a model's folder that cannot be read, and why; to be asked once loading has failed."""
    for path in _weight_files(folder):
        if reason := what_is_wrong(path):
            return f"{path.name} in {folder} {reason}"
    for index in folder.glob("*.index.json"):
        shards = set(map(str, dict(read_json(index).get("weight_map") or {}).values()))
        if lost := sorted(shard for shard in shards if not (folder / shard).is_file()):
            return f"{index.name} in {folder} names {lost[0]}, which is not there: fetch the model again"
    return None


def damaged_text(folder: Path) -> str | None:
    """The same among the files of a tokenizer."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model")
    for path in (folder / name for name in names):
        if path.is_file() and (reason := what_is_wrong(path)):
            return f"{path.name} {reason}"
    return None


def _weight_files(folder: Path) -> list[Path]:
    """Files that hold weights: safetensors, and where there are none, pickles; none for an id."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def what_is_wrong(path: Path) -> str | None:
    """Why a file cannot be what its name says; None where nothing is found."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
        if not start:
            return "is empty: fetch it again"
        if start == POINTER:
            return "is a Git LFS pointer and not the file itself: run git lfs pull there"
        if path.suffix == ".safetensors":
            return _wrong_safetensors(path)
        return _wrong_pickle(path) if path.suffix == ".bin" else None
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _wrong_safetensors(path: Path) -> str | None:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except OSError:
        raise
    except Exception as error:
        return f"is damaged or cut short ({first_line(error)}): fetch it again"


def _wrong_pickle(path: Path) -> str | None:
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        is_archive = "weights_only" not in str(error)
        what = (
            "is damaged or cut short" if is_archive else "is a pickle with more than weights in it, and is not opened"
        )
        return f"{what} ({first_line(error)}): fetch it again, or save it as safetensors"


def first_line(error: object, most: int = 300) -> str:
    """An error's first line, or its type where it says nothing; cut where it is long."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= most else line[: most - 3] + "..."


def folder_of(source: str, revision: str | None) -> Path | None:
    """The folder that holds a model's files: the local one, or that of the cache; None where there is none."""
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import try_to_load_from_cache

    for name in (CONFIG, ADAPTER_CONFIG):
        try:
            found = try_to_load_from_cache(source, name, revision=revision)
        except ValueError:  # not an id
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def chain_of(error: BaseException) -> Iterable[BaseException]:
    """An error and those that it was raised from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return seen
