"""Averages over facts: by token role, stream and block, with errors clustered by fact."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fasttrace.checks import items, memory_for, memory_told, path_of, shown, span_of, whole_number
from fasttrace.errors import PlanError
from fasttrace.experiment.metrics import MEANLESS, METRICS, check_metric
from fasttrace.files.writing import atomic_write
from fasttrace.reports.sources import shown_records
from fasttrace.reports.student import t_quantile
from fasttrace.results.record import Record
from fasttrace.results.result import DIRECTION, TraceResult, count_of
from fasttrace.runs.coverage import Coverage
from fasttrace.runs.store import Store

__all__ = ["ROLES", "VALUES", "Averages", "average", "average_each", "token_roles"]

ROLES = (
    "before_subject",
    "first_subject",
    "middle_subject",
    "last_subject",
    "first_subsequent",
    "further",
    "last",
)
RATIOS = ("normalized_effect", "mean_of_ratios")
EFFECTS = ("indirect_effect", *RATIOS)
VALUES = ("prob", *EFFECTS)
SMALL_GAP = 0.01
"""Of the mean of all facts' gaps: `mean_of_ratios` leaves out facts whose gap is smaller."""
DRAWS, MOST_DRAWS = 1000, 1_000_000
"""Of the bootstrap, by default and at most."""
MOST_POSITIONS = 10_000_000
"""Tokens of a prompt."""
FEWEST_TO_DRAW = 30
"""Facts below which percentiles of the bootstrap are not to be read."""


@dataclass(frozen=True, eq=False)
class Averages:
    """Means over facts, and how far they can be trusted.

    Attributes:
        value: what was averaged: the metric itself by its name, or one of `EFFECTS`.
        metric: which metric that is of.
        direction, background: of the results: see `TraceResult`.
        compat: ``"rome"`` if the roles and the facts are those of ROME's notebook, else None.
        streams: names of the streams, in the results' order.
        n_layers: how many blocks the model has.
        windows: stream -> how many blocks were restored together.
        model: name of the model, if all results agree on it.
        facts: how many facts were averaged.
        skipped: how many records have no result.
        wrong: how many facts ``compat="rome"`` left out because the model did not know the answer.
        undefined: how many facts were left out because they do not have the metric, or too small a gap for a ratio.
        notes: what else has to be known, such as facts that are missing.
    """

    value: str
    metric: str
    direction: str
    background: str
    compat: str | None
    streams: tuple[str, ...]
    n_layers: int
    windows: Mapping[str, int]
    model: str | None
    facts: int
    skipped: int
    wrong: int
    undefined: int
    notes: tuple[str, ...]
    _cells: pd.DataFrame = field(repr=False)
    _totals: pd.DataFrame = field(repr=False)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that any token has, in reading order."""
        found = set(self._cells["role"])
        return tuple(role for role in ROLES if role in found)

    @property
    def falls(self) -> bool:
        """Whether the source run has less than the background, as it has of kl: effects are below 0, ratios are not."""
        if self.value in RATIOS or (self.metric == "prob" and self.direction == DIRECTION):
            return False
        return bool(self._totals.set_index("quantity")["mean"]["total_effect"] < 0)

    def to_frame(self) -> pd.DataFrame:
        """Gives the averages, a row per stream, role and block, in that order.

        Returns:
            Columns stream, role, layer, mean, count (tokens), facts, std_error (clustered by fact), low and
            high (95 % interval from it, by Student's t with facts - 1 degrees of freedom; NaN for one fact),
            boot_low and boot_high (bootstrap 95 % interval), pooled_std_error (as if all tokens were independent,
            which is what ROME's notebook draws). A role that no token has, has no rows.
        """
        return self._cells.copy()

    def totals(self) -> pd.DataFrame:
        """Gives what does not depend on a token's role, each fact counting once.

        Returns:
            Columns quantity, stream, mean, facts, std_error, low, high, boot_low, boot_high. Quantities are
            ``clean_prob``, ``corrupted_prob`` (of another metric its name in place of prob), ``total_effect``, the
            source's less the background's (stream None), and per stream ``indirect_effect``, the mean over a fact's
            whole grid.
        """
        return self._totals.copy()

    def strongest(self, stream: str, n: int = 1) -> pd.DataFrame:
        """Gives the roles and blocks of a stream with the largest mean, or the smallest where `falls` is true.

        Args:
            stream: one of ``streams``.
            n: how many.

        Returns:
            Rows of ``to_frame``, the one closest to the source run, or furthest beyond it, first.

        Raises:
            PlanError: the stream was not traced, or n is below 1.
        """
        n = count_of(n)
        if not isinstance(stream, str) or stream not in self.streams:
            raise PlanError(f"unknown stream {shown(stream)}: these averages have {', '.join(self.streams)}")
        rows: Any = self._cells[self._cells["stream"] == stream]
        return rows.sort_values("mean", ascending=self.falls, kind="stable", ignore_index=True).head(n)

    def save_csv(self, path: str | os.PathLike[str]) -> list[Path]:
        """Writes ``to_frame`` to a CSV file, and ``totals`` beside it.

        Args:
            path: the file, e.g. ``"out/average.csv"``; totals go to ``out/average_totals.csv``.

        Returns:
            The two paths.

        Raises:
            StoreError: a file cannot be written.
        """
        cells = path_of("path", path, file=True)
        totals = cells.with_name(f"{cells.stem}_totals{cells.suffix}")
        for frame, file in ((self._cells, cells), (self._totals, totals)):
            with atomic_write(file) as temporary:
                frame.to_csv(temporary, index=False, lineterminator="\n")
        return [cells, totals]


def average(
    records: Store | Iterable[Record],
    *,
    value: str | None = None,
    metric: str = "prob",
    compat: str | None = None,
    bootstrap: int = DRAWS,
    seed: int = 0,
    notes: Iterable[str] = (),
    shown: Coverage | None = None,
) -> Averages:
    """Averages grids over facts, token by token, for every role of a token, stream and block.

    The mean of a cell is over tokens: R = sum of s_i / sum of n_i, where fact i has n_i tokens of the role
    and s_i is the sum of their values. Tokens of one fact are not independent, so the standard error is that
    of a ratio whose parts are sums over facts, var(R) = G/(G-1) * sum of (s_i - R n_i)^2 / (sum of n_i)^2,
    with G the number of facts that have such a token. With one token to a fact it is the ordinary standard
    error of a mean; with G = 1 it is NaN. The bootstrap draws facts with replacement and takes percentiles;
    a draw in which no fact has the role is left out of that role's interval.

    The 95 % interval is R -+ t * sqrt(var(R)), with t of Student's distribution with G - 1 degrees of freedom: the
    error itself is measured on G facts. For one fact there is none. Of normal effects it covers 95 % where facts
    have equally many tokens of the role; with 1 to 8 tokens at random 92 to 93 % for 5 facts, 93 to 94 % for 10, and
    94 to 95 % from 24 on. Of effects as skewed as an exponential distribution it covers less: 86 to 91 % for 5 facts,
    91 to 93 % for 24, and 94 % for 100. Percentiles of the bootstrap are narrower than that, 83 % for 5 facts of
    normal effects and 90 % for 10, and are not to be read below 30 facts; a note says so.

    Source: W. G. Cochran, Sampling Techniques, 3rd ed. (1977), sections 2.11 and 6.3; the same as the
    cluster-robust error of a regression on a constant, K.-Y. Liang and S. L. Zeger, Biometrika 73 (1986).
    The interval: A. C. Cameron and D. L. Miller, A practitioner's guide to cluster-robust inference, J. Human
    Resources 50 (2015). The bootstrap over clusters: A. C. Cameron, J. B. Gelbach and D. L. Miller, Rev. Econ. Stat. 90
    (2008).

    Args:
        records: a store, or facts with results, read once and in any order. Those without a result are counted and
            left out; facts that the model does not know count like any other, unless compat says otherwise.
        value: ``indirect_effect``, or the metric's own name; by default the effect, and with ``compat="rome"`` the
            probability. Or ``normalized_effect``, a ratio of sums: of the effects, and of the (source - background)
            that each token's effect could have been, which is what the method paragraph above calls n. Or
            ``mean_of_ratios``, in which each token's effect is divided by its own fact's gap first: facts with a gap
            below `SMALL_GAP` of the mean one are left out and counted in ``undefined``.
        metric: a metric that the results have. Facts without it, as without a foil, are left out and counted.
        compat: ``"rome"`` averages as ROME's notebook does: probabilities, its overlapping roles (see
            ``token_roles``), and without facts whose ``correct`` is False.
        bootstrap: how many draws; 0 for none, which leaves NaN in boot_low and boot_high.
        seed: of the bootstrap.
        notes: sentences to keep with the averages; those of a store's coverage come after them.
        shown: which facts of a store, see `Store.records`.

    Returns:
        The averages.

    Raises:
        PlanError: an unknown value or compat, results with different streams, windows or numbers of blocks,
            a grid that is not finite, or no fact to average.
    """
    gathered = _Gathered(*_checked_value(value, metric, compat), compat)
    bootstrap = whole_number("bootstrap", bootstrap)
    if not 0 <= bootstrap <= MOST_DRAWS:
        raise PlanError(f"bootstrap={bootstrap}: ask for 0 draws or more, up to {MOST_DRAWS}")
    seed = whole_number("seed", seed, 0, meaning="seed of the bootstrap")
    notes = tuple(items("notes", notes, "a list of sentences"))
    found, shown = shown_records(records, shown)
    for record in found:
        gathered.add(record)
    return gathered.averages(bootstrap, seed, notes + (() if shown is None else tuple(shown.notes)))


def average_each(records: Iterable[Record], metrics: Iterable[str]) -> dict[str, Averages | str]:
    """Averages indirect effects in several metrics, as `average` does, reading the records once.

    Args:
        records: as of `average`.
        metrics: names.

    Returns:
        Metric -> its averages, or a sentence that says why there are none.

    Raises:
        PlanError: a metric that has no average.
    """
    gathered = {metric: _Gathered(*_checked_value(None, metric, None), None) for metric in metrics}
    reasons: dict[str, str] = {}
    for record in records:
        for metric in gathered.keys() - reasons.keys():
            try:
                gathered[metric].add(record)
            except PlanError as error:
                reasons[metric] = str(error)
    return {metric: reasons.get(metric) or _averages_or_why(each) for metric, each in gathered.items()}


def _averages_or_why(gathered: "_Gathered") -> Averages | str:
    try:
        return gathered.averages(DRAWS, 0, ())
    except PlanError as error:
        return str(error)


def token_roles(span: tuple[int, int], n_positions: int, compat: str | None = None) -> np.ndarray:
    """Says which role each token of a prompt has.

    A token has one role: where it fits several, the last of them in the order of ``ROLES``. So the one token
    of a short subject is ``last_subject``, a single token after the subject is ``last``, and a subject that
    ends the prompt has no ``last_subject``, because its last token is ``last``.

    With ``compat="rome"`` a token has all the roles it fits, and tokens before the subject have none: the
    only subject token is first and last subject token, the only token after it is first subsequent and last.

    Args:
        span: half-open token range of the subject.
        n_positions: how many tokens the prompt has.
        compat: None, or ``"rome"``.

    Returns:
        bool [n_positions, n_roles], columns in the order of ``ROLES``.

    Raises:
        PlanError: the span is empty or not inside the prompt.
    """
    start, stop = span_of("span", span, error=PlanError)
    n_positions = whole_number("n_positions", n_positions, 1, MOST_POSITIONS)
    _check_compat(compat)
    if not 0 <= start < stop <= n_positions:
        raise PlanError(f"subject {start}..{stop} in a prompt of {n_positions} tokens: expected a range inside it")
    last = n_positions - 1
    middle = (start + 1, stop - 1)
    ranges = ((0, start), (start, start + 1), middle, (stop - 1, stop), (stop, stop + 1), (stop + 1, last))
    fits = np.zeros((n_positions, len(ROLES)), dtype=bool)
    for role, (first, end) in enumerate((*ranges, (last, n_positions))):
        fits[first:end, role] = True
    if compat == "rome":
        fits[:, ROLES.index("before_subject")] = False
        return fits
    last_fit = len(ROLES) - 1 - fits[:, ::-1].argmax(axis=1)
    return np.eye(len(ROLES), dtype=bool)[last_fit]


def _few(facts: int, bootstrap: int) -> tuple[str, ...]:
    """What a reader has to know of the intervals of few facts."""
    if facts == 1:
        return ("of one fact there is no interval: trace more",)
    if bootstrap and facts < FEWEST_TO_DRAW:
        return (f"bootstrap intervals are too narrow for {facts} facts (it takes {FEWEST_TO_DRAW}): read low and high",)
    return ()


def _check_compat(compat: Any) -> None:
    if compat is not None and not (isinstance(compat, str) and compat == "rome"):
        raise PlanError(f"unknown compat {shown(compat)}: leave it out, or give 'rome'")


def _checked_value(value: str | None, metric: str, compat: str | None) -> tuple[str, str]:
    _check_compat(compat)
    if not isinstance(metric, str) or metric in MEANLESS:
        raise PlanError(f"metric {shown(metric)} has no average: choose prob, logit_diff or another number")
    value = (metric if compat else "indirect_effect") if value is None else value
    if not isinstance(value, str) or value not in (metric, *EFFECTS):
        raise PlanError(f"unknown value {shown(value)}: expected one of {', '.join((metric, *EFFECTS))}")
    if compat and value != "prob":
        raise PlanError(f"value {value!r} with compat='rome': ROME's notebook averages 'prob'; leave one of them out")
    return value, metric


# What is kept of a fact: sums over its tokens, small enough for tens of thousands of facts.


@dataclass(frozen=True)
class _FactSums:
    tokens: np.ndarray  # [role]
    values: np.ndarray  # [stream, role, layer]
    squares: np.ndarray  # [stream, role, layer]
    totals: np.ndarray  # [3 + stream]
    gap: float
    divisors: np.ndarray | None = None  # [role] what the sums are divided by; None: the numbers of tokens


@dataclass
class _Gathered:
    """Sums over the facts seen so far."""

    value: str
    metric: str
    compat: str | None
    sums: list[_FactSums] = field(default_factory=list)
    first: TraceResult | None = None
    models: set[str | None] = field(default_factory=set)
    skipped: int = 0
    wrong: int = 0
    undefined: int = 0

    def add(self, record: Record) -> None:
        result = record.result
        if result is None:
            self.skipped += 1
        elif self.compat == "rome" and record.correct is False:
            self.wrong += 1
        elif self.metric not in result.metrics:
            check_metric(self.metric, (*METRICS, *result.metrics))
            self.undefined += 1
        else:
            self._add(result, record.fact.id)

    def _add(self, result: TraceResult, name: str) -> None:
        self.first = self.first or result
        _check_alike(result, self.first, name)
        self.models.add(result.metadata.get("model"))
        value = None if self.value == self.metric else "indirect_effect"
        grids = np.stack([result.grid(stream, value, metric=self.metric) for stream in result.streams])
        if not np.isfinite(grids).all():
            raise PlanError(f"fact {name!r} has cells that are not finite: trace it again, or leave it out")
        roles = token_roles(result.span, result.n_positions, self.compat).astype(float)
        with np.errstate(over="ignore", invalid="ignore"):
            values = (grids @ roles).swapaxes(1, 2)
            squares = (grids**2 @ roles).swapaxes(1, 2)
            gap = result.gap(self.metric)
            self.sums.append(_FactSums(roles.sum(axis=0), values, squares, _fact_totals(result, self.metric), gap))

    def divided(self) -> None:
        """Divides by gaps where that was asked for: each fact's effects by its own, or their sum by the gaps' sum."""
        if self.value == "normalized_effect":
            self.sums = [replace(each, divisors=each.tokens * each.gap) for each in self.sums]
        if self.value == "mean_of_ratios":
            least = SMALL_GAP * np.mean([abs(each.gap) for each in self.sums]) if self.sums else 0.0
            kept = [each for each in self.sums if abs(each.gap) >= least and each.gap]
            self.undefined += len(self.sums) - len(kept)
            self.sums = [
                replace(each, values=each.values / each.gap, squares=each.squares / each.gap**2) for each in kept
            ]

    def check(self, notes: tuple[str, ...]) -> "_Gathered":
        if not self.sums:
            counts = f"{self.skipped} skipped, {self.wrong} that the model does not know"
            found = "; ".join([f"{counts}, {self.undefined} without {self.metric} or a gap in it", *notes])
            raise PlanError(f"no fact to average ({found}): trace at least one")
        return self

    def averages(self, bootstrap: int, seed: int, notes: tuple[str, ...]) -> Averages:
        self.divided()
        facts = len(self.check(notes).sums)
        notes += _few(facts, bootstrap)
        memory_for("bootstrap", bootstrap, 16 * bootstrap * facts, "its draws")
        quiet = np.errstate(over="ignore", invalid="ignore")  # of effects over a total effect of nearly 0
        with memory_told("averaging", "lower bootstrap"), quiet:
            return self._averages(_weights(facts, bootstrap, seed), notes)

    def _averages(self, weights: np.ndarray, notes: tuple[str, ...]) -> Averages:
        assert self.first is not None
        return Averages(
            value=self.value,
            metric=self.metric,
            direction=self.first.direction,
            background=self.first.background,
            compat=self.compat,
            streams=self.first.streams,
            n_layers=self.first.n_layers,
            windows=dict(self.first.windows),
            model=next(iter(self.models)) if len(self.models) == 1 else None,
            facts=len(self.sums),
            skipped=self.skipped,
            wrong=self.wrong,
            undefined=self.undefined,
            notes=notes,
            _cells=_cell_frame(self.sums, self.first, weights),
            _totals=_totals_frame(self.sums, self.first, self.metric, weights),
        )


def _check_alike(result: TraceResult, first: TraceResult, name: str) -> None:
    for what in ("n_layers", "streams", "windows", "direction", "background"):
        found, expected = getattr(result, what), getattr(first, what)
        if found != expected:
            raise PlanError(
                f"fact {name!r} has {what} {found}, those before it {expected}: average results of one model "
                "and the same streams, and keep the others in a folder of their own"
            )


def _fact_totals(result: TraceResult, metric: str) -> np.ndarray:
    effects = [result.grid(stream, "indirect_effect", metric=metric).mean() for stream in result.streams]
    runs = [result.run_value(run, metric) for run in ("clean", "corrupted")]
    return np.array([*runs, result.gap(metric), *effects])


# Statistics of ratios: sums over facts, divided by numbers of tokens.


def _weights(facts: int, draws: int, seed: int) -> np.ndarray:
    """How often each draw of the bootstrap takes each fact, [draws, facts]."""
    random = np.random.default_rng(seed)
    return random.multinomial(facts, np.full(facts, 1 / facts), size=draws).astype(float)


def _ratios(sums: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Means with their errors; sums [fact, cell], tokens [fact] -> name -> [cell]."""
    facts, count = np.count_nonzero(tokens), tokens.sum()
    mean = sums.sum(axis=0) / count
    residuals = sums - mean * tokens[:, None]
    correction = facts / (facts - 1) if facts > 1 else np.nan
    std_error = np.sqrt(correction * (residuals**2).sum(axis=0)) / count
    reach = t_quantile(0.975, int(facts) - 1) * std_error
    low, high = mean - reach, mean + reach
    errors = {"std_error": std_error, "low": low, "high": high}
    return {"mean": mean, "facts": facts} | errors | _bootstrap(sums, tokens, weights)


def _bootstrap(sums: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    drawn_tokens = weights @ tokens
    usable = drawn_tokens != 0
    if not usable.any():
        return {"boot_low": np.nan, "boot_high": np.nan}
    means = (weights[usable] @ sums) / drawn_tokens[usable, None]
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return {"boot_low": low, "boot_high": high}


def _cell_frame(sums: list[_FactSums], first: TraceResult, weights: np.ndarray) -> pd.DataFrame:
    tokens = np.stack([fact.tokens for fact in sums])
    values = np.stack([fact.values for fact in sums])
    squares = np.sum([fact.squares for fact in sums], axis=0)
    divisors = np.stack([fact.tokens if fact.divisors is None else fact.divisors for fact in sums])
    parts = []
    for i, stream in enumerate(first.streams):
        for role in np.flatnonzero(tokens.any(axis=0)):
            count = tokens[:, role].sum()
            found = _ratios(values[:, i, role], divisors[:, role], weights)
            variance = squares[i, role] / count - found["mean"] ** 2
            pooled = np.sqrt(np.maximum(variance, 0) / count) if sums[0].divisors is None else np.nan
            cells = {"stream": stream, "role": ROLES[role], "layer": np.arange(first.n_layers)}
            cells |= {"mean": found.pop("mean"), "count": int(count), **found, "pooled_std_error": pooled}
            parts.append(pd.DataFrame(cells))
    return pd.concat(parts, ignore_index=True)


def _totals_frame(sums: list[_FactSums], first: TraceResult, metric: str, weights: np.ndarray) -> pd.DataFrame:
    totals = np.stack([fact.totals for fact in sums])
    quantities = [f"clean_{metric}", f"corrupted_{metric}", "total_effect"]
    names = {
        "quantity": quantities + ["indirect_effect"] * len(first.streams),
        "stream": np.array([None] * len(quantities) + list(first.streams), dtype=object),
    }
    return pd.DataFrame(names | _ratios(totals, np.ones(len(sums)), weights))
