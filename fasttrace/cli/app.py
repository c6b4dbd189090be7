"""The command line. It parses, shows progress, prints and chooses exit codes; everything else is in the API.

Exit codes: 0 done, 1 `verify` found other numbers, 2 an error that a message explains, or a run in which nothing could
be traced, 3 what was written goes over fewer facts than the run was asked for (0 with --allow-incomplete), 130
interrupted, 141 nobody reads what it prints. Files are written before anything is printed.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace import __version__
from fasttrace.checks import real_number, text, whole_number
from fasttrace.cli import facts as runs
from fasttrace.cli import folder as outputs
from fasttrace.cli import info as environment
from fasttrace.cli import tutorial
from fasttrace.cli import words as summary
from fasttrace.cli.guard import Guarded, is_utf8, say
from fasttrace.cli.guard import tell as _tell
from fasttrace.cli.options import (
    LOADING,
    PLACES,
    TRACE_SETTINGS,
    Device,
    Dtype,
    Engine,
    Model,
    Overwrite,
    Revision,
    TrustRemoteCode,
    takes,
)
from fasttrace.cli.options import load_model as _load
from fasttrace.errors import PromptError
from fasttrace.experiment.cells import windows_of
from fasttrace.experiment.settings import Settings
from fasttrace.models import embedded

if TYPE_CHECKING:
    from fasttrace.api import Tracer
    from fasttrace.results.result import TraceResult

__all__ = ["app"]

OF_A_PROMPT = ("subject", "target", "counterfactual", "foil")
"""What a trace takes beside its settings."""


app = typer.Typer(
    cls=Guarded,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Causal tracing of language models: which layer, at which token, carries a prompt's answer?",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"fasttrace {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figure, the CSV files and the parquet file.")] = Path(
        "out/demo"
    ),
    dtype: Dtype = "auto",
    device: Device = "auto",
    engine: Engine = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Trace one fact on the embedded model, all three streams, and draw the figure."""
    case = embedded.CASE
    request = {"subject": case.subject, "target": case.target, "samples": case.samples}
    _settings({**request, "engine": engine})
    wanted = _wanted(case.prompt, request, {"dtype": dtype})
    outputs.check_folder(out, wanted, overwrite)
    tracer = _load(embedded.MODEL_NAME, dtype=dtype, device=device)
    identity = _identity(tracer, out, wanted, overwrite)
    result = _trace(tracer, case.prompt, identity, engine=engine, **request)
    written = _write(result, out, overwrite)
    say(f"{summary.result_text(result)}\n{written}")


@app.command()
@takes(settings=TRACE_SETTINGS, loading=LOADING)
def trace(
    prompt: Annotated[str, typer.Argument(help="Text the model continues.")],
    subject: Annotated[str | None, typer.Option(help="The part of the prompt whose embeddings get noise.")] = None,
    span: Annotated[
        str | None, typer.Option(help="Subject as token positions BEGIN:END, END excluded, e.g. 0:4.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help='The answer whose probability is measured, e.g. " Paris" (default: the model\'s own top prediction).'
        ),
    ] = None,
    target_id: Annotated[int | None, typer.Option(help="The answer as a token id.")] = None,
    counterfactual: Annotated[
        list[str] | None,
        typer.Option(help="Another prompt of as many tokens, whose run takes the place of noise; repeatable."),
    ] = None,
    foil: Annotated[str | None, typer.Option(help='An answer to compare the target with, e.g. " Rome".')] = None,
    ids: Annotated[
        bool, typer.Option("--ids", help="PROMPT is a list of token ids, and so is a target of digits.")
    ] = False,
    model: Model = embedded.MODEL_NAME,
    *,
    settings: dict[str, Any],
    loading: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="Folder for figure, CSV files and parquet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the summary, as JSON.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Trace one prompt: a grid of restored probabilities (layers x tokens) for each stream."""
    request = {
        "subject": _subject(subject, span, needed=not counterfactual),
        "target": _target(target, target_id, ids=ids),
        "counterfactual": _counterfactual(counterfactual, ids=ids),
        "foil": _target(foil, None, ids=ids, name="foil"),
        **settings,
    }
    tokens = _token_ids(prompt) if ids else text("prompt", prompt, error=PromptError)
    wanted = _wanted(prompt, request, loading, ids=ids)
    if out is not None:
        outputs.check_folder(out, wanted, overwrite)
    tracer = _load(model, **loading)
    result = _trace(tracer, tokens, _identity(tracer, out, wanted, overwrite), **request)
    written = "" if out is None else _write(result, out, overwrite)
    if as_json:
        say(json.dumps(result.summary(), ensure_ascii=not is_utf8()))
        _tell(written)
    else:
        say("\n".join(filter(None, (summary.result_text(result), written))))


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Folder that a trace was written to, or its trace.parquet.")],
    stream: Annotated[str | None, typer.Option(help="Draw only this stream.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="What to draw (default: logit_diff where the trace has a foil, else prob).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A .png, .pdf or .svg file (default: in the folder).")] = None,
    dpi: Annotated[int, typer.Option(help="Dots per inch of a PNG.", min=1)] = 200,
) -> None:
    """Draw the figure of a trace again."""
    from fasttrace.results.figure import save_figure
    from fasttrace.results.result import load

    data = folder / outputs.DATA_FILE if folder.is_dir() else folder
    result = load(data)
    path = out or data.parent / (outputs.FIGURE_FILE if stream is None else f"{stream}.png")
    save_figure(result, path, dpi, metric, stream)
    say(f"wrote {path}")


@app.command()
@takes(loading=PLACES)
def info(
    model: Annotated[str | None, typer.Argument(help="A model, to show its parts and the engine it gets.")] = None,
    *,
    loading: dict[str, Any],
) -> None:
    """Show versions and devices; for a model also its parts, its engine, and why that engine was chosen."""
    say(summary.table(environment.rows()))
    if model is not None:
        tracer = _load(model, **loading)
        say(summary.table(environment.model_rows(tracer)))


@app.command()
def verify(
    model: Model = tutorial.MODEL_NAME,
    dtype: Dtype = "float32",
    device: Device = "auto",
    engine: Engine = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    tolerance: Annotated[float, typer.Option(help="Largest relative error of a probability that still agrees.")] = 1e-3,
    out: Annotated[Path | None, typer.Option(help="Folder for figure, CSV files and parquet.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Repeat the example of pyvene's Causal Tracing notebook and print its published probabilities beside yours."""
    case = tutorial.CASE
    request = {
        "subject": case.subject,
        "target": case.target,
        "samples": case.samples,
        "noise": tutorial.NOISE,
        "window": tutorial.WINDOW,
        "first_target_token": True,
    }
    _settings({**request, "engine": engine})
    real_number("tolerance", tolerance, 0)
    wanted = _wanted(case.prompt, request, {"dtype": dtype})
    if out is not None:
        outputs.check_folder(out, wanted, overwrite)
    tracer = _load(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    identity = _identity(tracer, out, wanted, overwrite)
    result = _trace(tracer, case.prompt, identity, engine=engine, **request)
    written = "" if out is None else _write(result, out, overwrite)
    found = f"{summary.result_text(result)}\n\n{summary.comparison_text(result, tolerance)}"
    say("\n".join(filter(None, (found, written))))
    if not all(comparison.relative_error <= tolerance for comparison in tutorial.compare(result)):
        _tell(f"{model} does not give the published numbers (relative tolerance {tolerance:g})")
        raise typer.Exit(1)


def _settings(request: dict[str, Any]) -> Settings:
    """Raises what a trace with these options would raise whatever the model."""
    return Settings(**{name: value for name, value in request.items() if name not in OF_A_PROMPT})


def _subject(subject: str | None, span: str | None, needed: bool = True) -> str | tuple[int, int] | None:
    if subject is None and span is None and not needed:
        return None
    if subject is None and span is None:
        raise PromptError("the subject is missing: give --subject TEXT or --span BEGIN:END")
    if subject is not None and span is not None:
        raise PromptError("the subject is given twice: give --subject TEXT or --span BEGIN:END, not both")
    if subject is not None:
        return text("subject", subject, error=PromptError)
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", span or "")
    if match is None:
        raise PromptError(f"--span is {span!r}, expected two token positions such as 0:4 (END excluded)")
    begin, end = _whole("--span", match[1]), _whole("--span", match[2])
    if begin >= end:
        raise PromptError(
            f"--span is {span!r} and holds no token: expected BEGIN below END, such as 0:4 (END excluded)"
        )
    return begin, end


def _counterfactual(prompts: list[str] | None, ids: bool) -> list[Any] | None:
    if not prompts:
        return None
    if ids:
        return [_token_ids(prompt) for prompt in prompts]
    return [text("counterfactual", prompt, error=PromptError) for prompt in prompts]


def _target(target: str | None, token_id: int | None, ids: bool, name: str = "target") -> str | int | None:
    if target is not None and token_id is not None:
        raise PromptError("the target is given twice: give --target TEXT or --target-id NUMBER, not both")
    if token_id is not None:
        return whole_number("--target-id", token_id, 0, error=PromptError)
    if target is None:
        return None
    if not target:
        rest = " for the model's own top prediction" if name == "target" else ""
        raise PromptError(f"the {name} is empty: give the text of one token, or leave out --{name}{rest}")
    if ids and target.isdecimal():
        return _whole(f"--{name}", target)
    return text(name, target, error=PromptError, empty=True)


def _token_ids(prompt: str) -> list[int]:
    words = re.split(r"[\s,]+", prompt.strip())
    if not all(word.isdecimal() for word in words):
        raise PromptError(f"the prompt is {prompt!r}, expected token ids such as '464 4687' because of --ids")
    return [_whole("the prompt", word) for word in words]


def _whole(name: str, digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # more digits than Python reads
        raise PromptError(f"{name} has a number of {len(digits)} digits: expected one of a token") from None


def _wanted(prompt: str, request: dict[str, Any], loading: dict[str, Any], ids: bool = False) -> dict:
    """What is known of a run before its model is loaded, by the keys of `outputs.identity`."""
    settings, (subject, target) = _settings(request), (request["subject"], request["target"])
    others = request.get("counterfactual")
    known: dict[str, Any] = {"prompt": None if ids else prompt, "direction": settings.direction}
    if others is None:
        known |= settings.experiment()
    else:
        known["counterfactual"] = [None if ids else other for other in others]
    if subject is not None:
        known |= {"subject": subject.strip()} if isinstance(subject, str) else {"span": subject}
    if not isinstance(known.get("noise", ""), str):
        known["sigma"] = known.pop("noise")
    streams, window = settings.streams, settings.width(others is not None)
    known |= {"window": window} if streams is None else {"windows": windows_of(streams, window)}
    if isinstance(target, str) and not settings.first_target_token:
        known["target"] = target.strip()
    if loading["dtype"] in ("float32", "bfloat16", "float64"):
        known["dtype"] = loading["dtype"]
    return known


def _identity(tracer: "Tracer", out: Path | None, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """For the metadata of a trace that goes into a folder, which holds none of another model."""
    if out is None:
        return {}
    from fasttrace.models.identity import digests

    identity = digests(tracer.identity())
    outputs.check_folder(out, wanted | identity, overwrite)
    return {"identity": identity}


def _trace(tracer: "Tracer", prompt: str | list[int], identity: dict[str, Any], **options: Any) -> "TraceResult":
    with _progress() as progress:
        result = tracer.trace(prompt, progress=progress, **options)
    return replace(result, metadata={**result.metadata, **identity}) if identity else result


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; one plain line where stderr goes to a file."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        _tell("tracing")
    with tqdm(desc="tracing", unit="block", leave=False, disable=not sys.stderr.isatty()) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def _write(result: "TraceResult", out: Path, overwrite: bool) -> str:
    """Writes a folder, and returns what to say of it."""
    figure = find_spec("plotnine") is not None
    paths = outputs.write_run(result, out, figure=figure, overwrite=overwrite)
    lines = ["", "wrote", *(f"  {path}" for path in paths)]
    if not figure:
        lines.append(f'no figure without plotnine: pip install "fasttrace[plot]", then fasttrace plot {out}')
    return "\n".join(lines)


runs.add_to(app)
