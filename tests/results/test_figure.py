import io
import itertools
import os
import struct
import sys
import warnings

import numpy as np
import pytest

from fasttrace.errors import FasttraceError, PlanError, StoreError
from fasttrace.planning.cost import Cost
from fasttrace.results.result import TraceResult

pytest.importorskip("plotnine")

import matplotlib
from matplotlib import pyplot
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from plotnine import ggplot, labs
from plotnine.composition import Compose

from fasttrace.results import figure as plots

STREAMS = ("block_output", "mlp_activation", "attention_output")
SPACE_NEEDLE = ("The", " Space", " Need", "le", " is", " in", " downtown")
AWKWARD = (
    "<bos>",
    " $x$",
    "$",
    "\n",
    "  ",
    "",
    "\x00",
    "👍",
    " 東京",
    "العربية",
    "%",
    "{a}",
    "\\",
    "the",
    "the",
)


def make_result(tokens=SPACE_NEEDLE, n_layers=4, streams=STREAMS, **changes):
    random = np.random.default_rng(0)
    grids = {stream: random.random((n_layers, len(tokens))) for stream in streams}
    fields = {
        "prob": grids,
        "prob_std": grids,
        "clean_prob": 0.97638,
        "corrupted_prob": 0.26,
        "corrupted_std": 0.0,
        "tokens": tuple(tokens),
        "token_ids": tuple(range(len(tokens))),
        "span": (0, min(4, len(tokens))),
        "target": " Seattle",
        "target_id": 7312,
        "top": {},
        "windows": {stream: 1 if stream == "block_output" else 10 for stream in streams},
        "cost": Cost(0, 0.0, 0.0, 0),
        "metadata": {"model": "openai-community/gpt2-xl", "prompt": "".join(tokens)},
    }
    return TraceResult(**{**fields, **changes})


def drawn(plot):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        figure = plot.draw()
        figure.savefig(io.BytesIO())  # lays the texts out
    return figure


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def words(figure):
    return [text.get_text() for text in texts(figure)]


def token_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def tile_colors(figure):
    return figure.axes[0].findobj(PolyCollection)[0].get_facecolor()[:, :3]


def test_a_panel_names_layers_tokens_and_answer_as_the_tutorial_does():
    figure = drawn(plots.plot_stream(make_result(), "mlp_activation"))
    assert token_labels(figure) == ["The*", "Space*", "Need*", "le*", "is", "in", "downtown"]
    found = words(figure)
    assert "center of interval of 10 restored mlp layers" in found
    assert "p(Seattle)" in found
    assert "The Space Needle is in downtown → Seattle" in found
    assert "p(Seattle): 0.976 clean, 0.26 corrupted; denoising" in found


@pytest.mark.parametrize(
    ("stream", "window", "title"),
    [
        ("block_output", 1, "single restored layer in gpt2-xl"),
        ("mlp_output", 1, "single restored mlp layer in gpt2-xl"),
        ("attention_output", 3, "center of interval of 3 restored attn layers"),
        ("query_output", 10, "center of interval of 10 restored query_output layers"),
    ],
)
def test_the_layer_axis_says_what_was_restored(stream, window, title):
    result = make_result(streams=(stream,), windows={stream: window})
    assert plots.plot_stream(result, stream).labels.x == title


def test_layers_run_to_the_right_and_positions_down_from_the_first_token():
    grid = np.zeros((3, 2))
    grid[2, 0] = 1
    result = make_result(SPACE_NEEDLE[:2], prob={"block_output": grid}, prob_std={"block_output": grid})
    axes = drawn(plots.plot_stream(result, "block_output")).axes[0]
    darkest = tile_colors(axes.figure).sum(axis=1).argmin()
    corners = axes.findobj(lambda artist: hasattr(artist, "get_paths"))[0].get_paths()[darkest].vertices
    x, y = axes.transData.transform(corners).mean(axis=0)
    left, top = axes.transAxes.transform((2 / 3, 0.5))
    assert x > left
    assert y > top


@pytest.mark.parametrize(
    ("stream", "color_map"),
    [
        ("block_output", "Purples"),
        ("mlp_activation", "Greens"),
        ("mlp_output", "Greens"),
        ("attention_output", "Reds"),
        ("value_output", "Blues"),
    ],
)
def test_each_stream_has_its_color_from_the_corrupted_to_the_largest_probability(stream, color_map):
    result = make_result(streams=(stream,))
    colors = tile_colors(drawn(plots.plot_stream(result, stream)))
    grid = result.grid(stream).ravel()
    scale = matplotlib.colormaps[color_map]
    np.testing.assert_allclose(colors[grid.argmax()], to_rgb(scale(1.0)), atol=0.01)
    assert (grid < 0.26).any()
    np.testing.assert_allclose(colors[grid <= 0.26], [to_rgb(scale(0.0))] * (grid <= 0.26).sum(), atol=0.01)


@pytest.mark.parametrize("value", [0.26, 0.1, np.nan])
def test_a_grid_with_nothing_above_the_corrupted_run_is_drawn_in_one_color(value):
    grid = {"block_output": np.full((3, 7), value)}
    figure = drawn(plots.plot_stream(make_result(prob=grid, prob_std=grid), "block_output"))
    lightest = matplotlib.colormaps["Purples"](0.0)[:3]
    color = (0.5, 0.5, 0.5) if np.isnan(value) else lightest
    np.testing.assert_allclose(tile_colors(figure), [color] * 21, atol=0.01)


@pytest.mark.parametrize(
    ("numbers", "labels"),
    [
        ([0.25, 0.5, 0.75], ["0.25", "0.5", "0.75"]),
        ([2.00025e-5, 2.0005e-5], ["2.00025e-05", "2.0005e-05"]),
        ([0.9990000, 0.9990005], ["0.999", "0.9990005"]),
        ([0.5], ["0.5"]),
        ([], []),
    ],
)
def test_numbers_at_the_color_bar_have_the_digits_that_place_them(numbers, labels):
    assert plots._number_labels(numbers) == labels


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" Tower", "Tower"),
        (" ", "␣"),
        ("  ", "␣␣"),
        ("  a b", "␣a␣b"),
        ("\n", r"\n"),
        ("\t\x00", r"\t\x00"),
        ("\u200d", r"\u200d"),
        ("$5", r"\$5"),
        ("", ""),
        ("Constantinopolitan", "Constan…olitan"),
        ("東京タワーは東京都", "東京タ…東京都"),
    ],
)
def test_token_labels_show_what_is_invisible_and_are_short(token, label):
    assert plots._token_label(token) == label


@pytest.mark.parametrize(("n_layers", "last"), [(1, 0), (4, 3), (12, 10), (30, 25), (48, 45), (126, 120)])
def test_the_layer_axis_has_at_most_ten_numbers(n_layers, last):
    breaks = plots._layer_scale(make_result(n_layers=n_layers)).breaks
    assert len(breaks) <= 10
    assert breaks[-1] == last


LONG = ("<|im_start|>", *(f" Constantinopolitan{i}" * (i % 5 == 0) or f" word{i}" for i in range(24)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "n_layers", "streams"),
    [
        (SPACE_NEEDLE, 48, STREAMS),
        (LONG, 30, STREAMS),
        (("Paris",), 4, STREAMS),
        (AWKWARD, 12, ("block_output", "mlp_output", "attention_output", "query_output")),
        (tuple(f" t{i}" for i in range(150)), 12, ("block_output",)),
    ],
)
def test_every_text_is_large_enough_inside_the_figure_and_clear_of_the_others(tokens, n_layers, streams):
    metadata = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "prompt": "".join(tokens)}
    result = make_result(tokens, n_layers, streams, target=" Constantinople", metadata=metadata)
    figure = drawn(plots.plot_figure(result))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        boxes = [text.get_window_extent() for text in texts(figure)]
    assert len(boxes) > len(streams) * 3
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
    overlapping = [
        (one.get_text(), other.get_text())
        for (one, box), (other, its_box) in itertools.combinations(zip(texts(figure), boxes, strict=True), 2)
        if box.padded(-1.5).overlaps(its_box.padded(-1.5))
    ]
    assert overlapping == []
    assert min(text.get_fontsize() for text in texts(figure)) >= 8.5


def test_the_figure_has_a_panel_per_stream_and_one_headline():
    figure = drawn(plots.plot_figure(make_result()))
    found = words(figure)
    assert sum(word.startswith(("single restored", "center of interval")) for word in found) == 3
    assert sum("→" in word for word in found) == 1


def test_without_a_prompt_or_a_tokenizer_the_ids_are_shown():
    result = make_result(("464", "4687"), target=None, metadata={"model": None, "prompt": [464, 4687]})
    found = words(drawn(plots.plot_stream(result, "block_output")))
    assert "464 4687 → 7312" in found
    assert "p(7312)" in found
    assert "single restored layer in the model" in found


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml"), (".PNG", b"\x89PNG")]
)
def test_a_figure_is_saved_in_the_format_of_its_suffix_without_a_warning(tmp_path, suffix, magic):
    path = tmp_path / "new" / f"figure{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save_figure(make_result(AWKWARD, 3, STREAMS[:1]), path, dpi=50)
    content = path.read_bytes()
    assert content.startswith(magic)
    assert len(content) < 300_000
    assert os.listdir(path.parent) == [path.name]


def test_dots_per_inch_scale_a_png(tmp_path):
    for dpi in (50, 100):
        plots.save_figure(make_result(streams=STREAMS[:2]), tmp_path / "figure.png", dpi=dpi)
        width, _ = struct.unpack(">II", (tmp_path / "figure.png").read_bytes()[16:24])
        assert width == pytest.approx(2 * plots.PANEL_WIDTH * dpi, abs=1)


def test_saving_leaves_no_figure_open_in_pyplot(tmp_path):
    before = pyplot.get_fignums()
    plots.save_figure(make_result(), tmp_path / "figure.png", dpi=30)
    assert pyplot.get_fignums() == before


def test_an_unknown_suffix_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plot_figure", None)
    with pytest.raises(StoreError, match=r"cannot tell the format of .*figure.txt: .* \.png, \.pdf, \.svg"):
        plots.save_figure(make_result(), tmp_path / "figure.txt")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_save_leaves_the_old_figure_and_nothing_else(tmp_path, monkeypatch):
    def write_half(_figure, where, **_options):
        where.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", write_half)
    (tmp_path / "figure.png").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        plots.save_figure(make_result(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_text() == "old"
    assert os.listdir(tmp_path) == ["figure.png"]


def test_without_plotnine_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotnine", None)
    for draw in (make_result().plot, lambda: make_result().plot("block_output")):
        with pytest.raises(FasttraceError, match=r'pip install "fasttrace\[plot\]"'):
            draw()


def test_a_result_plots_one_stream_or_all_of_them():
    assert isinstance(make_result().plot("attention_output"), ggplot)
    assert isinstance(make_result().plot(), Compose)
    assert isinstance(make_result(streams=("mlp_output",)).plot(), ggplot)
    with pytest.raises(PlanError, match="unknown stream 'mlp'"):
        make_result().plot("mlp")


def test_a_plot_can_be_restyled_and_saved_by_its_owner(tmp_path):
    (make_result().plot("block_output") + labs(x="blocks")).save(tmp_path / "one.png", dpi=40, verbose=False)
    make_result().plot().save(tmp_path / "all.png", dpi=40)
    assert (tmp_path / "one.png").read_bytes()[:4] == (tmp_path / "all.png").read_bytes()[:4] == b"\x89PNG"
