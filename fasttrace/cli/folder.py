"""The folder of one run: figure, one CSV per stream, and everything as parquet.

A folder belongs to one run. Before anything is computed, and again before anything is written, the run that
lies there is compared with the one that is to be written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrace.errors import StoreError
from fasttrace.experiment.cells import SITES
from fasttrace.files.names import plain_name
from fasttrace.files.sets import check_writable, one_set

if TYPE_CHECKING:
    from fasttrace.results.result import TraceResult

__all__ = ["DATA_FILE", "FIGURE_FILE", "check_folder", "identity", "write_run"]

DATA_FILE = "trace.parquet"
FIGURE_FILE = "figure.png"
CSV_FILES = tuple(f"{site}.csv" for site in SITES)
KEPT_METADATA = ("prompt", "counterfactual", "counterfactual_ids", "foil_id", "sigma", "samples", "seed", "dtype")


def identity(result: "TraceResult") -> dict[str, Any]:
    """What makes a run the same run: all that changes its numbers by more than rounding; of a model its digests."""
    return {name: result.metadata.get(name) for name in KEPT_METADATA} | {
        **result.metadata.get("identity", {}),
        "direction": result.direction,
        "span": tuple(result.span),
        "target": result.target and result.target.strip(),
        "target_id": result.target_id,
        "windows": dict(result.windows),
    }


def check_folder(folder: Path, wanted: Mapping[str, Any], overwrite: bool = False) -> None:
    """Refuses a folder that cannot be written or that holds another run.

    Args:
        folder: where a run is to be written; it need not exist.
        wanted: what is known of the run so far, by the keys of `identity` (or "subject", "window", "noise").
        overwrite: another run's files may be replaced.

    Raises:
        StoreError: it says which values differ, or why the folder cannot be used.
    """
    check_writable(folder)
    ours = [name for name in (DATA_FILE, FIGURE_FILE, *CSV_FILES) if (folder / name).exists()]
    if not ours or overwrite:
        return
    from fasttrace.runs.manifest import differences

    known = _known_run(folder, ours)
    found = differences({name: known.get(name) for name in wanted}, wanted)
    if found:
        raise StoreError(
            f"{folder} holds another run ({'; '.join(found)}): give another folder with --out, or "
            "--overwrite to replace that run"
        )


def write_run(result: "TraceResult", folder: Path, figure: bool = True, overwrite: bool = False) -> list[Path]:
    """Writes a run's files; a new folder appears whole or not at all.

    In an old folder the files of an earlier run are removed, `trace.parquet` first, and that of this one comes last: a
    folder whose writer was killed has none. Files of others are left alone.

    Args:
        result: the trace.
        folder: its folder, made when missing.
        figure: draw `figure.png` too, which needs plotnine.
        overwrite: another run's files may be replaced, see `check_folder`.

    Returns:
        The paths written.

    Raises:
        StoreError: the folder cannot be written, or another run has been written there meanwhile; nothing
            half-written stays.
    """

    def check() -> None:
        check_folder(folder, identity(result), overwrite)

    with one_set(folder, DATA_FILE, lambda _: (DATA_FILE, FIGURE_FILE, *CSV_FILES), check) as scratch:
        result.to_csv(scratch)
        result.save(scratch / DATA_FILE)
        if figure:
            _draw(result, scratch / FIGURE_FILE)
        names = [FIGURE_FILE] * figure + [f"{plain_name(stream)}.csv" for stream in result.streams] + [DATA_FILE]
    return [folder / name for name in names]


def _draw(result: "TraceResult", path: Path) -> None:
    from fasttrace.results.figure import save_figure

    save_figure(result, path)


def _known_run(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    from fasttrace.results.result import load

    try:
        result = load(folder / DATA_FILE)
    except StoreError as error:
        raise StoreError(
            f"{folder} holds {', '.join(names)} of an unreadable earlier run ({error}): give another folder "
            "with --out, or --overwrite to replace them"
        ) from error
    if "identity" not in result.metadata:
        raise StoreError(
            f"{folder} holds a run that does not say on which weights it was made (written by an earlier version of "
            "fasttrace, or saved from Python): give another folder with --out, or --overwrite to replace it"
        )
    asked = {name: result.metadata.get(name) for name in ("subject", "noise")}
    return identity(result) | asked | {"window": max(result.windows.values())}
