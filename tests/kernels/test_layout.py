"""Tables of a pack: every tile says what its tokens need, and nothing that is wrong is accepted."""

import numpy as np
import pytest
import torch
from fasttrace_kernels.layout import AttentionLayout
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.packs import layout_of, random_rows

ROWS = {"start": [0, 5], "length": [5, 3], "first": [0, 2], "base_start": [0, 0]}


@given(
    st.integers(1, 40), st.integers(1, 3), st.integers(0, 30), st.integers(1, 70), st.sampled_from(["base", "random"])
)
def test_tiles_cover_every_token_once_with_rows_of_one_base(n_positions, n_base, n_rows, block, order):
    rows = random_rows(n_positions, n_base, n_rows, order=order)
    layout = AttentionLayout.build(*rows, block=block)
    covered = []
    row_of_token = np.repeat(np.arange(len(rows[0])), rows[1])
    for (begin, count, base, prefix, low, *_), n_keys in zip(layout.tiles.tolist(), layout.key_counts, strict=True):
        assert 1 <= count <= block
        tokens = np.arange(begin, begin + count)
        covered.extend(tokens)
        start, _, first, base_start = (column[row_of_token[tokens]] for column in rows)
        assert set(base_start[first > 0]) <= {base}
        assert prefix == first.max()
        assert low == min((first + tokens - start)[first > 0], default=np.iinfo(np.int32).max)
        assert n_keys == prefix + begin + count - start[0]
    assert sorted(covered) == list(range(layout.n_tokens))
    assert list(layout.key_counts) == sorted(layout.key_counts, reverse=True)


def test_rows_that_fit_into_a_tile_are_not_cut():
    layout = layout_of(7, 2, 40, block=16)
    ends = {int(tile[0] + tile[1]) for tile in layout.tiles}
    assert ends <= {int(start + length) for start, length in layout.rows[:2].T}
    assert layout.n_tiles < layout.n_tokens / 8, "tiles are at least half full"


def test_rows_that_need_no_base_share_a_tile_with_the_next_ones():
    layout = AttentionLayout.build([0, 3, 6], [3, 3, 1], [0, 0, 2], [0, 3, 3], block=16)
    assert layout.tiles[:, :4].tolist() == [[0, 7, 3, 2]]


def test_a_long_row_is_cut_and_its_rest_shares_a_tile_with_the_next_row():
    layout = AttentionLayout.build([0, 20], [20, 4], [0, 16], [0, 0], block=8)
    assert sorted(layout.tiles[:, :2].tolist()) == [[0, 8], [8, 8], [16, 8]]


def test_rows_may_come_in_any_order_and_without_tokens():
    layout = AttentionLayout.build([5, 0, 5], [3, 5, 0], [2, 0, 4], [0, 0, 0])
    expected = AttentionLayout.build(**ROWS)
    assert torch.equal(layout.tiles, expected.tiles)
    assert torch.equal(layout.tokens, expected.tokens)


def test_a_pack_without_rows_has_empty_tables():
    layout = AttentionLayout.build([], [], [], [])
    assert layout.n_tokens == layout.n_tiles == layout.longest == 0


def test_a_layout_moves_to_a_device_as_a_whole():
    layout = AttentionLayout.build(**ROWS).to("meta")
    assert layout.tiles.device == layout.tokens.device == torch.device("meta")
    assert layout.n_tokens == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": [0, 6]}, "the row at 6 should start at 5"),
        ({"start": [0, 4]}, "each token once"),
        ({"start": [1, 6]}, "from token 0 on"),
        ({"length": [5, -3]}, "negative length"),
        ({"first": [0, -2]}, "negative length or first"),
        ({"base_start": [0, 7]}, "outside the pack of 8"),
        ({"base_start": [0, -1]}, "outside the pack"),
        ({"base_start": [0]}, "differ in shape"),
        ({"block": 0}, "block >= 1"),
    ],
)
def test_a_wrong_pack_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AttentionLayout.build(**ROWS | change)


def test_the_tables_of_two_thousand_rows_are_built_without_a_loop_over_them(monkeypatch):
    rows = random_rows(20, 3, 2000)
    calls = []
    for name in ("searchsorted", "repeat"):
        function = getattr(np, name)
        monkeypatch.setattr(np, name, lambda *args, f=function, **kwargs: calls.append(1) or f(*args, **kwargs))
    AttentionLayout.build(*rows)
    assert len(calls) < 20
