"""Commands for sets of facts: run, export, average, report."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fasttrace.checks import one_of
from fasttrace.cli import words as summary
from fasttrace.cli.guard import say
from fasttrace.cli.options import (
    LOADING,
    RUN_SETTINGS,
    Model,
    load_model,
    takes,
    tell,
)
from fasttrace.errors import StoreError
from fasttrace.experiment.settings import Settings
from fasttrace.files.object_stores import is_address
from fasttrace.models import embedded

if TYPE_CHECKING:
    from fasttrace.reports.averages import Averages
    from fasttrace.runs.coverage import Coverage
    from fasttrace.runs.run import Outcome

Folder = Annotated[
    str, typer.Argument(help="Folder of a run, or its address in an object store, such as s3://bucket/run.")
]
Everything = Annotated[
    bool,
    typer.Option("--everything", help="Include facts in the folder that the last start of the run did not ask for."),
]
AllowIncomplete = Annotated[
    bool, typer.Option("--allow-incomplete", help="Exit with 0 even if facts are missing (the message stays).")
]
AVERAGES, NOTES = "averages.csv", "coverage.txt"
AVERAGES_FILES = (AVERAGES, "averages_totals.csv", NOTES, "roles.png", "lines.png")
INCOMPLETE = 3
"""Exit code of a command that has written what there is, which is less than was asked for."""


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (run, export, average, report):
        app.command()(command)


@takes(settings=RUN_SETTINGS, loading=LOADING)
def run(
    facts: Annotated[
        str, typer.Option(help="ROME's or CounterFact's JSON file, a .csv, .jsonl or .parquet file, or \"builtin\".")
    ] = "builtin",
    out: Annotated[Path, typer.Option(help="Folder of the run. An interrupted run resumes in its folder.")] = Path(
        "out/run"
    ),
    model: Model = embedded.MODEL_NAME,
    limit: Annotated[int | None, typer.Option(help="Read only this many facts.", min=1)] = None,
    shard: Annotated[
        str, typer.Option(help="How work is divided among processes: by facts, or by the cells of each prompt.")
    ] = "facts",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    *,
    settings: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Trace many facts into a folder. Resumes when repeated; start it under accelerate launch for several GPUs."""
    from fasttrace.cli.progress import FactsBar
    from fasttrace.facts.dataset import check_answers, read_facts
    from fasttrace.files.sets import check_writable
    from fasttrace.runs.processes import Ranks
    from fasttrace.runs.run import SHARDS
    from fasttrace.runs.run import run as run_facts

    strict = Settings(**settings).strict
    one_of("shard", shard, SHARDS)
    check_writable(out)
    ranks = Ranks.current(cpu=loading["device"].startswith("cpu"))
    if not ranks.is_first:
        _say_only_errors()
    found = read_facts(facts if facts == "builtin" else Path(facts), strict=strict, limit=limit)
    if settings["require_correct"]:
        check_answers(found)
    if loading["device"] == "auto" and loading["device_map"] is None:
        loading["device"] = ranks.device
    tracer = ranks.in_turn(lambda: load_model(model, say=ranks.is_first, **loading))
    quiet = quiet or not ranks.is_first
    with FactsBar(quiet) as bar:
        outcome = run_facts(tracer, found, out, ranks=ranks, shard=shard, progress=None if quiet else bar, **settings)
    if ranks.is_first:
        say(_summary(outcome, out))
    if not outcome.traced:
        if ranks.is_first:
            tell(f"error: none of the {outcome.facts} facts could be traced: {_commonest_reason(outcome)}")
        raise typer.Exit(2)


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
    shown = outcome.store.coverage()
    lines += [f"note: {note}" for note in shown.notes]
    if not outcome.traced:
        return "\n".join(lines)
    return "\n".join([*lines, f"next: fasttrace report {out}, fasttrace average {out}, fasttrace export {out}"])


def _commonest_reason(outcome: "Outcome") -> str:
    reasons = outcome.store.facts(outcome.store.coverage())["reason"].value_counts()
    if not len(reasons):
        return "no reason is given"
    return f"{reasons.index[0]} ({reasons.iloc[0]} of them)" if len(reasons) > 1 else str(reasons.index[0])


def _say(shown: "Coverage", allow_incomplete: bool) -> None:
    """Says what was missing or left out, and ends with `INCOMPLETE` where facts are missing."""
    for note in shown.notes:
        tell(f"note: {note}")
    if not shown.complete and not allow_incomplete:
        raise typer.Exit(INCOMPLETE)


def _inside(folder: str, name: str) -> Path:
    """Where a command writes by default; a folder from someone else may have a link there that leads elsewhere.

    Raises:
        StoreError: it has one, or is no folder of this machine.
    """
    if is_address(folder):
        raise StoreError(f"{folder} is read from a copy: say where to write with --out")
    where = Path(folder) / name
    if where.is_symlink():
        raise StoreError(f"{where} is a link to {where.resolve()}: say where to write with --out")
    return where


def export(
    folder: Folder,
    format: Annotated[
        str, typer.Option(help="rome-npz: ROME's case files; csv: a CSV file per fact and stream.")
    ] = "csv",
    out: Annotated[Path | None, typer.Option(help="Folder to write to (default: a folder inside the run's).")] = None,
    spreadsheet_safe: Annotated[
        bool,
        typer.Option(
            "--spreadsheet-safe/--texts-as-they-are",
            help="In the table of facts, put an apostrophe before texts that a spreadsheet would run as formulas.",
        ),
    ] = True,
    everything: Everything = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """Write a run's facts in other formats."""
    from fasttrace.reports.exports import EXPORTS
    from fasttrace.reports.exports import export as export_store
    from fasttrace.runs.store import Store

    where = out or _inside(folder, format if format in EXPORTS else "")
    store = Store.read(folder)
    shown = store.coverage(everything)
    paths = export_store(store, where, format, shown=shown, spreadsheet_safe=spreadsheet_safe)
    say(f"wrote {len(paths)} files to {where}")
    _say(shown, allow_incomplete)


def average(
    folder: Folder,
    value: Annotated[
        str | None,
        typer.Option(
            help="indirect_effect, normalized_effect (a ratio of sums), mean_of_ratios, or the metric's own name "
            "(default: indirect_effect, with --compat rome prob)."
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="What is averaged: prob, logit_diff, kl or another number that the run has.")
    ] = "prob",
    compat: Annotated[str | None, typer.Option(help="rome: roles and means as in ROME's notebook.")] = None,
    bootstrap: Annotated[int, typer.Option(help="Number of bootstrap draws for the intervals.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write to (default: averages inside the run's).")] = None,
    everything: Everything = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """Average a run's grids by token role, as in the paper's second figure: CSV files and figures."""
    from fasttrace.files.sets import check_writable, one_set
    from fasttrace.reports.averages import average as average_records
    from fasttrace.runs.store import Store

    where = out or _inside(folder, "averages")
    check_writable(where)
    store = Store.read(folder)
    shown = store.coverage(everything)
    options = {"value": value, "metric": metric, "compat": compat, "bootstrap": bootstrap, "seed": seed}
    averages = average_records(store, shown=shown, **options)
    with one_set(where, AVERAGES, lambda _: AVERAGES_FILES) as scratch:
        paths = averages.save_csv(scratch / AVERAGES)
        if shown.notes:
            paths.append(scratch / NOTES)
            paths[-1].write_text("".join(f"{note}\n" for note in shown.notes), encoding="utf-8")
        if find_spec("plotnine") is not None:
            paths += _averages_drawn(averages, scratch)
    written = "\n".join(f"  {where / path.name}" for path in paths)
    say(f"{summary.averages_text(averages)}\n\nwrote\n{written}")
    _say(shown, allow_incomplete)


def _averages_drawn(averages: "Averages", where: Path) -> list[Path]:
    from fasttrace.reports.average_figures import save_lines, save_roles

    paths = [where / "roles.png", where / "lines.png"]
    for path, save in zip(paths, (save_roles, save_lines), strict=True):
        save(averages, path)
    return paths


def report(
    folder: Folder,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric to choose from on the page; repeatable (default: prob, logit_diff, kl)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write (default: report.html in the run's folder).")] = None,
    everything: Everything = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """Write a run as one HTML page that works without a network: averages, a table of facts, their grids."""
    from fasttrace.reports.page import SHOWN_METRICS, write_report
    from fasttrace.runs.store import Store

    where = out or _inside(folder, "report.html")
    store = Store.read(folder)
    shown = store.coverage(everything)
    path = write_report(store, where, shown=shown, metrics=metric or SHOWN_METRICS)
    say(f"wrote {path}")
    _say(shown, allow_incomplete)
