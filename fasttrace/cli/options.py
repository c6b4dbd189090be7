"""Options that several commands have, and what they stand for."""

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.cli.guard import tell
from fasttrace.errors import ModelError, StoreError
from fasttrace.experiment.cells import SITES, STREAMS
from fasttrace.experiment.settings import Settings

if TYPE_CHECKING:
    from fasttrace.api import Tracer

Model = Annotated[
    str,
    typer.Option(help="A Hugging Face id, a local folder, a GGUF file, or an embedded model: smollm2, gemma3-270m."),
]
Revision = Annotated[str | None, typer.Option(help="Revision of the Hugging Face repository.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0, ...")]
Direction = Annotated[
    str,
    typer.Option(
        help="denoising: clean values into the corrupted run, what is sufficient; noising: the other way, what is "
        "necessary."
    ),
]
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
FirstTargetToken = Annotated[
    bool, typer.Option("--first-target-token", help="Measure the first token of an answer that has several.")
]
RequireCorrect = Annotated[
    bool, typer.Option("--require-correct", help="Skip facts whose answer the model does not predict.")
]
Compat = Annotated[
    str | None,
    typer.Option(help="rome: which facts are known is decided as in ROME's code: the top token is the whole answer."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first malformed row or fact.")]


def _as_typed(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Option:
    """One option of the tables below.

    Attributes:
        annotation: type and help, as typer takes them.
        name: what it becomes: of `Settings`, or of `Tracer.from_pretrained`.
        default: as typed.
        parse: makes the value from what was typed.
    """

    annotation: Any
    name: str
    default: Any
    parse: Callable[[Any], Any] = _as_typed


def _setting(annotation: Any, name: str, parse: Callable[[Any], Any] = _as_typed, typed: bool = False) -> Option:
    default = getattr(Settings, name)
    return Option(annotation, name, str(default) if typed else default, parse)


SETTINGS = {
    "stream": _setting(Stream, "streams", lambda streams: streams and tuple(streams)),
    "window": _setting(Window, "window"),
    "noise": _setting(Noise, "noise", lambda typed: number_or_text(typed, float), typed=True),
    "noise_subjects": _setting(
        NoiseSubjects, "noise_subjects", lambda path: None if path is None else read_subjects(path)
    ),
    "samples": _setting(Samples, "samples"),
    "seed": _setting(Seed, "seed"),
    "direction": _setting(Direction, "direction"),
    "engine": _setting(Engine, "engine"),
    "budget": _setting(TokenBudget, "budget", lambda typed: number_or_text(typed, int), typed=True),
}
"""Options of every command that traces, with the defaults of `Settings`."""

TRACE_SETTINGS = SETTINGS | {"first_target_token": _setting(FirstTargetToken, "first_target_token")}
RUN_SETTINGS = SETTINGS | {
    "require_correct": _setting(RequireCorrect, "require_correct"),
    "compat": _setting(Compat, "compat"),
    "strict": _setting(Strict, "strict"),
}
PLACES = {
    "dtype": Option(Dtype, "dtype", "auto"),
    "device": Option(Device, "device", "auto"),
    "revision": Option(Revision, "revision", None),
    "module": Option(Modules, "modules", None, lambda typed: module_paths(typed)),
    "device_map": Option(DeviceMap, "device_map", None),
    "offload_folder": Option(OffloadFolder, "offload_folder", None),
    "trust_remote_code": Option(TrustRemoteCode, "trust_remote_code", False),
}
"""Options that say how a model is loaded."""

LOADING = PLACES | {"fuse": Option(Fuse, "fuse", True), "cpu_matmul": Option(CpuMatmul, "cpu_matmul", "auto")}


def takes(**tables: Mapping[str, Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options of a table where it has one parameter, which gets a dictionary of their values.

    Args:
        tables: parameter -> the options that stand in its place.
    """

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name in tables:
                parameters += [_parameter(name, option) for name, option in tables[parameter.name].items()]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @wraps(command)
        def called(**typed: Any) -> None:
            taken = {
                name: {option.name: option.parse(typed.pop(key)) for key, option in table.items()}
                for name, table in tables.items()
            }
            command(**typed, **taken)

        given = vars(called)
        given["__signature__"] = inspect.Signature(parameters)
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return with_options


def _parameter(name: str, option: Option) -> inspect.Parameter:
    annotation, default = option.annotation, option.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


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
