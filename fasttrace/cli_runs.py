"""Commands for sets of facts: run, export, average, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fasttrace import demo as embedded
from fasttrace.cli_options import (
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
    Revision,
    Samples,
    Seed,
    Stream,
    TokenBudget,
    Window,
    load_model,
    module_paths,
    number_or_text,
    read_subjects,
)

if TYPE_CHECKING:
    from fasttrace.runs import Outcome

Folder = Annotated[Path, typer.Argument(help="Folder of a run.")]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (run, export, average, report):
        app.command()(command)


def run(
    facts: Annotated[
        str, typer.Option(help="ROME's or CounterFact's JSON, a .csv, .jsonl or .parquet, or \"builtin\".")
    ] = "builtin",
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run goes on there.")] = Path("out/run"),
    model: Model = embedded.MODEL_NAME,
    limit: Annotated[int | None, typer.Option(help="Read that many facts.", min=1)] = None,
    require_correct: Annotated[
        bool, typer.Option("--require-correct", help="Skip facts that the model does not know, as ROME does.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first malformed row or fact.")] = False,
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
    shard: Annotated[
        str, typer.Option(help="What processes share out: facts, or the cells of one prompt after the other.")
    ] = "facts",
    revision: Revision = None,
    fuse: Fuse = True,
    module: Modules = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Trace a set of facts into a folder; run it again to go on, under accelerate launch to use more devices."""
    from fasttrace.datasets import read_facts
    from fasttrace.distributed import Ranks
    from fasttrace.progress import FactsBar
    from fasttrace.runs import run as run_facts

    found = read_facts(facts if facts == "builtin" else Path(facts), strict=strict, limit=limit)
    subjects = None if noise_subjects is None else read_subjects(noise_subjects)
    ranks = Ranks.current(cpu=device.startswith("cpu"))
    loading = {"dtype": dtype, "revision": revision, "modules": module_paths(module), "fuse": fuse}
    loading |= {"device_map": device_map, "offload_folder": offload_folder}
    device = ranks.device if device == "auto" and device_map is None else device
    tracer = ranks.in_turn(lambda: load_model(model, device=device, say=ranks.is_first, **loading))
    options = {"window": window, "noise": number_or_text(noise, float), "noise_subjects": subjects}
    options |= {"samples": samples, "seed": seed, "engine": engine, "budget": number_or_text(budget, int)}
    options |= {"require_correct": require_correct, "strict": strict, "streams": stream and tuple(stream)}
    with FactsBar(quiet or not ranks.is_first) as progress:
        outcome = run_facts(tracer, found, out, ranks=ranks, shard=shard, progress=progress, **options)
    if ranks.is_first:
        typer.echo(_summary(outcome, out))


def _summary(outcome: "Outcome", out: Path) -> str:
    before = f" ({outcome.before} were there before)" if outcome.before else ""
    lines = [f"{outcome.traced} facts traced, {outcome.skipped} skipped{before}: {out}"]
    lines += [f"note: {note}" for note in outcome.store.notes]
    about = outcome.store.description
    if about["bad_rows"]:
        lines.append(
            f"{len(about['bad_rows'])} rows of {about['name']} are no facts: {out / 'manifest.json'} lists them"
        )
    return "\n".join([*lines, f"next: fasttrace report {out}, fasttrace average {out}, fasttrace export {out}"])


def export(
    folder: Folder,
    format: Annotated[str, typer.Option(help="rome-npz: ROME's case files; csv: a CSV per fact and stream.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="Where to; default: a folder in the run's.")] = None,
) -> None:
    """Write a run's facts in other formats."""
    from fasttrace.exports import export as export_store
    from fasttrace.stores import Store

    where = out or folder / format
    paths = export_store(Store.read(folder), where, format)
    typer.echo(f"wrote {len(paths)} files to {where}")


def average(folder: Folder) -> None:
    """Average a run's grids by token role, as in the paper's second figure."""


def report(folder: Folder) -> None:
    """Write a run as one HTML page."""
