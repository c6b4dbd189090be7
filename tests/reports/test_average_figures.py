import io
import itertools
import os
import sys
import warnings

import numpy as np
import pytest

from fasttrace.errors import FasttraceError, PlanError, StoreError
from fasttrace.reports.averages import average

pytest.importorskip("plotnine")

import matplotlib
from matplotlib import pyplot
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from plotnine import ggplot
from plotnine.composition import Compose

from fasttrace.reports import average_figures as average_plots
from tests.helpers.averaged import STREAMS, facts, make_result, record

FOUR = {"block_output": 1, "mlp_activation": 10, "attention_output": 10, "query_output": 1}


def averaged(records=None, **options):
    return average(facts() if records is None else records, **{"bootstrap": 0, **options})


def flat(prob, **options):
    grids = {stream: np.full((4, 7), prob) for stream in STREAMS}
    records = [record(make_result(prob=grids, clean_prob=0.5, corrupted_prob=0.25))]
    return averaged(records, **options)


def drawn(plot):
    figure = plot.draw()
    figure.savefig(io.BytesIO())  # lays the texts out
    return figure


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def words(figure):
    return [text.get_text() for text in texts(figure)]


def tile_colors(figure):
    return figure.axes[0].findobj(PolyCollection)[0].get_facecolor()[:, :3]


def test_a_panel_names_roles_blocks_and_what_was_averaged():
    found = words(drawn(average_plots.plot_roles(averaged(), "mlp_activation")))
    assert found.index("Tokens before subject") < found.index("Last subject token") < found.index("Last token")
    assert "center of interval of 10 restored mlp layers" in found
    assert "AIE" in found
    assert "Average indirect effect, 20 facts in gpt2-xl" in found
    assert any("total effect" in word and "corrupted" in word and "[" in word for word in found)


def test_roles_that_no_token_has_are_not_drawn():
    labels = words(drawn(average_plots.plot_roles(averaged(compat="rome"), "block_output")))
    assert "Tokens before subject" not in labels
    assert "p(answer)" in labels


def test_all_streams_are_panels_under_one_headline():
    figure = drawn(average_plots.plot_roles(averaged()))
    found = words(figure)
    assert sum(word.startswith(("single restored", "center of interval")) for word in found) == 3
    assert sum(word.startswith("Average indirect effect") for word in found) == 1


def test_the_first_role_is_on_top_and_the_last_block_on_the_right():
    grid = np.zeros((4, 7))
    grid[3, 0] = 1
    result = make_result(prob={"block_output": grid}, streams=("block_output",), corrupted_prob=0.0)
    figure = drawn(average_plots.plot_roles(averaged([record(result)]), "block_output"))
    axes = figure.axes[0]
    darkest = tile_colors(figure).sum(axis=1).argmin()
    corners = axes.findobj(PolyCollection)[0].get_paths()[darkest].vertices
    x, y = axes.transAxes.inverted().transform(axes.transData.transform(corners).mean(axis=0))
    assert x > 0.7
    assert y > 0.7


@pytest.mark.parametrize(
    ("stream", "color_map"), [("block_output", "Purples"), ("mlp_activation", "Greens"), ("attention_output", "Reds")]
)
def test_colors_run_from_no_effect_to_the_largest_mean(stream, color_map):
    averages = averaged()
    colors = tile_colors(drawn(average_plots.plot_roles(averages, stream)))
    frame = averages.to_frame()
    means = frame[frame["stream"] == stream]["mean"].to_numpy()
    scale = matplotlib.colormaps[color_map]
    np.testing.assert_allclose(colors[means.argmax()], to_rgb(scale(1.0)), atol=0.01)
    share = means.min() / means.max()
    np.testing.assert_allclose(colors[means.argmin()], to_rgb(scale(max(share, 0))), atol=0.02)


@pytest.mark.parametrize("prob", [0.25, 0.1])
@pytest.mark.parametrize("options", [{}, {"compat": "rome"}])
def test_means_no_higher_than_restoring_nothing_are_drawn_in_one_color(prob, options):
    colors = tile_colors(drawn(average_plots.plot_roles(flat(prob, **options), "block_output")))
    np.testing.assert_allclose(colors, [matplotlib.colormaps["Purples"](0.0)[:3]] * len(colors), atol=0.01)


def test_restoring_nothing_is_an_effect_of_0_or_the_corrupted_probability():
    assert average_plots.lowest(flat(0.3)) == 0
    assert average_plots.lowest(flat(0.3, value="normalized_effect")) == 0
    assert average_plots.lowest(flat(0.3, value="prob")) == 0.25


def test_lines_have_a_panel_per_stream_one_scale_and_a_legend_of_roles():
    figure = drawn(average_plots.plot_lines(averaged()))
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == 3
    assert len({axes.get_ylim() for axes in panels}) == 1
    assert set(average_plots.ROLE_NAMES.values()) <= set(words(figure))


def test_lines_pass_through_the_means_and_bands_through_the_interval():
    averages = averaged(facts())
    axes = drawn(average_plots.plot_lines(averages)).axes[0]
    frame = averages.to_frame()
    cells = frame[(frame["stream"] == "block_output") & (frame["role"] == "last")]
    color = to_rgb(average_plots.ROLE_COLORS["last"])
    line = next(line for line in axes.lines if np.allclose(to_rgb(line.get_color()), color))
    np.testing.assert_allclose(line.get_ydata(), cells["mean"])
    bands = [band for band in axes.findobj(PolyCollection) if np.allclose(band.get_facecolor()[0, :3], color)]
    heights = bands[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((cells["low"].min(), cells["high"].max()))


@pytest.mark.parametrize("n_layers", [1, 4])
@pytest.mark.filterwarnings("error")
def test_one_fact_is_drawn_without_a_band_and_without_a_warning(n_layers):
    averages = averaged([record(make_result(n_layers=n_layers))])
    found = words(drawn(average_plots.plot_lines(averages)))
    assert "Average indirect effect, 1 fact in gpt2-xl" in found
    assert not any("[" in word for word in found)
    drawn(average_plots.plot_roles(averages))


def four_streams():
    grids = dict.fromkeys(FOUR, np.random.default_rng(0).random((48, 9)))
    spans = [(1, 4), (0, 1)]
    metadata = {"model": "HuggingFaceTB/SmolLM2-1.7B-Instruct-of-a-long-name"}
    changes = {"prob": grids, "prob_std": grids, "windows": FOUR, "metadata": metadata}
    return [record(make_result(span, 9, **changes)) for span in spans]


@pytest.mark.parametrize("records", [facts(), facts()[:1], four_streams()], ids=["three", "one fact", "four streams"])
@pytest.mark.parametrize("plot", [average_plots.plot_roles, average_plots.plot_lines])
def test_every_text_is_inside_the_figure_and_clear_of_the_others(plot, records):
    figure = drawn(plot(averaged(records)))
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure)]
    for word, box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, word
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, word
    overlapping = [
        (one, other)
        for (one, box), (other, its_box) in itertools.combinations(boxes, 2)
        if box.padded(-1.5).overlaps(its_box.padded(-1.5))
    ]
    assert overlapping == []


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
@pytest.mark.parametrize("save", [average_plots.save_roles, average_plots.save_lines])
def test_figures_are_saved_in_the_format_of_their_suffix(tmp_path, save, suffix):
    path = tmp_path / "new" / f"figure{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(averaged(), path, dpi=50)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF", b"<?xm")
    assert os.listdir(path.parent) == [path.name]
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("save", [average_plots.save_roles, average_plots.save_lines])
def test_an_unknown_suffix_is_refused(tmp_path, save):
    with pytest.raises(StoreError, match=r"cannot tell the format of .*figure.txt: .* \.png, \.pdf, \.svg"):
        save(averaged(), tmp_path / "figure.txt")
    assert os.listdir(tmp_path) == []


def test_an_unknown_stream_is_refused_with_the_known_names():
    with pytest.raises(PlanError, match="unknown stream 'mlp': these averages have block_output, mlp_activation"):
        average_plots.plot_roles(averaged(), "mlp")


def test_without_plotnine_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotnine", None)
    for draw in (average_plots.plot_roles, average_plots.plot_lines):
        with pytest.raises(FasttraceError, match=r'pip install "fasttrace\[plot\]"'):
            draw(averaged())


def test_plots_can_be_restyled_by_their_owner():
    assert isinstance(average_plots.plot_roles(averaged(), "block_output"), ggplot)
    assert isinstance(average_plots.plot_roles(averaged()), Compose)
    assert isinstance(average_plots.plot_lines(averaged()), ggplot)
