"""Heat maps of a result in the look of the ROME paper: blocks on x, tokens on y, darker is more probable."""

import itertools
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fasttrace.checks import instance, path_of, whole_number
from fasttrace.errors import FasttraceError, StoreError
from fasttrace.experiment.sites import color_map, short_name
from fasttrace.files.writing import atomic_write
from fasttrace.results.result import DIRECTION, TraceResult

if TYPE_CHECKING:
    from plotnine import ggplot, theme
    from plotnine.composition import Compose

__all__ = ["PlotError", "plot_figure", "plot_stream", "save_figure"]

FORMATS = (".png", ".pdf", ".svg")
DPI = (10, 2400)
"""Fewest dots per inch of a PNG, with which letters still have some, and most: 27,000 columns for three panels."""
PANELS_PER_ROW = 3
PANEL_WIDTH = 3.8
MARGIN_HEIGHT = 1.05
TEXT_SIZE = 9
TOKEN_LENGTH = 14
LEGEND_LENGTH = 9
NAME_LENGTH = 24
LETTERS_PER_INCH = 11
MAX_TOKEN_ROWS = 120
METRIC_NAMES = {
    "log_prob": "log p",
    "logit_diff": "logit difference",
    "prob_diff": "difference of p",
    "kl": "KL from clean",
}
"""How legends call metrics; others by their own names."""

# Matplotlib's own font first; it lacks the scripts of East Asia, which the others have where installed.
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)


class PlotError(FasttraceError):
    """A figure cannot be drawn on this installation."""


def plot_stream(result: TraceResult, stream: str, metric: str | None = None) -> "ggplot":
    """Draws one stream as a heat map.

    Of prob the lightest color is the corrupted run's, as in ROME; cells below it have that color too. Of any other
    metric, and when noising, the signed effect is drawn, in two colors that meet at 0. Subject tokens carry a star.

    Args:
        result: the trace.
        stream: one of ``result.streams``.
        metric: one of ``result.metrics``; None for ``result.default_metric``.

    Returns:
        A plotnine plot, as high as its tokens need.

    Raises:
        PlanError: the stream was not traced, or the metric is unknown or a token's id.
        PlotError: plotnine is not installed.
    """
    instance("result", result, TraceResult, "Tracer.trace")
    size = _plotnine().theme(figure_size=(PANEL_WIDTH, _height(result)))
    metric = metric or result.default_metric
    return _panel(result, stream, PANEL_WIDTH, metric) + _headline(result, PANEL_WIDTH, metric) + size


def plot_figure(result: TraceResult, metric: str | None = None) -> "ggplot | Compose":
    """Draws all streams of a result as panels of one figure, three to a row.

    Args:
        result: the trace.
        metric: as of `plot_stream`.

    Returns:
        A plotnine composition (a plot when there is but one stream) with the prompt above it.

    Raises:
        PlotError: plotnine is not installed.
    """
    instance("result", result, TraceResult, "Tracer.trace")
    if len(result.streams) == 1:
        return plot_stream(result, result.streams[0], metric)
    metric = metric or result.default_metric
    columns = min(len(result.streams), PANELS_PER_ROW)
    width = columns * PANEL_WIDTH
    panels = [_panel(result, stream, width, metric) for stream in result.streams]
    panels[0] += _headline(result, width, metric)
    figure, n_rows = _arranged(panels, columns)
    return figure & _plotnine().theme(figure_size=(width, n_rows * _height(result)))


def save_figure(
    result: TraceResult,
    path: str | os.PathLike[str],
    dpi: int = 200,
    metric: str | None = None,
    stream: str | None = None,
) -> None:
    """Writes ``plot_figure`` to a file, or ``plot_stream`` of one stream, whole or not at all.

    Args:
        result: the trace.
        path: a file that ends in .png, .pdf or .svg; an existing one is replaced, its folder made.
        dpi: dots per inch of a PNG.
        metric: as of `plot_stream`.
        stream: one of ``result.streams``; None for the whole figure.

    Raises:
        PlanError: the stream was not traced, or the metric is unknown or a token's id.
        PlotError: plotnine is not installed.
        StoreError: another suffix, or the file cannot be written.
    """
    path, dpi = path_of("path", path, file=True), dots_per_inch(dpi)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise StoreError(f"cannot tell the format of {path}: give a name that ends in {', '.join(FORMATS)}")
    figure = plot_figure(result, metric) if stream is None else plot_stream(result, stream, metric)
    figure += _plotnine().theme(dpi=dpi)
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        figure.draw().savefig(temporary, format=suffix[1:])


def dots_per_inch(value: Any) -> int:
    """Dots per inch that a PNG may have.

    Raises:
        PlanError: no whole number, or outside of `DPI`.
    """
    return whole_number("dpi", value, *DPI, meaning="dots per inch")


def _plotnine() -> ModuleType:
    try:
        import plotnine
        import plotnine.composition
    except ImportError as error:
        raise PlotError(f'figures need plotnine 0.15 or newer ({error}): run pip install "fasttrace[plot]"') from error
    return plotnine


def _arranged(panels: list[Any], columns: int) -> "tuple[Compose, int]":
    composition = _plotnine().composition
    spacers = [composition.plot_spacer() for _ in range(-len(panels) % columns)]
    cells = panels + spacers
    rows = [composition.Beside(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return (rows[0] if len(rows) == 1 else composition.Stack(rows)), len(rows)


def _panel(result: TraceResult, stream: str, width: float, metric: str) -> "ggplot":
    p9 = _plotnine()
    layer, position = (index.ravel() for index in np.indices((result.n_layers, result.n_positions)))
    value = None if metric == "prob" and result.direction == DIRECTION else "indirect_effect"
    grid = result.grid(stream, value, metric=metric)
    cells = pd.DataFrame({"layer": layer, "position": position, "value": grid.ravel()})
    scale = _fill_scale(result, stream) if value is None else signed_scale(grid)
    legend = _probability_of(result, LEGEND_LENGTH) if value is None else effect_on(metric)
    return (
        p9.ggplot(cells, p9.aes("layer", "position", fill="value"))
        + p9.geom_tile(width=1, height=1)
        + _layer_scale(result)
        + _token_scale(result)
        + scale
        + p9.labs(x=_layer_title(result, stream), fill=legend)
        + _look(result, width)
    )


def _layer_scale(result: TraceResult) -> Any:
    steps = (factor * 10**power for power in range(6) for factor in (1, 2, 5))
    step = next(step for step in steps if result.n_layers <= 10 * step)
    return _plotnine().scale_x_continuous(breaks=list(range(0, result.n_layers, step)), expand=(0, 0))


def _token_scale(result: TraceResult) -> Any:
    start, stop = result.span
    step = math.ceil(result.n_positions / MAX_TOKEN_ROWS)
    breaks = list(range(0, result.n_positions, step))
    labels = [_token_label(result.tokens[i]) + "*" * (start <= i < stop) for i in breaks]
    return _plotnine().scale_y_reverse(breaks=breaks, labels=labels, expand=(0, 0))


def _fill_scale(result: TraceResult, stream: str) -> Any:
    from mizani.bounds import squish

    p9 = _plotnine()
    low = result.corrupted_prob
    high = float(np.fmax.reduce(result.grid(stream), axis=None, initial=low))
    if high == low:  # no cell above the corrupted run: all get the lightest color
        high = low + max(low * 1e-3, 1e-12)
    bar = p9.guide_colorbar(nbin=100, display="rectangles")  # a gradient is megabytes in an SVG
    options = {"limits": (low, high), "oob": squish, "labels": _number_labels, "guide": bar}
    return p9.scale_fill_cmap(color_map(stream), **options)


def effect_on(metric: str) -> str:
    """What a legend of signed effects says."""
    return f"effect on\n{METRIC_NAMES.get(metric, metric)}"


def signed_scale(values: np.ndarray) -> Any:
    """A fill scale for effects of both signs: white is 0, and both colors are as long."""
    from mizani.bounds import squish

    p9 = _plotnine()
    most = float(np.fmax.reduce(np.abs(values), axis=None, initial=0)) or 1e-12
    bar = p9.guide_colorbar(nbin=100, display="rectangles")
    return p9.scale_fill_cmap("RdBu", limits=(-most, most), oob=squish, labels=_number_labels, guide=bar)


def _number_labels(numbers: Sequence[float]) -> list[str]:
    # As few digits as place them right: an untrained model's grid spans 1e-8 around 2e-5.
    tolerance = (max(numbers, default=0) - min(numbers, default=0)) / 50
    for digits in range(2, 16):
        labels = [f"{number:.{digits}g}" for number in numbers]
        if all(abs(float(label) - n) <= tolerance for label, n in zip(labels, numbers, strict=True)):
            return labels
    return [str(number) for number in numbers]


def _look(result: TraceResult, width: float) -> "theme":
    p9 = _plotnine()
    text, blank = p9.element_text, p9.element_blank()
    gap = {"unit": "fig"}  # fractions of the figure's width, of its height as well: see plotnine's layout
    return p9.theme_gray(base_size=TEXT_SIZE / 0.8) + p9.theme(
        text=text(family=_fonts()),
        axis_text=text(color="black"),
        axis_title_x=text(size=TEXT_SIZE, margin=gap | {"t": 0.05 / width}),
        axis_title_y=blank,
        legend_box_spacing=0.1 / width,
        legend_title=text(size=TEXT_SIZE, margin=gap | {"b": 0.07 / width}),
        legend_text=text(margin=gap | {"l": 0.04 / width}),
        legend_key_width=9,
        legend_key_height=72 * min(3.0, 0.75 * (_height(result) - MARGIN_HEIGHT)),
        legend_ticks_length=0.3,
        panel_grid=blank,
        panel_background=blank,
        panel_border=p9.element_rect(fill=None, color="black", size=0.5),
        plot_margin=0.08 / width,
        plot_title=text(size=TEXT_SIZE + 1, ha="left", margin=gap | {"b": 0.04 / width}),
        plot_subtitle=text(size=TEXT_SIZE, ha="left", margin=gap | {"b": 0.1 / width}),
        plot_title_position="plot",
    )


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in FONTS if name in installed] or ["sans-serif"]


def _height(result: TraceResult) -> float:
    return MARGIN_HEIGHT + max(1.2, 0.17 * min(result.n_positions, MAX_TOKEN_ROWS))


def _layer_title(result: TraceResult, stream: str) -> str:
    window, name = result.windows[stream], short_name(stream)
    if window > 1:
        return f"center of interval of {window} {_put(result)} {name} layers"
    what = "layer" if stream == "block_output" else f"{name} layer"
    return f"single {_put(result)} {what} in {_model_name(result)}"


def _put(result: TraceResult) -> str:
    return "restored" if result.direction == DIRECTION else "corrupted"


def _model_name(result: TraceResult) -> str:
    name = re.split(r"[\\/]", str(result.metadata.get("model") or "the model").rstrip("\\/"))[-1]
    return _plain(_shortened(name, NAME_LENGTH))


def _headline(result: TraceResult, width: float, metric: str) -> Any:
    prompt = result.metadata.get("prompt")
    text = _visible((prompt if isinstance(prompt, str) else " ".join(result.tokens)).strip())
    target = _target_label(result, TOKEN_LENGTH)
    room = int(width * LETTERS_PER_INCH) - len(target) - 3
    return _plotnine().labs(
        title=f"{_plain(_shortened(text, room))} → {target}",
        subtitle=_subtitle(result, f"p({target})" if metric == "prob" else METRIC_NAMES.get(metric, metric), metric),
    )


def _subtitle(result: TraceResult, name: str, metric: str) -> str:
    clean, corrupted = (result.run_value(run, metric) for run in ("clean", "corrupted"))
    return f"{name}: {clean:.3g} clean, {corrupted:.3g} corrupted; {result.direction}"


def _probability_of(result: TraceResult, length: int) -> str:
    return f"p({_target_label(result, length)})"


def _target_label(result: TraceResult, length: int) -> str:
    return str(result.target_id) if result.target is None else _token_label(result.target, length)


def _token_label(token: str, length: int = TOKEN_LENGTH) -> str:
    word = token[1:] if token[:1] == " " and token.strip() else token
    return _plain(_shortened(_visible(word.replace(" ", "␣")), length))


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shortened(text: str, length: int) -> str:
    if sum(map(_columns, text)) <= length:
        return text
    return _start(text, length // 2) + "…" + _start(text[::-1], (length - 1) // 2)[::-1]


def _start(text: str, length: int) -> str:
    widths = itertools.accumulate(map(_columns, text))
    return text[: sum(width <= length for width in widths)]


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _plain(text: str) -> str:
    # A pair of dollar signs would be typeset as mathematics.
    return text.replace("$", r"\$")
