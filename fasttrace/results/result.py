"""TraceResult: the grids of a sweep, their effects, the tidy frame, and the files they are kept in."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from fasttrace.checks import flag, path_of, shown, whole_number
from fasttrace.errors import PlanError, StoreError
from fasttrace.files.names import plain_name
from fasttrace.files.received import NONSENSE, expect, why
from fasttrace.files.writing import as_utf8, atomic_write, plain_json, read_parquet, write_parquet
from fasttrace.planning.cost import Cost
from fasttrace.results.received import check_result, check_streams
from fasttrace.results.rome import rome_arrays, rome_path

if TYPE_CHECKING:
    from plotnine import ggplot
    from plotnine.composition import Compose

__all__ = ["TraceResult", "load"]

VALUES = ("prob", "prob_std", "indirect_effect", "normalized_effect")


@dataclass(frozen=True, eq=False)
class TraceResult:
    """Everything one trace found: a grid of probabilities per stream and what they are compared with.

    Probabilities are softmax probabilities of the target at the last position, averaged over the noise
    samples. Grids are float64 [n_layers, n_positions] and read-only; ``grid`` gives a copy to work on.
    Two results are equal when every field is, arrays bit for bit (NaN equals NaN).

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

    def __post_init__(self) -> None:
        """Copies every field into plain types, so that what is saved and loaded again is equal."""
        plain = {name: _FIELD_TYPES[name](getattr(self, name)) for name in _FIELD_TYPES}
        for name, value in plain.items():
            object.__setattr__(self, name, value)
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

    def grid(self, stream: str, value: str = "prob") -> np.ndarray:
        """Gives one stream's grid as an array of its own.

        Args:
            stream: one of ``streams``.
            value: ``prob``; ``prob_std`` over samples; ``indirect_effect``, prob minus the corrupted run's;
                or ``normalized_effect``, that over the total effect: signed, never clipped, NaN when the
                total effect is 0.

        Returns:
            float64 [n_layers, n_positions], a copy.

        Raises:
            PlanError: the stream was not traced, or the value is not one of the four.
        """
        prob = self.prob[_known("stream", stream, self.streams)]
        if _known("value", value, VALUES) == "prob":
            return prob.copy()
        if value == "prob_std":
            return self.prob_std[stream].copy()
        with np.errstate(over="ignore", invalid="ignore"):
            effect = prob - self.corrupted_prob
            return effect if value == "indirect_effect" else _over(effect, self.total_effect)

    def to_frame(self) -> pd.DataFrame:
        """Gives all grids as one tidy frame, a row per cell, ordered by stream, layer, position.

        Returns:
            Columns stream, layer, position, token, in_subject, prob, prob_std, indirect_effect,
            normalized_effect.
        """
        return pd.concat([self._stream_frame(stream) for stream in self.streams], ignore_index=True)

    def _stream_frame(self, stream: str) -> pd.DataFrame:
        start, stop = self.span
        layer, position = (index.ravel() for index in np.indices((self.n_layers, self.n_positions)))
        cells = {
            "stream": stream,
            "layer": layer,
            "position": position,
            "token": np.array([as_utf8(token) for token in self.tokens], dtype=object)[position],
            "in_subject": (start <= position) & (position < stop),
        }
        return pd.DataFrame(cells | {value: self.grid(stream, value).ravel() for value in VALUES})

    def strongest(self, stream: str, n: int = 3) -> pd.DataFrame:
        """Gives the cells of a stream that bring back most of the target's probability.

        Args:
            stream: one of ``streams``.
            n: how many cells; all of them when the grid has fewer.

        Returns:
            Rows of ``to_frame``, largest indirect effect first.

        Raises:
            PlanError: the stream was not traced, or n is below 1.
        """
        n = count_of(n)
        frame = self._stream_frame(_known("stream", stream, self.streams))
        return frame.sort_values("indirect_effect", ascending=False, kind="stable", ignore_index=True).head(n)

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

        The table is ``to_frame()``, for any tool that reads parquet; the rest is JSON in the schema's
        metadata. The file appears whole or not at all; its folder is made when it is missing.

        Args:
            path: the file, e.g. ``"out/trace.parquet"``; an existing one is replaced.

        Raises:
            StoreError: the file cannot be written.
        """
        write_parquet(path_of("path", path, file=True), self.to_frame(), _payload(self))

    def to_csv(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes one CSV per stream with the tutorial's columns ``layer,pos,prob``, layer by layer.

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
                cells[["layer", "pos", "prob"]].to_csv(temporary, index=False, lineterminator="\n")
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
            PlanError: the stream was not traced or has no name in ROME, or a folder without known_id.
            StoreError: the file cannot be written.
        """
        file = rome_path(path_of("path", path), known_id, stream)
        if correct_prediction is not None:
            correct_prediction = flag("correct_prediction", correct_prediction)
        if correct_prediction is None:
            correct_prediction = self.target_id == self.top_tokens("clean", 1)["id"][0]
        arrays: Any = rome_arrays(self, stream) | {"correct_prediction": np.array(bool(correct_prediction))}
        with atomic_write(file) as temporary:
            np.savez(temporary, **arrays)
        return file

    def plot(self, stream: str | None = None) -> "ggplot | Compose":
        """Draws the heat map of one stream, or all of them side by side in one figure.

        Args:
            stream: one of ``streams``; None for the whole figure.

        Returns:
            A plotnine plot or composition: show it, restyle it, or save it with its ``save``.

        Raises:
            PlanError: the stream was not traced.
            PlotError: plotnine is not installed.
        """
        from fasttrace.results import figure as plots

        return plots.plot_figure(self) if stream is None else plots.plot_stream(self, stream)


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
}
_FIELD_NAMES = tuple(field.name for field in dataclasses.fields(TraceResult))
_GRID_FIELDS = ("prob", "prob_std")


def _check_shapes(result: TraceResult) -> None:
    if not result.prob or result.prob.keys() != result.prob_std.keys():
        raise PlanError(f"grids of {list(result.prob)} with deviations of {list(result.prob_std)}: need both")
    if len(result.token_ids) != len(result.tokens):
        raise PlanError(f"{len(result.token_ids)} token ids for {len(result.tokens)} tokens: need one each")
    expected = (result.n_layers, result.n_positions)
    for grid in (*result.prob.values(), *result.prob_std.values()):
        if grid.shape != expected:
            raise PlanError(f"a grid of shape {grid.shape}: expected {expected}, layers by positions")


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return left.shape == right.shape and _same_bits(left, right)
    if isinstance(left, float) and isinstance(right, float):
        return _same_bits(np.float64(left), np.float64(right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and type(left) is type(right):
        return len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right) and left == right


def _same_bits(left: Any, right: Any) -> bool:
    equal_bits = left.view(np.int64) == right.view(np.int64)
    return bool(np.all(equal_bits | (np.isnan(left) & np.isnan(right))))


# Parquet: the frame, and everything else as JSON in the schema's metadata.


def _payload(result: TraceResult) -> dict[str, Any]:
    fields = {name: getattr(result, name) for name in _FIELD_NAMES if name not in _GRID_FIELDS}
    fields["cost"] = dataclasses.asdict(result.cost)
    shape = [result.n_layers, result.n_positions]
    return {"streams": result.streams, "shape": shape, "fields": fields}


def _from_payload(payload: dict[str, Any], table: pa.Table) -> TraceResult:
    check_streams(payload["streams"])
    shape = (len(payload["streams"]), *payload["shape"])
    grids = {}
    for name in _GRID_FIELDS:
        column = table.column(name)
        expect(column.type == pa.float64(), f"column {name} of type {column.type}")  # null is NaN
        values = column.to_numpy().reshape(shape)
        grids[name] = dict(zip(payload["streams"], values, strict=True))
    fields = payload["fields"]
    return TraceResult(**grids, **{**fields, "cost": Cost(**fields["cost"])})
