"""A result in words: plain text for a terminal."""

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from fasttrace.cli import tutorial

if TYPE_CHECKING:
    from fasttrace.reports.averages import Averages
    from fasttrace.results.result import TraceResult

__all__ = ["averages_text", "comparison_text", "result_text"]

TOP = 10


def result_text(result: "TraceResult", cells: int = 3) -> str:
    """The whole summary: prompt, next tokens, effects, strongest cells, cost.

    Args:
        result: the trace.
        cells: how many of the strongest cells to show per stream.
    """
    parts = [_case(result), _next_tokens(result), _effects(result), _strongest(result, cells), _cost(result)]
    return "\n\n".join(parts)


def comparison_text(result: "TraceResult", tolerance: float) -> str:
    """The tutorial's published numbers beside a result's.

    Args:
        result: a trace of the tutorial's case.
        tolerance: relative error up to which a probability agrees.
    """
    tables = [_beside_published(result, run) for run in tutorial.PUBLISHED]
    rows = [_verdict(comparison, tolerance) for comparison in tutorial.compare(result)]
    header = (
        f"p({_quoted(tutorial.CASE.target)})",
        "published",
        "found",
        "rel. error",
        f"within {tolerance:g}",
    )
    return "\n\n".join([*tables, table([header, *rows], numbers=(1, 2, 3))])


def averages_text(averages: "Averages", cells: int = 3) -> str:
    """Averages over facts: what does not depend on a role, and each stream's strongest roles and blocks.

    Args:
        averages: of a run.
        cells: how many of the strongest to show per stream.
    """
    left_out = [(averages.skipped, "skipped"), (averages.wrong, "not known"), (averages.undefined, "without effect")]
    others = "".join(f", {count} {what}" for count, what in left_out if count)
    of = "" if averages.metric == "prob" else f", {averages.metric}, {averages.direction}"
    first = "\n".join([f"{averages.facts} facts averaged{of}{others}", *(f"note: {note}" for note in averages.notes)])
    return "\n\n".join([first, _totals(averages), _roles(averages, cells)])


def _totals(averages: "Averages") -> str:
    rows = [("average", "stream", "mean", "95 % interval")]
    row: Any
    for row in averages.totals().itertuples():
        stream = row.stream if isinstance(row.stream, str) else ""
        rows.append((str(row.quantity), stream, *_mean(row)))
    return table(rows, numbers=(2,))


def _roles(averages: "Averages", cells: int) -> str:
    rows = [("stream", "role", "block", f"mean {averages.value}", "95 % interval", "tokens")]
    row: Any
    for stream in averages.streams:
        for row in averages.strongest(stream, cells).itertuples():
            rows.append((stream, str(row.role), str(row.layer), *_mean(row), str(row.count)))
    return f"roles and blocks with the {'smallest' if averages.falls else 'largest'} means\n" + table(
        rows, numbers=(2, 3, 5)
    )


def _mean(row: Any) -> tuple[str, str]:
    """A mean, and its interval with the digits that the mean has."""
    size = abs(row.mean) or max(abs(row.low), abs(row.high))
    form = ".4f" if not size or 0.001 <= size < 100_000 else ".1e"
    interval = f"{row.low:+{form}} to {row.high:+{form}}" if math.isfinite(row.low + row.high) else "-"
    return f"{row.mean:{form}}", interval


def table(rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Columns side by side, as wide as a terminal shows them.

    Args:
        rows: cells as text, the same number in every row.
        numbers: columns that are set to the right.
    """
    rows = list(rows)
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(_cells(row, widths, numbers)).rstrip() for row in rows)


def _cells(row: Sequence[str], widths: Sequence[int], numbers: Sequence[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        blank = " " * (width - _width(cell))
        yield blank + cell if column in numbers else cell + blank


def _width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def _quoted(token: str) -> str:
    """In double quotes, so that spaces show, with line breaks and control characters as escapes."""
    return json.dumps(token, ensure_ascii=False)


def _target(result: "TraceResult") -> str:
    return str(result.target_id) if result.target is None else _quoted(result.target)


def _case(result: "TraceResult") -> str:
    get = result.metadata.get
    begin, end = result.span
    subject = "".join(result.tokens[begin:end]).strip()
    prompt = get("prompt") or " ".join(map(str, result.token_ids))
    return table(
        [
            ("prompt", prompt),
            (_span_is(result), f"{_quoted(subject)} (tokens {begin} to {end - 1})"),
            ("target", _target(result)),
            *_corruption(result),
            ("model", f"{get('model')} ({result.n_layers} blocks), {get('dtype')} on {get('device')}"),
            ("engine", f"{get('engine')}: {get('engine_reason')}"),
        ]
    )


def _span_is(result: "TraceResult") -> str:
    """What the span is: of a pair without a subject, where the prompts differ."""
    return "differing" if result.metadata.get("differing") and not result.metadata.get("subject") else "subject"


def _corruption(result: "TraceResult") -> list[tuple[str, str]]:
    """What the corrupted runs are."""
    get = result.metadata.get
    if "counterfactual_tokens" not in result.metadata:
        noise = f"{get('noise')} (sigma {_number(get('sigma'))})"
        return [("noise", f"{noise}, samples: {get('samples')}, seed: {get('seed')}")]
    rows = []
    for others in result.metadata["counterfactual_tokens"]:
        places = [place for place in get("differing", ()) if others[place] != result.tokens[place]]
        changed = ", ".join(f"{place}: {_quoted(result.tokens[place])} -> {_quoted(others[place])}" for place in places)
        rows.append(("counterfactual", f"{''.join(others).strip()} ({changed or 'equal to the prompt'})"))
    return [*rows, *([("foil", _quoted(str(get("foil"))))] if get("foil") else [])]


def _next_tokens(result: "TraceResult") -> str:
    clean, corrupted = (_top(result, run) for run in ("clean", "corrupted"))
    pairs = zip_longest(clean, corrupted, fillvalue=("", ""))
    rows = [(*left, " ", *right) for left, right in pairs]
    return "most probable next tokens\n" + table([("clean run", "", " ", "corrupted run", ""), *rows], numbers=(1, 4))


def _top(result: "TraceResult", run: str) -> list[tuple[str, str]]:
    frame = result.top_tokens(run, n=min(TOP, len(result.top[run])))
    return [(_quoted(token), _number(prob)) for token, prob in zip(frame["token"], frame["prob"], strict=True)]


def _effects(result: "TraceResult") -> str:
    shown = dict.fromkeys(["prob", result.default_metric])
    rows = [
        ("", *(_measured(result, metric) for metric in shown)),
        ("clean run", *(_number(result.run_value("clean", metric)) for metric in shown)),
        ("corrupted run", *(_number(result.run_value("corrupted", metric)) for metric in shown)),
        ("total effect", *(f"{_total_effect(result, metric):+.4f}" for metric in shown)),
    ]
    return "effects\n" + table(rows, numbers=range(1, 1 + len(shown)))


def _total_effect(result: "TraceResult", metric: str) -> float:
    return result.run_value("clean", metric) - result.run_value("corrupted", metric)


def _measured(result: "TraceResult", metric: str) -> str:
    """What a metric is of, for a heading: a probability, or the difference of two tokens' logits."""
    target = _target(result)
    return (
        f"p({target})" if metric == "prob" else f"logit({target}) - logit({_quoted(str(result.metadata.get('foil')))})"
    )


def _strongest(result: "TraceResult", cells: int) -> str:
    metric = result.default_metric
    rows = [
        ("stream", "block", "position", "token", "p" if metric == "prob" else "logit difference", "indirect effect")
    ]
    for stream in result.streams:
        rows += [
            _cell_row(stream, cell, metric) for cell in result.strongest(stream, cells, metric=metric).itertuples()
        ]
    do = "take away" if result.direction == "noising" else "bring back"
    return f"cells that {do} most of {_measured(result, metric)}\n" + table(rows, numbers=(1, 2, 4, 5))


def _cell_row(stream: str, cell: Any, metric: str) -> tuple[str, ...]:
    effect = f"{cell.indirect_effect:+.4f}"
    return stream, str(cell.layer), str(cell.position), _quoted(cell.token), _number(getattr(cell, metric)), effect


def _cost(result: "TraceResult") -> str:
    cost = result.cost
    saving = cost.full_token_blocks / cost.token_blocks if cost.token_blocks else float("inf")
    return (
        f"cost: {cost.rows:,} restored rows, {cost.token_blocks:,.0f} token-blocks; one full row per cell "
        f"would be {cost.full_token_blocks:,.0f}, {saving:.1f} times as many; "
        f"{cost.flops / 1e9:,.0f} GFLOP in all"
    )


def _beside_published(result: "TraceResult", run: str) -> str:
    published = [(_quoted(token), _number(prob)) for token, prob in tutorial.PUBLISHED[run]]
    pairs = zip_longest(published, _top(result, run), fillvalue=("", ""))
    rows = [(*left, " ", *right) for left, right in pairs]
    return f"{run} run, most probable next tokens\n" + table(
        [("published", "", " ", "found", ""), *rows], numbers=(1, 4)
    )


def _verdict(comparison: tutorial.Comparison, tolerance: float) -> tuple[str, ...]:
    error = comparison.relative_error
    numbers = (f"{comparison.published:.6f}", f"{comparison.found:.6f}", f"{error:.1e}")
    return comparison.run, *numbers, "yes" if error <= tolerance else "no"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.1e}"
