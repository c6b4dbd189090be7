"""Options that several commands have, and what they stand for."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.cli.guard import tell
from fasttrace.errors import ModelError, StoreError
from fasttrace.experiment.cells import SITES, STREAMS

if TYPE_CHECKING:
    from fasttrace.api import Tracer

Model = Annotated[
    str, typer.Option(help='A Hugging Face id, a local folder, a GGUF file, or an embedded model: "smollm2".')
]
Revision = Annotated[str | None, typer.Option(help="Revision of the Hugging Face repository.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")]
Engine = Annotated[str, typer.Option(help="auto, wavefront, fork, rows or reference.")]
Fuse = Annotated[
    bool, typer.Option("--fuse/--no-fuse", help="Use faster equivalents of parts of the model during a trace.")
]
CpuMatmul = Annotated[
    str, typer.Option(help="Library for matrix products on a CPU: auto (the faster one), mkl or onednn.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto: spread a model that one device cannot hold over GPUs, main memory and disk."),
]
OffloadFolder = Annotated[Path | None, typer.Option(help="Folder where --device-map keeps weights on disk.")]
Modules = Annotated[
    list[str] | None,
    typer.Option(
        "--module",
        help="Path of a part of the model, e.g. attention=self_attn; repeatable. Parts: embedding, blocks, attention, "
        "mlp, down.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the Python code that comes with the model. It can do whatever you can."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files of another run in the folder.")]
Stream = Annotated[
    list[str] | None,
    typer.Option(help=f"Stream to restore, repeatable: {', '.join(SITES)}. Default: {', '.join(STREAMS)}."),
]
Window = Annotated[
    int,
    typer.Option(help="Number of neighboring blocks restored together (always 1 for block_input and block_output)."),
]
Noise = Annotated[
    str,
    typer.Option(
        help="Standard deviation of the noise, or s3: 3 x that of the subject's embeddings (in a run: all subjects')."
    ),
]
NoiseSubjects = Annotated[
    Path | None,
    typer.Option(help="File of subjects to measure s3 on: one per line, or a JSON list."),
]
Samples = Annotated[int, typer.Option(help="Number of noise draws to average over.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
TokenBudget = Annotated[str, typer.Option("--budget", help="Largest number of tokens in one forward pass, or auto.")]


def load_model(model: str, *, say: bool = True, **options: Any) -> "Tracer":
    """A tracer by a model's name; see `Tracer.from_pretrained`.

    Raises:
        ModelError: it cannot be loaded; before anything is fetched, if that is because of the options.
    """
    from fasttrace.models.loading import check_place

    places = ("dtype", "device", "device_map", "offload_folder")
    check_place(**{name: options[name] for name in places if name in options})
    if say:
        tell(f"loading {model}")
    from transformers.utils.logging import disable_progress_bar

    from fasttrace.api import Tracer

    disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the error that follows says it once
    return Tracer.from_pretrained(model, **options)


def module_paths(options: list[str] | None) -> dict[str, str] | None:
    """["attention=self_attn"] -> {"attention": "self_attn"}.

    Raises:
        ModelError: an option without "=".
    """
    for option in options or ():
        if "=" not in option:
            raise ModelError(f"--module is {option!r}, expected a part and its path, such as attention=self_attn")
    return dict(option.split("=", 1) for option in options) if options else None


def number_or_text(text: str, number: Callable[[str], Any]) -> Any:
    """A number if the text is one."""
    try:
        return number(text)
    except ValueError:
        return text


def read_subjects(path: Path) -> list[str]:
    """Subjects to measure noise on, from a file.

    Raises:
        StoreError: it cannot be read, or has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else text.splitlines()
        subjects = [item["subject"] if isinstance(item, dict) else item for item in found]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"cannot read subjects from {path} ({error!r}): give a text file with one subject per line, or a JSON list"
        ) from error
    subjects = [subject for subject in subjects if isinstance(subject, str) and subject.strip()]
    if not subjects:
        raise StoreError(f"{path} holds no subjects: give one per line")
    return subjects
