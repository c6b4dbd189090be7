"""Commands for sets of facts: run, export, average, report."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fasttrace import demo as embedded
from fasttrace import summary
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
    TrustRemoteCode,
    Window,
    load_model,
    module_paths,
    number_or_text,
    read_subjects,
)

if TYPE_CHECKING:
    from fasttrace.aggregate import Averages
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
    trust_remote_code: TrustRemoteCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Trace a set of facts into a folder; run it again to go on, under accelerate launch to use more devices."""
    from fasttrace.datasets import read_facts
    from fasttrace.distributed import Ranks
    from fasttrace.progress import FactsBar
    from fasttrace.runs import run as run_facts

    ranks = Ranks.current(cpu=device.startswith("cpu"))
    if not ranks.is_first:
        _say_only_errors()
    found = read_facts(facts if facts == "builtin" else Path(facts), strict=strict, limit=limit)
    subjects = None if noise_subjects is None else read_subjects(noise_subjects)
    loading = {"dtype": dtype, "revision": revision, "modules": module_paths(module), "fuse": fuse}
    loading |= {"device_map": device_map, "offload_folder": offload_folder, "trust_remote_code": trust_remote_code}
    device = ranks.device if device == "auto" and device_map is None else device
    tracer = ranks.in_turn(lambda: load_model(model, device=device, say=ranks.is_first, **loading))
    options = {"window": window, "noise": number_or_text(noise, float), "noise_subjects": subjects}
    options |= {"samples": samples, "seed": seed, "engine": engine, "budget": number_or_text(budget, int)}
    options |= {"require_correct": require_correct, "strict": strict, "streams": stream and tuple(stream)}
    with FactsBar(quiet or not ranks.is_first) as progress:
        outcome = run_facts(tracer, found, out, ranks=ranks, shard=shard, progress=progress, **options)
    if ranks.is_first:
        typer.echo(_summary(outcome, out))


def _say_only_errors() -> None:
    """Leaves it to the first process to say what all of them would."""
    for name in ("fasttrace", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _summary(outcome: "Outcome", out: Path) -> str:
    before = f" ({outcome.before} were there before)" if outcome.before else ""
    lines = [f"{outcome.traced} facts traced, {outcome.skipped} skipped{before}: {out}"]
    lines += [f"note: {note}" for note in outcome.store.notes]
    about = outcome.store.description
    if about["bad_rows"]:
        lines.append(
            f"malformed rows of {about['name']}, skipped: {len(about['bad_rows'])}, see {out / 'manifest.json'}"
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


def average(
    folder: Folder,
    value: Annotated[
        str | None, typer.Option(help="indirect_effect (default), prob or normalized_effect; with --compat rome prob.")
    ] = None,
    compat: Annotated[str | None, typer.Option(help="rome: roles and means as in ROME's notebook.")] = None,
    bootstrap: Annotated[int, typer.Option(help="Draws of the bootstrap intervals.", min=1)] = 1000,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Where to; default: averages in the run's folder.")] = None,
) -> None:
    """Average a run's grids by token role, as in the paper's second figure: CSV files and figures."""
    from fasttrace.aggregate import average as average_records
    from fasttrace.stores import Store

    averages = average_records(Store.read(folder).records(), value=value, compat=compat, bootstrap=bootstrap, seed=seed)
    where = out or folder / "averages"
    paths = averages.save_csv(where / "averages.csv")
    if find_spec("plotnine") is not None:
        paths += _averages_drawn(averages, where)
    typer.echo(summary.averages_text(averages))
    typer.echo("\nwrote\n" + "\n".join(f"  {path}" for path in paths))


def _averages_drawn(averages: "Averages", where: Path) -> list[Path]:
    from fasttrace.average_plots import save_lines, save_roles

    paths = [where / "roles.png", where / "lines.png"]
    for path, save in zip(paths, (save_roles, save_lines), strict=True):
        save(averages, path)
    return paths


def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the run's folder.")] = None,
) -> None:
    """Write a run as one HTML page that works without a network: averages, a table of facts, their grids."""
    from fasttrace.report import write_report
    from fasttrace.stores import Store

    store = Store.read(folder)
    about = store.description
    bad_rows = about.get("bad_rows", ())
    path = write_report(
        store.records(), out or folder / "report.html", title=about.get("name"), bad_rows=bad_rows, notes=store.notes
    )
    typer.echo(f"wrote {path}")
