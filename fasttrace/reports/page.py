"""A run as one HTML file: summary, averages, a table of facts and each fact's heat maps, without a network."""

import base64
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fasttrace.checks import items, mapping, path_of, text, whole_number
from fasttrace.experiment.sites import color_map
from fasttrace.files.writing import as_utf8, atomic_write
from fasttrace.reports.average_figures import ROLE_COLORS, ROLE_NAMES, layer_title, legend, lowest
from fasttrace.reports.averages import Averages, average_each
from fasttrace.reports.sources import shown_records
from fasttrace.results.figure import METRIC_NAMES, PlotError
from fasttrace.results.record import Record
from fasttrace.results.result import DIRECTION, TraceResult
from fasttrace.runs.coverage import Coverage
from fasttrace.runs.store import Store

__all__ = ["write_report"]

PAIR = ("counterfactual", "counterfactual_ids", "counterfactual_tokens", "differing")
NOT_ABOUT_THE_RUN = ("prompt", "subject", "target", *PAIR)
SHOWN_METRICS = ("prob", "logit_diff", "kl")
"""Of which a page has grids unless more are asked for: each metric adds its 5 bytes a cell."""
DIGITS = 6


def write_report(
    records: Store | Iterable[Record],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    about: Mapping[str, Any] | None = None,
    bad_rows: Iterable[Any] = (),
    notes: Iterable[str] = (),
    missing: int = 0,
    shown: Coverage | None = None,
    metrics: Iterable[str] = SHOWN_METRICS,
) -> Path:
    """Writes a run as one HTML file that needs neither a network nor other files.

    It has what was run, average total and indirect effects with figures, a table of facts to search and sort,
    and the heat maps of each fact, where a cell shows its numbers under the pointer. Indirect effects are kept
    as float32 beside the exact probabilities of the runs without edits, some 5 bytes a cell and metric. A metric is
    chosen on the page: at first the logit difference where every traced fact has a foil, else the probability. A file
    of the same name is replaced; it appears whole or not at all. Records are read once, one at a time.

    Args:
        records: a store, or facts with their results; those without one are listed with the reason.
        path: the file, e.g. ``"out/report.html"``.
        title: heading of the page; by default a store's set of facts, or "Causal tracing of" the model.
        about: what was run, name to value; by default the metadata that all results agree on.
        bad_rows: rows of the data set that are no facts, in any form that has a ``str``.
        notes: sentences to show above the summary.
        missing: facts that were asked for and are not among the records; the page counts them. Of a store it is known,
            as are malformed rows and notes, to which those that are given are added.
        shown: which facts of a store, see `Store.records`.
        metrics: those to choose from, beside prob; those that no fact has are left out.

    Returns:
        The path written.

    Raises:
        PlanError: a metric that has no average.
        PlotError: plotly is not installed.
        StoreError: the file cannot be written.
    """
    path = path_of("path", path, file=True)
    title = None if title is None else text("title", title)
    about = None if about is None else mapping("about", about)
    notes, bad_rows = items("notes", notes, "a list of sentences"), items("bad_rows", bad_rows, "a list of rows")
    missing = whole_number("missing", missing, 0, meaning="facts")
    found, shown = shown_records(records, shown)
    if isinstance(records, Store) and shown is not None:
        about_run = records.description
        title = title or as_utf8(about_run.get("name") or None)
        bad_rows, missing = [*about_run.get("bad_rows", ()), *bad_rows], missing + shown.missing
        notes = [*records.notes, *shown.notes, *notes]
    metrics = tuple(dict.fromkeys(("prob", *items("metrics", metrics, "a list of names"))))
    script = _plotly_script()
    run = _Run(metrics)
    averages, reasons = run.read(found)
    name = f"Causal tracing of {_model_name(run.shared)}" + ("" if run.direction == DIRECTION else f", {run.direction}")
    payload = {
        "title": title or name,
        "about": [[str(name), _text(value)] for name, value in (run.shared if about is None else about).items()],
        "notes": [*map(str, notes), *reasons],
        "bad_rows": [_text(row) for row in bad_rows],
        "counts": run.counts() | ({"missing": missing} if missing else {}),
        "direction": run.direction,
        "metrics": run.choices(),
        "metric": run.default_metric,
        "averages": averages.pop("prob", None),
        "others": averages,
        "facts": run.facts,
    }
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_page(payload, run.pieces(), script))
    return path


class _Run:
    """What a page keeps of its records, filled while the averages are taken."""

    def __init__(self, metrics: tuple[str, ...]) -> None:
        self.metrics = metrics
        self.facts: list[dict[str, Any]] = []
        self.grids: list[dict[str, str]] = []
        self.reasons: Counter[str] = Counter()
        self.having: Counter[str] = Counter()
        self.directions: set[str] = set()
        self.metadata: dict[str, Any] | None = None

    @property
    def shared(self) -> dict[str, Any]:
        return self.metadata or {}

    @property
    def direction(self) -> str:
        return " and ".join(sorted(self.directions)) or DIRECTION

    @property
    def default_metric(self) -> str:
        traced = len(self.facts) - self.reasons.total()
        return "logit_diff" if traced and self.having["logit_diff"] == traced else "prob"

    def choices(self) -> list[dict[str, str]]:
        """The metrics that any fact has, prob first: a grid's element is named by the number in this list."""
        names = ("prob", *(name for name in self.metrics[1:] if self.having[name]))
        return [{"name": name, "title": METRIC_NAMES.get(name, name)} for name in names]

    def read(self, records: Iterable[Record]) -> tuple[dict[str, Any], list[str]]:
        """Reads all records; gives the averages that there are, and notes that say why there are no others."""
        found = average_each(self._seen(records), self.metrics)
        shown = [name for name in self.metrics if name == "prob" or self.having[name]]
        averages = {name: each for name in shown if isinstance(each := found[name], Averages)}
        missing = [name for name in shown if name not in averages]
        notes = [f"No averages{'' if name == 'prob' else f' of {name}'}: {found[name]}" for name in missing]
        return {name: _averages(each) for name, each in averages.items()}, notes

    def _seen(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            result = record.result
            names = [] if result is None else [name for name in self.metrics if name in result.metrics]
            self.having.update(names)
            self.facts.append(_fact(record, names))
            self.grids.append({} if result is None else {name: _grids(result, name) for name in names})
            if result is None:
                self.reasons[record.reason or "no reason given"] += 1
            else:
                self.directions.add(result.direction)
                self._share(result.metadata)
            yield record

    def pieces(self) -> Iterator[str]:
        """The elements that hold the grids."""
        numbers = {choice["name"]: f"-{i}" if i else "" for i, choice in enumerate(self.choices())}
        for i, grids in enumerate(self.grids):
            for name, grid in grids.items():
                yield f'<script type="text/plain" id="grid-{i}{numbers[name]}">{grid}</script>\n'

    def _share(self, metadata: Mapping[str, Any]) -> None:
        if self.metadata is None:
            self.metadata = {name: metadata[name] for name in metadata if name not in NOT_ABOUT_THE_RUN}
        shared = self.metadata
        self.metadata = {name: shared[name] for name in shared if name in metadata and metadata[name] == shared[name]}

    def counts(self) -> dict[str, Any]:
        asked = [fact["correct"] for fact in self.facts if fact["correct"] is not None]
        traced = len(self.facts) - self.reasons.total()
        reasons = self.reasons.most_common()
        return {
            "facts": len(self.facts),
            "traced": traced,
            "asked": len(asked),
            "known": sum(asked),
            "reasons": reasons,
        }


def _fact(record: Record, metrics: Iterable[str]) -> dict[str, Any]:
    fact = record.fact
    row = {
        "id": fact.id,
        "prompt": fact.prompt,
        "subject": fact.subject,
        "target": fact.target,
        "relation": fact.relation,
        "correct": record.correct,
        "reason": record.reason,
    }
    return row if record.result is None else row | _trace(record.result, metrics)


def _trace(result: TraceResult, metrics: Iterable[str]) -> dict[str, Any]:
    return {
        "target": str(result.target_id) if result.target is None else result.target,
        **_runs(result, "prob"),
        "runs": {name: _runs(result, name) for name in metrics if name != "prob"},
        "pair": _pair(result),
        "tokens": result.tokens,
        "span": result.span,
        "layers": result.n_layers,
        "streams": [
            {"name": stream, "title": layer_title(stream, result.windows[stream]), "color": color_map(stream)}
            for stream in result.streams
        ],
    }


def _runs(result: TraceResult, metric: str) -> dict[str, float | None]:
    values = {run: _number(result.run_value(run, metric)) for run in ("clean", "corrupted", "background")}
    return values | {"total": _number(result.gap(metric))}


def _pair(result: TraceResult) -> dict[str, Any] | None:
    """The counterfactuals as tokens, and the places where any of them differs; None where noise was used."""
    others, places = (result.metadata.get(name) for name in ("counterfactual_tokens", "differing"))
    if not isinstance(others, list) or not isinstance(places, list):
        return None
    if not all(isinstance(other, list) and len(other) == result.n_positions for other in others):
        return None
    return {"tokens": [[str(token) for token in other] for other in others], "differing": places}


def _grids(result: TraceResult, metric: str) -> str:
    effects = np.stack([result.grid(stream, "indirect_effect", metric=metric) for stream in result.streams])
    with np.errstate(over="ignore"):
        return base64.b64encode(effects.astype("<f4").tobytes()).decode("ascii")


def _averages(averages: Averages) -> dict[str, Any]:
    frame = averages.to_frame()
    columns = ("mean", "low", "high", "boot_low", "boot_high", "count", "facts")
    streams = []
    for stream in averages.streams:
        lines = []
        for role in averages.roles:
            cells = frame[(frame["stream"] == stream) & (frame["role"] == role)]
            numbers = {column: [_rounded(value) for value in cells[column]] for column in columns}
            lines.append({"role": role, "name": ROLE_NAMES[role], "color": ROLE_COLORS[role], **numbers})
        title = layer_title(stream, averages.windows[stream])
        streams.append({"name": stream, "title": title, "color": color_map(stream), "lines": lines})
    totals = [{name: _plain(value) for name, value in row.items()} for row in averages.totals().to_dict("records")]
    peaks = [_peak(averages, stream) for stream in averages.streams]
    base = {"value": legend(averages), "lowest": lowest(averages), "facts": averages.facts, "falls": averages.falls}
    return base | {"streams": streams, "totals": totals, "peaks": peaks}


def _peak(averages: Averages, stream: str) -> dict[str, Any]:
    row = averages.strongest(stream).iloc[0].to_dict()
    return {name: _plain(value) for name, value in row.items()} | {"name": ROLE_NAMES[row["role"]]}


def _model_name(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("model") or "a language model")


# Plain values for JSON.


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return _rounded(value) if isinstance(value, float) else value


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


# The page: a template, its style and scripts, and the data as JSON that no text can break out of.


def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise PlotError(f'a report needs plotly ({error}): run pip install "fasttrace[report]"') from error
    return get_plotlyjs()


def _page(payload: Mapping[str, Any], grids: Iterable[str], plotly: str) -> Iterator[str]:
    folder = resources.files("fasttrace") / "reports" / "html"
    names = ("template.html", "report.css", "charts.js", "page.js")
    template, style, charts, page = ((folder / name).read_text("utf-8") for name in names)
    scripts = {"plotly": _embeddable(plotly), "charts": _embeddable(charts), "page": _embeddable(page)}
    policy = " ".join(f"'sha256-{_digest(code)}'" for code in scripts.values())
    parts = {
        "policy": [f"default-src 'none'; script-src {policy}; style-src 'unsafe-inline'; img-src data: blob:"],
        "style": [style],
        "data": [_json(payload)],
        "grids": grids,
    }
    parts |= {name: [code] for name, code in scripts.items()}
    for i, piece in enumerate(template.split("%%")):
        if i % 2:
            yield from parts[piece]
        else:
            yield piece


def _embeddable(code: str) -> str:
    # The browser reads every line end as \n before it compares the script with its hash.
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    assert "</script" not in code.lower(), "a script may not end the element it stands in"
    return code


def _digest(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii")


def _json(payload: Mapping[str, Any]) -> str:
    # With no "<", "</script>" and "<!--" in a prompt are only text; plain ASCII keeps lone surrogates.
    return json.dumps(payload, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
