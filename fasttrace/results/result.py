"""TraceResult: the grids of a sweep, their effects, the tidy frame, and the files they are kept in."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from fasttrace.checks import flag, path_of, shown, whole_number
from fasttrace.errors import PlanError, StoreError
from fasttrace.experiment.metrics import MEANLESS, check_metric
from fasttrace.files.names import plain_name
from fasttrace.files.received import NONSENSE, expect, why
from fasttrace.files.writing import as_utf8, atomic_write, plain_json, read_parquet, write_parquet
from fasttrace.planning.cost import Cost
from fasttrace.results.metric_grids import MetricGrids
from fasttrace.results.received import check_result, check_streams
from fasttrace.results.rome import rome_arrays, rome_path

if TYPE_CHECKING:
    from plotnine import ggplot
    from plotnine.composition import Compose

__all__ = ["Directions", "TraceResult", "load"]

VALUES = ("prob", "prob_std", "indirect_effect", "normalized_effect")
"""Columns of every frame, and of the default metric what `TraceResult.grid` gives."""
EFFECTS = ("indirect_effect", "normalized_effect")
DIRECTION, BACKGROUND = "denoising", "corrupted"
"""What a result that does not say otherwise has."""


@dataclass(frozen=True, eq=False)
class TraceResult:
    """Everything one trace found: a grid of probabilities per stream and what they are compared with.

    Probabilities are softmax probabilities of the target at the last position, averaged over the noise
    samples; `others` has the same runs in the other metrics. Grids are float64 [n_layers, n_positions], float32 in the
    other metrics, and read-only; ``grid`` gives a copy to work on.
    Two results are equal when every field is, arrays bit for bit (NaN equals NaN).

    Effects are relative to the background, the run that edits are made in: the corrupted run when denoising, the clean
    one when noising. Normalized, they are divided by (source - background), where the source is the other run: 0 is no
    effect, 1 all of it, signed and never clipped.

    Attributes:
        prob: stream -> p(target) of each restored run, averaged over samples.
        prob_std: stream -> population standard deviation of the same over samples.
        clean_prob: p(target) of the clean run, ROME's "high".
        corrupted_prob: p(target) of the corrupted run, averaged over samples, ROME's "low".
        corrupted_std: population standard deviation of the same over samples.
        tokens: display strings of the prompt's tokens, e.g. ``" Tower"``; the ids without a tokenizer.
        token_ids: ids of the prompt's tokens.
        span: half-open token range of the subject.
        target: display string of the target token, e.g. ``" Paris"``; None without a tokenizer.
        target_id: id of the target token.
        top: ``"clean"`` and ``"corrupted"`` -> (id, token, probability) of the next token, best first.
        windows: stream -> how many blocks are restored together.
        cost: what the sweep cost.
        metadata: plain JSON values: model, revision, prompt, subject, noise, sigma, samples, seed, dtype,
            device, engine, engine_reason, self_check_error, hooks (of others, on the model), attention_by ("kernel",
            "groups" or "model"), cpu_matmul (the libraries of a CPU), versions; where `fasttrace run` or
            `fasttrace trace --out` made it also identity, digests of what the model was (`fasttrace.models.identity`).
        target_ids: all tokens of the target, if there are several; else target_id alone.
        foil_ids: tokens that the target is compared with, if any.
        others: metric -> its grids, for all metrics but prob.
    """

    prob: Mapping[str, np.ndarray]
    prob_std: Mapping[str, np.ndarray]
    clean_prob: float
    corrupted_prob: float
    corrupted_std: float
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    span: tuple[int, int]
    target: str | None
    target_id: int
    top: Mapping[str, tuple[tuple[int, str, float], ...]]
    windows: Mapping[str, int]
    cost: Cost
    metadata: Mapping[str, Any]
    target_ids: tuple[int, ...] = ()
    foil_ids: tuple[int, ...] = ()
    others: Mapping[str, MetricGrids] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Copies every field into plain types, so that what is saved and loaded again is equal."""
        plain = {name: _FIELD_TYPES[name](getattr(self, name)) for name in _FIELD_TYPES}
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if not self.target_ids:
            object.__setattr__(self, "target_ids", (self.target_id,))
        _check_shapes(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TraceResult):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in _FIELD_NAMES)

    def __repr__(self) -> str:
        target = self.target_id if self.target is None else repr(self.target)
        return (
            f"TraceResult(target={target}, streams={self.streams}, n_layers={self.n_layers}, "
            f"n_positions={self.n_positions}, clean_prob={self.clean_prob:.6g}, "
            f"corrupted_prob={self.corrupted_prob:.6g})"
        )

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams, in the order they were asked for."""
        return tuple(self.prob)

    @property
    def n_layers(self) -> int:
        """How many blocks the model has: the rows of a grid."""
        return next(iter(self.prob.values())).shape[0]

    @property
    def n_positions(self) -> int:
        """How many tokens the prompt has: the columns of a grid."""
        return len(self.tokens)

    @property
    def total_effect(self) -> float:
        """p(target) of the clean run minus that of the corrupted run."""
        return self.clean_prob - self.corrupted_prob

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that this result has; `fasttrace.experiment.metrics.METRICS` says what they are."""
        return ("prob", *self.others)

    @property
    def default_metric(self) -> str:
        """What figures show when nothing is asked for: the logit difference where there is a foil, else prob."""
        return "logit_diff" if "logit_diff" in self.others else "prob"

    @property
    def direction(self) -> str:
        """Either "denoising", clean values into the corrupted run, or "noising", corrupted ones into the clean run."""
        return str(self.metadata.get("direction", DIRECTION))

    @property
    def background(self) -> str:
        """The run that edits are made in: "corrupted", or "clean"."""
        return str(self.metadata.get("background", BACKGROUND))

    def run_value(self, run: str, metric: str = "prob") -> float:
        """Gives a metric of a run without edits.

        Args:
            run: "clean" or "corrupted", averaged over samples; or "background" or "source".
            metric: one of ``metrics``.

        Raises:
            PlanError: an unknown run or metric.
        """
        known = _known("run", run, ("clean", "corrupted", "background", "source"))
        if known in ("background", "source"):
            known = "corrupted" if (known == "background") == (self.background == "corrupted") else "clean"
        found = self._grids_of(metric)
        return found.clean if known == "clean" else found.corrupted

    def gap(self, metric: str = "prob") -> float:
        """What restoring everything would change: a metric of the source run minus that of the background."""
        return self.run_value("source", metric) - self.run_value("background", metric)

    def grid(self, stream: str, value: str | None = None, *, metric: str | None = None) -> np.ndarray:
        """Gives one stream's grid as an array of its own.

        Args:
            stream: one of ``streams``.
            value: ``indirect_effect``, the metric minus the background's; or ``normalized_effect``, that over
                (source - background): signed, never clipped, NaN when there is no gap; or a metric, or a metric's
                name with ``_std`` for the standard deviation over samples; None for the metric itself.
            metric: one of ``metrics``, which None, the metric itself, and effects are of; by default prob.

        Returns:
            float64 [n_layers, n_positions], a copy.

        Raises:
            PlanError: the stream was not traced, an unknown value or metric, or two metrics.
        """
        _known("stream", stream, self.streams)
        if value is not None and not (isinstance(value, str) and value in EFFECTS):
            _known("value", value, self._values)
            name = value.removesuffix("_std")
            if metric is not None and metric != name:
                raise PlanError(f"value {value!r} and metric {shown(metric)}: give one of the two")
            found = self._grids_of(name)
            return np.array(found.mean[stream] if name == value else found.std[stream], dtype=np.float64)
        metric = self._metric(metric)
        found = np.array(self._grids_of(metric).mean[stream], dtype=np.float64)
        if value is None:
            return found
        if metric in MEANLESS:
            raise PlanError(f"{value} of {metric}: token ids cannot be subtracted; choose another metric")
        with np.errstate(over="ignore", invalid="ignore"):
            effect = found - self.run_value("background", metric)
            return effect if value == "indirect_effect" else _over(effect, self.gap(metric))

    @property
    def _values(self) -> tuple[str, ...]:
        """What `grid` takes for value."""
        spread = (f"{name}_std" for name in self.metrics if self._grids_of(name).std)
        return (*self.metrics, *spread, *EFFECTS)

    def _metric(self, name: str | None) -> str:
        return "prob" if name is None else check_metric(name, self.metrics)

    def _grids_of(self, metric: str) -> MetricGrids:
        if self._metric(metric) == "prob":
            return MetricGrids(self.prob, self.prob_std, self.clean_prob, self.corrupted_prob, self.corrupted_std)
        return self.others[metric]

    def to_frame(self, *, metric: str = "prob") -> pd.DataFrame:
        """Gives all grids as one tidy frame, a row per cell, ordered by stream, layer, position.

        Args:
            metric: one of ``metrics``, which the two effects are of.

        Returns:
            Columns stream, layer, position, token, in_subject, prob, prob_std, indirect_effect,
            normalized_effect, and one for each other metric.

        Raises:
            PlanError: an unknown metric.
        """
        return pd.concat([self._stream_frame(stream, metric) for stream in self.streams], ignore_index=True)

    def _stream_frame(self, stream: str, metric: str = "prob") -> pd.DataFrame:
        start, stop = self.span
        layer, position = (index.ravel() for index in np.indices((self.n_layers, self.n_positions)))
        cells = {
            "stream": stream,
            "layer": layer,
            "position": position,
            "token": np.array([as_utf8(token) for token in self.tokens], dtype=object)[position],
            "in_subject": (start <= position) & (position < stop),
        }
        cells |= {value: self.grid(stream, value).ravel() for value in ("prob", "prob_std")}
        cells |= {value: self.grid(stream, value, metric=metric).ravel() for value in EFFECTS}
        cells |= {name: found.mean[stream].ravel() for name, found in self.others.items()}
        return pd.DataFrame(cells)

    def strongest(self, stream: str, n: int = 3, *, metric: str = "prob") -> pd.DataFrame:
        """Gives the cells of a stream that come closest to the source run, or go furthest beyond it.

        Args:
            stream: one of ``streams``.
            n: how many cells; all of them when the grid has fewer.
            metric: one of ``metrics``.

        Returns:
            Rows of ``to_frame``, largest indirect effect first; smallest first in a metric of which the source run has
            less than the background, as it has of kl.

        Raises:
            PlanError: the stream was not traced, an unknown metric, or n is below 1.
        """
        n = count_of(n)
        frame = self._stream_frame(_known("stream", stream, self.streams), metric)
        upwards = self.gap(metric) < 0 and not (metric == "prob" and self.direction == DIRECTION)
        return frame.sort_values("indirect_effect", ascending=upwards, kind="stable", ignore_index=True).head(n)

    def top_tokens(self, run: str = "clean", n: int = 10) -> pd.DataFrame:
        """Gives the most probable next tokens of the clean or the corrupted run.

        Args:
            run: ``"clean"`` or ``"corrupted"`` (probabilities averaged over samples).
            n: how many tokens; at most as many as the result keeps.

        Returns:
            Columns id, token, prob, best first.

        Raises:
            PlanError: unknown run, or n below 1 or above what the result keeps.
        """
        rows = self.top[_known("run", run, tuple(self.top))]
        n = count_of(n)
        if n > len(rows):
            raise PlanError(f"n={n}: this result keeps the {len(rows)} most probable tokens; ask for fewer")
        ids, tokens, probs = zip(*rows[:n], strict=True)
        return pd.DataFrame({"id": ids, "token": [as_utf8(token) for token in tokens], "prob": probs})

    def summary(self, n: int = 3) -> dict[str, Any]:
        """Gives what matters as plain values for ``json.dumps``; a value that is not finite becomes None.

        Args:
            n: how many of the strongest cells to list per stream.

        Returns:
            Prompt, target, probabilities, total effect, the strongest cells per stream, cost, and the
            metadata under its own names.

        Raises:
            PlanError: n is below 1.
        """
        found = {
            "target": self.target,
            "target_id": self.target_id,
            "tokens": self.tokens,
            "span": self.span,
            "clean_prob": self.clean_prob,
            "corrupted_prob": self.corrupted_prob,
            "corrupted_std": self.corrupted_std,
            "total_effect": self.total_effect,
            "metrics": {name: {run: self.run_value(run, name) for run in self.top} for name in self.metrics},
            "streams": {stream: self._stream_summary(stream, n) for stream in self.streams},
            "cost": dataclasses.asdict(self.cost),
        }
        return _finite({**self.metadata, **found})

    def _stream_summary(self, stream: str, n: int) -> dict[str, Any]:
        columns = ("layer", "position", "token", "in_subject", "prob", "indirect_effect")
        cells = self.strongest(stream, n).to_dict(orient="records")
        strongest = [{column: cell[column] for column in columns} for cell in cells]
        return {"window": self.windows[stream], "strongest": strongest}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything into one parquet file that ``load`` reads back equal.

        The table is ``to_frame()`` and the standard deviations, for any tool that reads parquet; the rest is JSON in
        the schema's metadata. The file appears whole or not at all; its folder is made when it is missing.

        Args:
            path: the file, e.g. ``"out/trace.parquet"``; an existing one is replaced.

        Raises:
            StoreError: the file cannot be written.
        """
        write_parquet(path_of("path", path, file=True), _saved_frame(self), _payload(self))

    def to_csv(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes one CSV per stream with the tutorial's columns ``layer,pos,prob``, and the other metrics' behind them.

        Args:
            folder: where ``{stream}.csv`` go; made when missing, files of that name are replaced.

        Returns:
            The paths written, one per stream.

        Raises:
            StoreError: a file cannot be written.
        """
        folder = path_of("folder", folder)
        paths = {stream: folder / f"{plain_name(stream)}.csv" for stream in self.streams}
        for stream, path in paths.items():
            cells = self._stream_frame(stream).rename(columns={"position": "pos"})
            with atomic_write(path) as temporary:
                cells[["layer", "pos", *self.metrics]].to_csv(temporary, index=False, lineterminator="\n")
        return list(paths.values())

    def save_rome_npz(
        self,
        path: str | os.PathLike[str],
        stream: str,
        *,
        known_id: int | None = None,
        correct_prediction: bool | None = None,
    ) -> Path:
        """Writes one stream as the ``.npz`` that ROME's ``causal_trace.py`` writes, for its notebooks.

        Grids are transposed to [tokens, layers] float32, as there. ``window`` is the sweep's window in
        the block grid too, as there. ``mlp_activation`` and ``mlp_output`` are both ROME's ``mlp``.

        Args:
            path: a file that ends in ``.npz``, or a folder for ``rome_file_name(known_id, stream)``.
            stream: one of ``streams`` that ROME knows: block, MLP or attention output.
            known_id: number of the fact; needed when path is a folder.
            correct_prediction: whether the model knew the fact; by default, whether the target is the
                clean run's most probable token.

        Returns:
            The path written.

        Raises:
            PlanError: the stream was not traced or has no name in ROME, a folder without known_id, or a result of the
                other direction, which ROME has not.
            StoreError: the file cannot be written.
        """
        file = rome_path(path_of("path", path), known_id, stream)
        if correct_prediction is not None:
            correct_prediction = flag("correct_prediction", correct_prediction)
        if self.direction != DIRECTION:
            raise PlanError(f"direction is {self.direction}: ROME's files hold restored runs; trace with {DIRECTION!r}")
        if correct_prediction is None:
            correct_prediction = self.target_id == self.top_tokens("clean", 1)["id"][0]
        arrays: Any = rome_arrays(self, stream) | {"correct_prediction": np.array(bool(correct_prediction))}
        with atomic_write(file) as temporary:
            np.savez(temporary, **arrays)
        return file

    def plot(self, stream: str | None = None, *, metric: str | None = None) -> "ggplot | Compose":
        """Draws the heat map of one stream, or all of them side by side in one figure.

        Args:
            stream: one of ``streams``; None for the whole figure.
            metric: one of ``metrics``; None for ``default_metric``.

        Returns:
            A plotnine plot or composition: show it, restyle it, or save it with its ``save``.

        Raises:
            PlanError: the stream was not traced.
            PlotError: plotnine is not installed.
        """
        from fasttrace.results import figure as plots

        return plots.plot_figure(self, metric) if stream is None else plots.plot_stream(self, stream, metric)


class Directions(NamedTuple):
    """Both directions of one trace.

    They come from one pass, whose cost both have, and from the same clean and corrupted runs.

    Attributes:
        denoising: clean values put into the corrupted run: what is sufficient for the answer.
        noising: corrupted values put into the clean run: what is necessary for it.
    """

    denoising: TraceResult
    noising: TraceResult


def load(path: str | os.PathLike[str]) -> TraceResult:
    """Reads a result that ``TraceResult.save`` wrote, equal to the one that was saved.

    Args:
        path: the parquet file.

    Returns:
        The result.

    Raises:
        StoreError: no such file, not a file of fasttrace, damaged, or written by a newer fasttrace.
    """
    path = path_of("path", path)
    table, payload = read_parquet(path)
    try:
        result = _from_payload(payload, table)
        check_result(result)
    except NONSENSE as error:
        raise StoreError(f"{path} is damaged ({why(error)}): trace again, or take it from a copy") from error
    return result


def _known(what: str, name: Any, known: tuple[str, ...]) -> str:
    if not isinstance(name, str) or name not in known:
        raise PlanError(f"unknown {what} {shown(name)}: this result has {', '.join(known)}")
    return name


def count_of(n: Any) -> int:
    """How many rows are asked for.

    Raises:
        PlanError: no whole number, or below 1.
    """
    if whole_number("n", n) < 1:
        raise PlanError(f"n={n}: ask for at least 1")
    return whole_number("n", n)


def _over(effect: np.ndarray, total: float) -> np.ndarray:
    if total == 0:
        return np.full_like(effect, math.nan)
    return effect / total


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What every field is turned into when a result is made.


def _grids(grids: Mapping[str, Any]) -> dict[str, np.ndarray]:
    copies = {stream: np.array(grid, dtype=np.float64) for stream, grid in grids.items()}
    for grid in copies.values():
        grid.flags.writeable = False
    return copies


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _top(top: Mapping[str, Any]) -> dict[str, tuple[tuple[int, str, float], ...]]:
    return {run: tuple((int(i), str(token), float(prob)) for i, token, prob in top[run]) for run in top}


def _windows(windows: Mapping[str, int]) -> dict[str, int]:
    return {stream: int(window) for stream, window in windows.items()}


def _others(others: Mapping[str, Any]) -> dict[str, MetricGrids]:
    return {str(name): MetricGrids(*found).plain() for name, found in others.items()}


_FIELD_TYPES = {
    "prob": _grids,
    "prob_std": _grids,
    "clean_prob": float,
    "corrupted_prob": float,
    "corrupted_std": float,
    "tokens": tuple,
    "token_ids": _ints,
    "span": _ints,
    "target_id": int,
    "top": _top,
    "windows": _windows,
    "metadata": lambda values: plain_json(values, "metadata"),
    "target_ids": _ints,
    "foil_ids": _ints,
    "others": _others,
}
_FIELD_NAMES = tuple(field.name for field in dataclasses.fields(TraceResult))
_GRID_FIELDS = ("prob", "prob_std", "others")


def _check_shapes(result: TraceResult) -> None:
    if not result.prob or result.prob.keys() != result.prob_std.keys():
        raise PlanError(f"grids of {list(result.prob)} with deviations of {list(result.prob_std)}: need both")
    if len(result.token_ids) != len(result.tokens):
        raise PlanError(f"{len(result.token_ids)} token ids for {len(result.tokens)} tokens: need one each")
    expected = (result.n_layers, result.n_positions)
    grids = [*result.prob.values(), *result.prob_std.values()]
    for name, found in result.others.items():
        if found.mean.keys() != result.prob.keys() or (found.std and found.std.keys() != result.prob.keys()):
            raise PlanError(f"grids of {name} of {list(found.mean)}: expected {list(result.prob)}")
        grids += [*found.mean.values(), *found.std.values()]
    for grid in grids:
        if grid.shape != expected:
            raise PlanError(f"a grid of shape {grid.shape}: expected {expected}, layers by positions")


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return left.shape == right.shape and left.dtype == right.dtype and _same_bits(left, right)
    if isinstance(left, float) and isinstance(right, float):
        return _same_bits(np.float64(left), np.float64(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and type(left) is type(right):
        return len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right) and left == right


def _same_bits(left: Any, right: Any) -> bool:
    bits = f"i{left.itemsize}"
    equal_bits = left.view(bits) == right.view(bits)
    return bool(np.all(equal_bits | (np.isnan(left) & np.isnan(right))))


# Parquet: the frame, and everything else as JSON in the schema's metadata.


def _payload(result: TraceResult) -> dict[str, Any]:
    fields = {name: getattr(result, name) for name in _FIELD_NAMES if name not in _GRID_FIELDS}
    fields["cost"] = dataclasses.asdict(result.cost)
    shape = [result.n_layers, result.n_positions]
    others = {name: [*found[2:], bool(found.std)] for name, found in result.others.items()}
    return {"streams": result.streams, "shape": shape, "fields": fields, "metrics": others}


def _saved_frame(result: TraceResult) -> pd.DataFrame:
    """The frame, and the standard deviations that it leaves out."""
    spread = {
        f"{name}_std": np.concatenate([found.std[stream].ravel() for stream in result.streams])
        for name, found in result.others.items()
        if found.std
    }
    return result.to_frame().assign(**spread)


def _from_payload(payload: dict[str, Any], table: pa.Table) -> TraceResult:
    streams = payload["streams"]
    check_streams(streams)
    shape = (len(streams), *payload["shape"])

    def grids(name: str, kind: pa.DataType) -> dict[str, np.ndarray]:
        column = table.column(name)
        expect(column.type == kind, f"column {name} of type {column.type}")  # null is NaN
        return dict(zip(streams, column.to_numpy().reshape(shape), strict=True))

    found: dict[str, Any] = {name: grids(name, pa.float64()) for name in ("prob", "prob_std")}
    others = {}
    for name, (clean, corrupted, corrupted_std, has_std) in payload.get("metrics", {}).items():
        std = grids(f"{name}_std", pa.float32()) if has_std else {}
        others[name] = MetricGrids(grids(name, pa.float32()), std, clean, corrupted, corrupted_std)
    fields = payload["fields"]
    return TraceResult(**found, others=others, **{**fields, "cost": Cost(**fields["cost"])})
