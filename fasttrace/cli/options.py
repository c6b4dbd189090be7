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

Model = Annotated[str, typer.Option(help='Hugging Face id, local folder, GGUF file, or "smollm2", an embedded model.')]
Revision = Annotated[str | None, typer.Option(help="Revision of the Hugging Face repository.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")]
Engine = Annotated[str, typer.Option(help="auto, wavefront, fork, rows or reference.")]
Fuse = Annotated[bool, typer.Option("--fuse/--no-fuse", help="Fuse activations while a trace runs.")]
CpuMatmul = Annotated[str, typer.Option(help="Library that multiplies on a CPU: auto (the faster), mkl or onednn.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto: spread a model larger than the device over GPUs, main memory and disk."),
]
OffloadFolder = Annotated[Path | None, typer.Option(help="Where --device-map keeps weights on disk.")]
Modules = Annotated[
    list[str] | None,
    typer.Option(
        "--module", help="Where a part is, e.g. attention=self_attn (embedding, blocks, attention, mlp, down)."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model; it can do whatever you can.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run's files in the folder.")]
Stream = Annotated[
    list[str] | None,
    typer.Option(help=f"Repeatable, one of {', '.join(SITES)}; default: {', '.join(STREAMS)}."),
]
Window = Annotated[int, typer.Option(help="Blocks restored together (block streams: always 1).")]
Noise = Annotated[str, typer.Option(help='Standard deviation, or "s3": 3 x that of the embeddings.')]
NoiseSubjects = Annotated[
    Path | None, typer.Option(help="Subjects to measure s3 on: one per line, or JSON with a key subject.")
]
Samples = Annotated[int, typer.Option(help="Noise draws, averaged.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
TokenBudget = Annotated[str, typer.Option("--budget", help="Largest number of tokens in one pass, or auto.")]


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
