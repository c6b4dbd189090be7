"""The command line. It parses, shows progress, prints and chooses exit codes; everything else is in the API.

Exit codes: 0 done, 1 `verify` found other numbers, 2 an error that a message explains, or a run in which nothing could
be traced, 3 what was written goes over fewer facts than the run was asked for (0 with --allow-incomplete), 130
interrupted.
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
from typer.core import TyperGroup

from fasttrace import __version__, environment, outputs, summary, tutorial
from fasttrace import cli_runs as runs
from fasttrace import demo as embedded
from fasttrace.cells import windows_of
from fasttrace.cli_options import (
    CpuMatmul,
    Device,
    DeviceMap,
    Dtype,
    Engine,
    Fuse,
    Model,
    Modules,
    Noise,
    NoiseSubjects,
    OffloadFolder,
    Overwrite,
    Revision,
    Samples,
    Seed,
    Stream,
    TokenBudget,
    TrustRemoteCode,
    Window,
    module_paths,
    number_or_text,
    read_subjects,
)
from fasttrace.cli_options import load_model as _load
from fasttrace.cli_options import tell as _tell
from fasttrace.errors import FasttraceError, PromptError

if TYPE_CHECKING:
    from fasttrace.api import Tracer
    from fasttrace.results import TraceResult

__all__ = ["app"]


class _Guarded(TyperGroup):
    """Turns the errors a user can meet into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FasttraceError as error:
            if ctx.params.get("debug"):
                raise
            if not error.elsewhere:
                _tell(f"error: {error}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            _tell(f"interrupted: {str(error) or 'nothing half-written was left'}")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Guarded,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Causal tracing of language models: where in the network does a prompt's answer come from?",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fasttrace {__version__}")
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
    out: Annotated[Path, typer.Option(help="Folder of the figure, the CSV files and the parquet.")] = Path("out/demo"),
    dtype: Dtype = "auto",
    device: Device = "auto",
    engine: Engine = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Trace one fact on the embedded model, all three streams, and draw the figure."""
    case = embedded.CASE
    request = {"subject": case.subject, "target": case.target, "samples": case.samples}
    wanted = _wanted(case.prompt, request, {"dtype": dtype})
    outputs.check_folder(out, wanted, overwrite)
    tracer = _load(embedded.MODEL_NAME, dtype=dtype, device=device)
    identity = _identity(tracer, out, wanted, overwrite)
    result = _trace(tracer, case.prompt, identity, engine=engine, **request)
    typer.echo(summary.result_text(result))
    _write(result, out, overwrite)


@app.command()
def trace(
    prompt: Annotated[str, typer.Argument(help="Text the model continues.")],
    subject: Annotated[str | None, typer.Option(help="Part of the prompt whose embeddings are corrupted.")] = None,
    span: Annotated[str | None, typer.Option(help="The same as a half-open token range, e.g. 0:4.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Next token to follow, with a space where two words meet; default: the clean run's first."),
    ] = None,
    target_id: Annotated[int | None, typer.Option(help="The same as a token id.")] = None,
    model: Model = embedded.MODEL_NAME,
    stream: Stream = None,
    window: Window = 10,
    noise: Noise = "s3",
    noise_subjects: NoiseSubjects = None,
    samples: Samples = 10,
    seed: Seed = 1,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    budget: TokenBudget = "auto",
    first_target_token: Annotated[
        bool, typer.Option("--first-target-token", help="Follow the first token of a longer target.")
    ] = False,
    ids: Annotated[bool, typer.Option("--ids", help="PROMPT, and a numeric target, are token ids.")] = False,
    revision: Revision = None,
    fuse: Fuse = True,
    cpu_matmul: CpuMatmul = "auto",
    module: Modules = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[Path | None, typer.Option(help="Folder for figure, CSV files and parquet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, nothing else.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Trace a prompt: one grid of restored probabilities per stream."""
    request = {
        "subject": _subject(subject, span),
        "target": _target(target, target_id, ids=ids),
        "streams": stream and tuple(stream),
        "window": window,
        "noise": number_or_text(noise, float),
        "samples": samples,
        "seed": seed,
        "first_target_token": first_target_token,
    }
    loading = {"dtype": dtype, "revision": revision, "modules": module_paths(module)}
    loading |= {"device_map": device_map, "offload_folder": offload_folder, "trust_remote_code": trust_remote_code}
    wanted = _wanted(prompt, request, loading, ids=ids)
    if out is not None:
        outputs.check_folder(out, wanted, overwrite)
    subjects = None if noise_subjects is None else read_subjects(noise_subjects)
    tracer = _load(model, device=device, fuse=fuse, cpu_matmul=cpu_matmul, **loading)
    tokens = _token_ids(prompt) if ids else prompt
    rest = {"noise_subjects": subjects, "engine": engine, "budget": number_or_text(budget, int)}
    result = _trace(tracer, tokens, _identity(tracer, out, wanted, overwrite), **request, **rest)
    typer.echo(json.dumps(result.summary(), ensure_ascii=False) if as_json else summary.result_text(result))
    if out is not None:
        _write(result, out, overwrite, say=_tell if as_json else typer.echo)


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or its trace.parquet.")],
    stream: Annotated[str | None, typer.Option(help="Draw this stream alone.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .png, .pdf or .svg; default: in the folder.")] = None,
    dpi: Annotated[int, typer.Option(help="Dots per inch of a PNG.", min=1)] = 200,
) -> None:
    """Draw the figure of a run again."""
    from fasttrace.results import load

    data = folder / outputs.DATA_FILE if folder.is_dir() else folder
    result = load(data)
    path = out or data.parent / (outputs.FIGURE_FILE if stream is None else f"{stream}.png")
    _save_plot(result, stream, path, dpi)
    typer.echo(f"wrote {path}")


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Show the engine this model would get.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    module: Modules = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show versions, devices and the dtype each gets; of a model its parts, its engine, and why that one."""
    typer.echo(summary.table(environment.rows()))
    if model is not None:
        places = {"device": device, "device_map": device_map, "offload_folder": offload_folder}
        places["trust_remote_code"] = trust_remote_code
        tracer = _load(model, dtype=dtype, revision=revision, modules=module_paths(module), **places)
        typer.echo(summary.table(environment.model_rows(tracer)))


@app.command()
def verify(
    model: Model = tutorial.MODEL_NAME,
    dtype: Dtype = "float32",
    device: Device = "auto",
    engine: Engine = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    tolerance: Annotated[float, typer.Option(help="Relative error of p up to which the numbers agree.")] = 1e-3,
    out: Annotated[Path | None, typer.Option(help="Folder for figure, CSV files and parquet.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run the tutorial's case and show its published numbers beside the ones found here."""
    case = tutorial.CASE
    request = {
        "subject": case.subject,
        "target": case.target,
        "samples": case.samples,
        "noise": tutorial.NOISE,
        "window": tutorial.WINDOW,
        "first_target_token": True,
    }
    wanted = _wanted(case.prompt, request, {"dtype": dtype})
    if out is not None:
        outputs.check_folder(out, wanted, overwrite)
    tracer = _load(model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code)
    identity = _identity(tracer, out, wanted, overwrite)
    result = _trace(tracer, case.prompt, identity, engine=engine, **request)
    typer.echo(summary.result_text(result))
    typer.echo("\n" + summary.comparison_text(result, tolerance))
    if out is not None:
        _write(result, out, overwrite)
    if not all(comparison.relative_error <= tolerance for comparison in tutorial.compare(result)):
        _tell(f"{model} does not give the published numbers (relative tolerance {tolerance:g})")
        raise typer.Exit(1)


def _subject(text: str | None, span: str | None) -> str | tuple[int, int]:
    if (text is None) == (span is None):
        raise PromptError("the subject is missing or given twice: give --subject TEXT or --span BEGIN:END, one of them")
    if text is not None:
        return text
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", span or "")
    if match is None:
        raise PromptError(f"--span is {span!r}, expected two token positions such as 0:4 (half open)")
    return int(match[1]), int(match[2])


def _target(text: str | None, token_id: int | None, ids: bool) -> str | int | None:
    if text is not None and token_id is not None:
        raise PromptError("the target is given twice: give --target TEXT or --target-id NUMBER, one of them")
    if token_id is not None:
        return token_id
    return int(text) if ids and text and text.isdecimal() else text


def _token_ids(text: str) -> list[int]:
    words = re.split(r"[\s,]+", text.strip())
    if not all(word.isdecimal() for word in words):
        raise PromptError(f"the prompt is {text!r}, expected token ids such as '464 4687' because of --ids")
    return [int(word) for word in words]


def _wanted(prompt: str, request: dict[str, Any], loading: dict[str, Any], ids: bool = False) -> dict:
    """What is known of a run before its model is loaded, by the keys of `outputs.identity`."""
    subject, target, noise = request["subject"], request["target"], request.get("noise", "s3")
    known = {
        "prompt": None if ids else prompt,
        "noise" if isinstance(noise, str) else "sigma": noise,
        "samples": request["samples"],
        "seed": request.get("seed", 1),
        **({"subject": subject.strip()} if isinstance(subject, str) else {"span": subject}),
    }
    window = request.get("window", 10)
    known |= {"windows": windows_of(request["streams"], window)} if request.get("streams") else {"window": window}
    if isinstance(target, str) and not request.get("first_target_token"):
        known["target"] = target.strip()
    if loading["dtype"] in ("float32", "bfloat16", "float64"):
        known["dtype"] = loading["dtype"]
    return known


def _identity(tracer: "Tracer", out: Path | None, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """For the metadata of a trace that goes into a folder, which holds none of another model."""
    if out is None:
        return {}
    from fasttrace.identity import digests

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


def _write(result: "TraceResult", out: Path, overwrite: bool, say: Callable[[str], None] = typer.echo) -> None:
    figure = find_spec("plotnine") is not None
    paths = outputs.write_run(result, out, figure=figure, overwrite=overwrite)
    say("\nwrote\n" + "\n".join(f"  {path}" for path in paths))
    if not figure:
        say(f'no figure without plotnine: pip install "fasttrace[plot]", then fasttrace plot {out}')


def _save_plot(result: "TraceResult", stream: str | None, path: Path, dpi: int) -> None:
    from fasttrace.plots import save_figure

    save_figure(result if stream is None else _only(result, stream), path, dpi)


def _only(result: "TraceResult", stream: str) -> "TraceResult":
    result.grid(stream)  # raises for a stream that was not traced
    return replace(result, prob={stream: result.prob[stream]}, prob_std={stream: result.prob_std[stream]})


runs.add_to(app)
