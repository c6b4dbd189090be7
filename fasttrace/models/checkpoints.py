"""What a checkpoint's files say, before and after transformers reads them: sizes, adapters, missing weights, damage."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from fasttrace.errors import ModelError, first_line

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
POINTER = b"version https://git-lfs"
"""The first bytes of the small file that Git leaves in place of a large one it has not fetched."""

GGUF = "a GGUF file is given by itself, as folder/file.gguf or owner/name/file.gguf"

TRUST = (
    "it runs only with trust_remote_code=True (--trust-remote-code), and can then do whatever you can; read it first"
)

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")

QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
"""For transformers' `cached_file`: None for a file that a model does not have."""

COUNTS = re.compile(r"(layer|block|expert|head|codebook|stage|label)s?$")
MOST = 10_000
"""Largest number of layers, experts and the like: something is made for each, so a wrong number takes hours."""

RECOMPUTED = re.compile(
    r"(rotary\w*|rope)\.inv_freq$|\.(attn|attention|self_attn|self_attention)\.(bias|masked_bias|causal_mask)$"
)
"""Tensors of older checkpoints that no model reads any more: frequencies and causal masks, made anew."""


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file of a checkpoint.

    Raises:
        ModelError: the file is not there, is not JSON, or holds something else.
    """
    if wrong := what_is_wrong(path):
        raise ModelError(f"{path.name} in {path.parent} {wrong}")
    return json.loads(path.read_text(encoding="utf-8"))


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
        raise ModelError(f"{folder} is a folder without {CONFIG}: give the folder that save_pretrained wrote")


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
    """All plain values inside of objects and lists, each with its key."""
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
    stored = sum(path.stat().st_size for path in weight_files(Path(name)))
    if stored and weights > stored * (16 if quantized else 2):  # a byte a weight, some counted twice as they are tied
        if damage := damaged_file(Path(name)):
            raise ModelError(f"{name} cannot be loaded: {damage}")
        raise ModelError(
            f"{CONFIG} of {name} describes {weights:,} weights, and its files have {stored:,} bytes: one of them is "
            "another model's, or cut short"
        )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in skeleton.buffers())
    needed = buffers + (0 if quantized or spread else weights * itemsize)
    if needed > (most := memory()):
        raise ModelError(
            f"{name} takes {needed / 2**30:,.0f} GiB, and this machine has {most / 2**30:,.0f} GiB: take a smaller "
            "dtype, or device_map='auto' with an offload_folder"
        )


def memory() -> int:
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
    missing = [key for key in info["missing_keys"] if not RECOMPUTED.search(key)]
    unexpected = [key for key in info["unexpected_keys"] if key not in buffers and not RECOMPUTED.search(key)]
    shapes = [f"{key}: {list(stored)}, expected {list(own)}" for key, stored, own in info["mismatched_keys"]]
    said = differences(missing, unexpected, shapes) + [first_line(text) for text in info.get("error_msgs") or ()]
    if said:
        raise ModelError(
            f"the weights of {name} are not those of a {type(model).__name__}: {'; '.join(said)}. "
            f"{'Random numbers would stand for them' if missing or shapes else 'They would be left out'}: fetch the "
            f"files again, or correct {CONFIG}; a model of another class is given as Tracer(model, tokenizer)"
        )


def differences(missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str] = ()) -> list[str]:
    """How the weights in files differ from those of a model, in words: how many, and the first few."""
    kinds = (
        (sorted(missing), "not in its files"),
        (sorted(shapes), "of another shape there"),
        (sorted(unexpected), "in its files without a place in the model"),
    )
    return [f"{_count(keys)} {what} ({_few(keys)})" for keys, what in kinds if keys]


def _count(keys: Sized) -> str:
    return f"{len(keys)} {'is' if len(keys) == 1 else 'are'}"


def _few(keys: list[str], most: int = 3) -> str:
    more = f", and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


@contextmanager
def report_dropped() -> Iterator[None]:
    """Keeps transformers' table of missing weights out of its log: `check_weights` says it in one sentence."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def damaged_file(folder: Path) -> str | None:
    """The first file of a model's folder that cannot be read, and why; to be asked once loading has failed."""
    settings = [path for path in (folder / "generation_config.json", *folder.glob("*.index.json")) if path.is_file()]
    for path in (*weight_files(folder), *settings):
        if reason := what_is_wrong(path):
            return f"{path.name} in {folder} {reason}"
    for index in folder.glob("*.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            return f"{index.name} in {folder} has no weight_map from weights to files: fetch it again"
        if lost := sorted(shard for shard in set(shards.values()) if not (folder / shard).is_file()):
            return f"{index.name} in {folder} names {lost[0]}, which is not there: fetch the model again"
    if not weight_files(folder) and (gguf := sorted(folder.glob("*.gguf"))):
        return f"{folder} holds {gguf[0].name}: {GGUF}"
    return None


def damaged_tokenizer(folder: Path) -> str | None:
    """The same among the files of a tokenizer."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not found:
        return "none of its files is there"
    wrong = ((path.name, what_is_wrong(path)) for path in found)
    return next((f"{name} {reason}" for name, reason in wrong if reason), None)


def weight_files(folder: Path) -> list[Path]:
    """Files that hold weights: safetensors, or else pickles; empty for an id."""
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
        check = {".safetensors": _wrong_safetensors, ".bin": _wrong_pickle, ".json": _wrong_json}.get(path.suffix)
        return check and check(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _wrong_json(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({first_line(error)}): fetch it again"
    return None if isinstance(found, dict) else f"holds {found!r:.40}, expected an object: fetch it again"


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
        if "eights only load failed" not in str(error):
            return f"is damaged or cut short ({first_line(error)}): fetch it again"
        found = re.search(r"(?<=GLOBAL )[\w.]+", str(error))
        what = found[0] if found else "which could be code"
        return f"holds more than weights ({what}) and is not opened: get the model as safetensors"


def folder_of(source: str, revision: str | None) -> Path | None:
    """The folder with a model's files, local or in the cache; None if there is none."""
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
