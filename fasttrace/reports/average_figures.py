"""Figures of averages: the ROME paper's heat maps of role by block, and lines with their 95 % bands."""

import math
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fasttrace.checks import instance, path_of, shown
from fasttrace.errors import PlanError, StoreError
from fasttrace.experiment.sites import color_map, short_name
from fasttrace.files.writing import atomic_write
from fasttrace.reports.averages import Averages
from fasttrace.results import figure as plots

if TYPE_CHECKING:
    from plotnine import ggplot, theme
    from plotnine.composition import Compose

__all__ = [
    "ROLE_COLORS",
    "ROLE_NAMES",
    "VALUE_NAMES",
    "layer_title",
    "lowest",
    "plot_lines",
    "plot_roles",
    "save_lines",
    "save_roles",
]

ROLE_NAMES = {
    "before_subject": "Tokens before subject",
    "first_subject": "First subject token",
    "middle_subject": "Middle subject tokens",
    "last_subject": "Last subject token",
    "first_subsequent": "First subsequent token",
    "further": "Further tokens",
    "last": "Last token",
}
# Okabe and Ito's colors, which people with any color vision tell apart.
ROLE_COLORS = {
    "before_subject": "#999999",
    "first_subject": "#56B4E9",
    "middle_subject": "#0072B2",
    "last_subject": "#D55E00",
    "first_subsequent": "#CC79A7",
    "further": "#009E73",
    "last": "#E69F00",
}
VALUE_NAMES = {
    "prob": "Average probability of the answer",
    "indirect_effect": "Average indirect effect",
    "normalized_effect": "Average normalized effect",
    "mean_of_ratios": "Average of normalized effects",
}
LEGENDS = {"prob": "p(answer)", "indirect_effect": "AIE", "normalized_effect": "IE / TE", "mean_of_ratios": "IE / TE"}
PANEL_WIDTH = 4.4
PANEL_HEIGHT = 2.45
LINES_WIDTH = 4.0
LINES_HEIGHT = 3.0
LINES_MARGIN = 1.2


def plot_roles(averages: Averages, stream: str | None = None) -> "ggplot | Compose":
    """Draws heat maps of role by block, as the ROME paper's figure 2 has them.

    The lightest color is what a cell that restores nothing would have: an effect of 0, or the mean
    probability of the corrupted runs. Means below it have that color too.

    Args:
        averages: what `fasttrace.reports.averages.average` gave.
        stream: one of ``averages.streams``; None for all of them side by side, three to a row.

    Returns:
        A plotnine plot, or a composition when there are several.

    Raises:
        PlanError: the stream was not traced.
        PlotError: plotnine is not installed.
    """
    instance("averages", averages, Averages, "average")
    streams = averages.streams if stream is None else (_known(averages, stream),)
    columns = min(len(streams), plots.PANELS_PER_ROW)
    width = columns * PANEL_WIDTH
    panels = [_panel(averages, name, width) for name in streams]
    panels[0] += _headline(averages)
    if len(panels) == 1:
        return panels[0] + _size(PANEL_WIDTH, PANEL_HEIGHT)
    figure, n_rows = plots._arranged(panels, columns)
    return figure & _size(width, n_rows * PANEL_HEIGHT)


def plot_lines(averages: Averages) -> "ggplot":
    """Draws a line over the blocks for each role, in a panel per stream, with bands of 95 % intervals.

    All panels have one scale, so that streams can be compared. The dotted line is what restoring nothing gives.

    Args:
        averages: what `fasttrace.reports.averages.average` gave.

    Returns:
        A plotnine plot.

    Raises:
        PlotError: plotnine is not installed.
    """
    instance("averages", averages, Averages, "average")
    p9 = plots._plotnine()
    cells = _line_frame(averages)
    columns = min(len(averages.streams), plots.PANELS_PER_ROW)
    rows = math.ceil(len(averages.streams) / columns)
    width = max(columns * LINES_WIDTH, 6.0)  # the legend needs that much
    colors = [ROLE_COLORS[role] for role in averages.roles]
    return (
        p9.ggplot(cells, p9.aes("layer", "mean", color="role", fill="role"))
        + p9.geom_hline(yintercept=lowest(averages), linetype="dotted", size=0.5)
        + p9.geom_ribbon(p9.aes(ymin="low", ymax="high"), data=cells.dropna(), alpha=0.2, color="none")
        + (p9.geom_point(size=2) if averages.n_layers == 1 else p9.geom_line(size=0.8))
        + p9.facet_wrap("panel", ncol=columns)
        + p9.scale_color_manual(values=colors)
        + p9.scale_fill_manual(values=colors)
        + _layer_scale(averages, margin=0.02)
        + p9.labs(x="block", y=legend(averages), color="", fill="")
        + _headline(averages)
        + _look(width)
        + p9.theme(legend_position="bottom", panel_spacing=0.25 / width, axis_title_y=p9.element_text(size=9))
        + _size(width, rows * LINES_HEIGHT + LINES_MARGIN)
    )


def save_roles(averages: Averages, path: str | os.PathLike[str], stream: str | None = None, dpi: int = 200) -> None:
    """Writes `plot_roles` to a file, whole or not at all.

    Args:
        averages: what `fasttrace.reports.averages.average` gave.
        path: a file that ends in .png, .pdf or .svg; an existing one is replaced, its folder made.
        stream: one of ``averages.streams``; None for all.
        dpi: dots per inch of a PNG.

    Raises:
        PlanError: the stream was not traced.
        PlotError: plotnine is not installed.
        StoreError: another suffix, or the file cannot be written.
    """
    where, dpi = path_of("path", path, file=True), plots.dots_per_inch(dpi)
    suffix = _format(where)
    _save(plot_roles(averages, stream), where, suffix, dpi)


def save_lines(averages: Averages, path: str | os.PathLike[str], dpi: int = 200) -> None:
    """Writes `plot_lines` to a file, whole or not at all.

    Args:
        averages: what `fasttrace.reports.averages.average` gave.
        path: a file that ends in .png, .pdf or .svg; an existing one is replaced, its folder made.
        dpi: dots per inch of a PNG.

    Raises:
        PlotError: plotnine is not installed.
        StoreError: another suffix, or the file cannot be written.
    """
    where, dpi = path_of("path", path, file=True), plots.dots_per_inch(dpi)
    suffix = _format(where)
    _save(plot_lines(averages), where, suffix, dpi)


def lowest(averages: Averages) -> float:
    """Gives the value that restoring nothing has: 0 for effects, else the mean of the corrupted runs.

    Args:
        averages: what `fasttrace.reports.averages.average` gave.
    """
    if averages.value != averages.metric:
        return 0.0
    return float(_total(averages, f"{averages.background}_{averages.metric}")["mean"])


def legend(averages: Averages) -> str:
    """What a color or an axis stands for.

    Args:
        averages: what `fasttrace.reports.averages.average` gave.
    """
    name = plots.METRIC_NAMES.get(averages.metric, averages.metric)
    if averages.value == averages.metric:
        return LEGENDS.get(averages.metric, name)
    return LEGENDS[averages.value] if averages.metric == "prob" else f"{LEGENDS[averages.value]},\n{name}"


def _value_name(averages: Averages) -> str:
    name = plots.METRIC_NAMES.get(averages.metric, averages.metric)
    if averages.value == averages.metric:
        return VALUE_NAMES.get(averages.metric, f"Average {name}")
    return VALUE_NAMES[averages.value] + ("" if averages.metric == "prob" else f" on {name}")


def layer_title(stream: str, window: int) -> str:
    """Says what was restored at the block that an axis shows.

    Args:
        stream: name of the stream.
        window: how many blocks were restored together.
    """
    name = short_name(stream)
    if window > 1:
        return f"center of interval of {window} restored {name} layers"
    return "single restored layer" if stream == "block_output" else f"single restored {name} layer"


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in plots.FORMATS:
        raise StoreError(f"cannot tell the format of {path}: give a name that ends in {', '.join(plots.FORMATS)}")
    return suffix[1:]


def _save(figure: Any, path: Path, suffix: str, dpi: int) -> None:
    figure = figure + plots._plotnine().theme(dpi=dpi)
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.draw().savefig(temporary, format=suffix)


def _known(averages: Averages, stream: str) -> str:
    if not isinstance(stream, str) or stream not in averages.streams:
        raise PlanError(f"unknown stream {shown(stream)}: these averages have {', '.join(averages.streams)}")
    return stream


def _panel(averages: Averages, stream: str, width: float) -> Any:
    p9 = plots._plotnine()
    cells: Any = averages.to_frame()
    cells = cells[cells["stream"] == stream]
    rows = {role: row for row, role in enumerate(averages.roles)}
    cells = cells.assign(row=cells["role"].map(rows))
    labels = [ROLE_NAMES[role] for role in averages.roles]
    title = layer_title(stream, averages.windows[stream])
    return (
        p9.ggplot(cells, p9.aes("layer", "row", fill="mean"))
        + p9.geom_tile(width=1, height=1)
        + _layer_scale(averages)
        + p9.scale_y_reverse(breaks=list(rows.values()), labels=labels, expand=(0, 0))
        + _fill_scale(averages, stream, cells["mean"].to_numpy())
        + p9.labs(x=title, y="", fill=legend(averages))
        + _look(width)
        + p9.theme(axis_title_y=p9.element_blank(), legend_key_width=9, legend_key_height=72 * 0.9)
    )


def _fill_scale(averages: Averages, stream: str, means: np.ndarray) -> Any:
    from mizani.bounds import squish

    if averages.metric != "prob" and averages.value != averages.metric:
        return plots.signed_scale(means)
    high = float(means.max())

    p9 = plots._plotnine()
    low = lowest(averages)
    if high <= low:  # nothing above what restoring nothing gives: all get the lightest color
        high = low + max(abs(low) * 1e-3, 1e-12)
    bar = p9.guide_colorbar(nbin=100, display="rectangles")  # a gradient is megabytes in an SVG
    options = {"limits": (low, high), "oob": squish, "labels": plots._number_labels, "guide": bar}
    return p9.scale_fill_cmap(color_map(stream), **options)


def _layer_scale(averages: Averages, margin: float = 0) -> Any:
    steps = (factor * 10**power for power in range(6) for factor in (1, 2, 5))
    step = next(step for step in steps if averages.n_layers <= 10 * step)
    breaks = list(range(0, averages.n_layers, step))
    return plots._plotnine().scale_x_continuous(breaks=breaks, expand=(margin, 0))


def _line_frame(averages: Averages) -> pd.DataFrame:
    cells: Any = averages.to_frame()[["stream", "role", "layer", "mean", "low", "high"]]
    titles = {stream: layer_title(stream, averages.windows[stream]) for stream in averages.streams}
    names = [ROLE_NAMES[role] for role in averages.roles]
    return cells.assign(
        panel=pd.Categorical(cells["stream"].map(titles), list(dict.fromkeys(titles.values()))),
        role=pd.Categorical(cells["role"].map(ROLE_NAMES), names),
    )


def _headline(averages: Averages) -> Any:
    noun = "fact" if averages.facts == 1 else "facts"
    name = re.split(r"[\\/]", averages.model.rstrip("\\/"))[-1] if averages.model else ""
    where = f" in {plots._plain(plots._shortened(name, plots.NAME_LENGTH))}" if name else ""
    metric = averages.metric
    clean, corrupted, total = (
        _total(averages, name) for name in (f"clean_{metric}", f"corrupted_{metric}", "total_effect")
    )
    name_of = "p" if metric == "prob" else plots.METRIC_NAMES.get(metric, metric)
    effect = f"total effect {total['mean']:.3g}"
    if not math.isnan(total["low"]):
        effect += f" [{total['low']:.3g}, {total['high']:.3g}]"
    return plots._plotnine().labs(
        title=f"{_value_name(averages)}, {averages.facts:,} {noun}{where}",
        subtitle=f"{name_of}: {clean['mean']:.3g} clean, {corrupted['mean']:.3g} corrupted; {effect}; "
        f"{averages.direction}",
    )


def _total(averages: Averages, quantity: str) -> Any:
    return averages.totals().set_index("quantity").loc[quantity]


def _size(width: float, height: float) -> "theme":
    return plots._plotnine().theme(figure_size=(width, height))


def _look(width: float) -> "theme":
    p9 = plots._plotnine()
    text, blank = p9.element_text, p9.element_blank()
    gap = {"unit": "fig"}  # fractions of the figure's width, of its height as well: see plotnine's layout
    return p9.theme_gray(base_size=plots.TEXT_SIZE / 0.8) + p9.theme(
        text=text(family=plots._fonts()),
        axis_text=text(color="black"),
        axis_title_x=text(size=plots.TEXT_SIZE, margin=gap | {"t": 0.05 / width}),
        legend_box_spacing=0.1 / width,
        legend_title=text(size=plots.TEXT_SIZE, margin=gap | {"b": 0.07 / width}),
        legend_text=text(margin=gap | {"l": 0.04 / width}),
        legend_ticks_length=0.3,
        legend_key=blank,
        panel_grid=blank,
        panel_background=blank,
        panel_border=p9.element_rect(fill=None, color="black", size=0.5),
        strip_background=blank,
        strip_text=text(size=plots.TEXT_SIZE),
        plot_margin=0.08 / width,
        plot_title=text(size=plots.TEXT_SIZE + 1, ha="left", margin=gap | {"b": 0.04 / width}),
        plot_subtitle=text(size=plots.TEXT_SIZE, ha="left", margin=gap | {"b": 0.1 / width}),
        plot_title_position="plot",
    )
