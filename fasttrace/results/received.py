"""What a result that was read from a file may hold."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fasttrace.experiment.cells import SITES
from fasttrace.files.received import LARGEST, expect

if TYPE_CHECKING:
    from fasttrace.results.result import TraceResult


def check_streams(streams: Iterable[Any]) -> None:
    """Refuses streams that fasttrace does not know: files, columns and folders are named by them.

    Raises:
        ValueError: one is not a site, or comes twice.
    """
    streams = list(streams)
    for stream in streams:
        expect(stream in SITES, f"unknown stream {stream!r}, expected one of {', '.join(SITES)}")
    expect(len(set(streams)) == len(streams), f"a stream twice in {streams}")


def check_result(result: "TraceResult") -> None:
    """Refuses a result that was read from a file and that no trace can have.

    Numbers of grids are not looked at: they may be anything, NaN included.

    Raises:
        ValueError: it says which field has what.
    """
    check_streams(result.streams)
    check_streams(result.windows)
    missing = set(result.streams) - set(result.windows)
    expect(not missing, f"no window for {', '.join(sorted(missing))}")
    expect(all(0 < width < LARGEST for width in result.windows.values()), f"windows {result.windows!r}: expected >= 1")
    expect(result.n_layers > 0 and result.n_positions > 0, "a grid without cells")
    expect(all(isinstance(token, str) for token in result.tokens), "tokens that are no text")
    expect(all(0 <= number < LARGEST for number in result.token_ids), "token ids below 0 or too large")
    expect(0 <= result.target_id < LARGEST, f"target id {result.target_id}")
    expect(result.target is None or isinstance(result.target, str), f"target {result.target!r}: expected text")
    inside = len(result.span) == 2 and 0 <= result.span[0] < result.span[1] <= result.n_positions
    expect(inside, f"subject {result.span} in a prompt of {result.n_positions} tokens")
    expect(set(result.top) == {"clean", "corrupted"}, f"next tokens of {list(result.top)!r}")
    for name, number in vars(result.cost).items():
        expect(_is_count(number), f"cost {name} {number!r}: expected a number >= 0")
    _check_metadata(result.metadata)


def _is_count(number: Any) -> bool:
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    return plain and number >= 0 and math.isfinite(float(number))


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    for name in ("model", "prompt", "subject"):
        value = metadata.get(name)
        expect(value is None or isinstance(value, str), f"{name} {value!r}: expected text")
