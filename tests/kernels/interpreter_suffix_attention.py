"""The attention kernel, statement by statement on the CPU; needs `TRITON_INTERPRET=1`.

Every default configuration runs. Outputs are NaN before, every load and store is watched, and no case has more than
about 30 programs, which take some 40 ms each.
"""

import mmap

import pytest
import torch
from fasttrace_kernels import suffix_attention as module
from fasttrace_kernels.layout import AttentionLayout
from fasttrace_kernels.suffix_attention import Config, launch_arguments, suffix_attention, tile_tokens

from tests.kernels.guard import touching
from tests.kernels.packs import (
    DTYPES,
    Heads,
    assert_attends,
    layout_of,
    poisoned,
    random_sinks,
    random_tensors,
)

PLAIN = {}
ALL = {"window": 4, "softcap": 3.0, "sinks": True, "scale": 0.3}


def check(layout, heads, dtype, at_most=40, **options):
    """Runs the kernel under guard and compares it with the reference."""
    q, k, v = random_tensors(layout.n_tokens, heads, dtype)
    if options.pop("sinks", False):
        options["sinks"] = random_sinks(heads)
    out = poisoned(q, v)
    _, programs = launch_arguments(q, k, v, layout, 1.0, None, 0.0, None, out)
    assert 0 < programs <= at_most
    with touching([q, k, v, layout.tiles, layout.tokens, *filter(torch.is_tensor, options.values())], [out]):
        suffix_attention(q, k, v, layout, out=out, backend="triton", **options)
    assert_attends(out, q, k, v, layout, **options)


def pack(n_positions, n_rows, heads, dtype, order="base"):
    block = tile_tokens(dtype, max(heads.d_head, heads.d_value or 0), heads.query // heads.kv, n_positions)
    return layout_of(n_positions, 2, n_rows, block, order=order)


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads",
    [Heads(7, 1, 64), Heads(2, 2, 80), Heads(2, 1, 128), Heads(4, 2, 32, 16), Heads(1, 1, 256), Heads(3, 1, 8)],
    ids=str,
)
def test_every_head_layout_gives_the_numbers_of_the_reference(heads, dtype, options):
    n_rows = 1 if heads.d_head > 64 else 6
    check(pack(7, n_rows, heads, dtype), heads, dtype, **options)


@pytest.mark.parametrize("n_positions", [1, 2, 12, 40])
@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
def test_every_prompt_length_gives_the_numbers_of_the_reference(n_positions, options):
    heads = Heads(4, 2, 16)
    check(pack(n_positions, 8, heads, torch.bfloat16), heads, torch.bfloat16, **options)


@pytest.mark.parametrize("option", ["window", "softcap", "sinks", "scale"])
def test_every_option_alone_gives_the_numbers_of_the_reference(option):
    heads = Heads(4, 2, 16)
    check(pack(12, 8, heads, torch.float16), heads, torch.float16, **{option: ALL[option]})


@pytest.mark.parametrize("window", [1, 3, 11, 12, 100])
def test_every_window_gives_the_numbers_of_the_reference(window):
    heads = Heads(2, 1, 16)
    check(pack(12, 8, heads, torch.float32), heads, torch.float32, window=window)


@pytest.mark.parametrize("options", [PLAIN, {"window": 50}], ids=["plain", "window"])
@pytest.mark.parametrize("d_head", [64, 128, 256])
def test_long_prompts_give_the_numbers_of_the_reference(d_head, options):
    heads = Heads(1, 1, d_head)
    layout = AttentionLayout.build([0, 260, 270], [260, 10, 3], [0, 250, 257], [0, 0, 0], block=128)
    assert layout.longest >= module.LONG
    check(layout, heads, torch.bfloat16, **options)


@pytest.mark.parametrize("order", ["first", "random"])
def test_rows_in_any_order_give_the_numbers_of_the_reference(order):
    heads = Heads(2, 1, 16)
    check(pack(5, 12, heads, torch.float16, order), heads, torch.float16, **ALL)


@pytest.mark.parametrize("block", [1, 5, 48])
def test_tiles_of_any_size_give_the_numbers_of_the_reference(block):
    """Smaller tiles than a program takes, and larger ones, which several programs share."""
    layout = layout_of(5, 2, 3 if block == 1 else 12, block)
    check(layout, Heads(7, 1, 16), torch.float16, **ALL)


@pytest.mark.parametrize("group", [17, 40])
def test_groups_too_large_for_a_program_are_shared_out(group):
    heads = Heads(group, 1, 16)
    check(pack(4, 1, heads, torch.float16), heads, torch.float16, **ALL)


@pytest.mark.parametrize("sink", [-torch.inf, -1e4, 1e4])
def test_extreme_sinks_give_the_numbers_of_the_reference(sink):
    heads = Heads(2, 1, 16)
    layout = pack(5, 4, heads, torch.float32)
    q, k, v = random_tensors(layout.n_tokens, heads, torch.float32)
    sinks = torch.tensor([sink, 0.0])
    out = suffix_attention(q, k, v, layout, sinks=sinks, out=poisoned(q, v), backend="triton")
    assert_attends(out, q, k, v, layout, sinks=sinks)


def test_large_scores_give_the_numbers_of_the_reference():
    heads = Heads(2, 1, 16)
    layout = pack(12, 4, heads, torch.float32)
    q, k, v = random_tensors(layout.n_tokens, heads, torch.float32)
    q = q * 1000
    out = suffix_attention(q, k, v, layout, out=poisoned(q, v), backend="triton")
    truth = suffix_attention(*(x.double() for x in (q, k, v)), layout)
    torch.testing.assert_close(out.double(), truth, atol=1e-2, rtol=1e-2)


def test_a_row_is_not_changed_by_what_its_tile_holds_besides():
    heads = Heads(2, 1, 16)
    layout = AttentionLayout.build([0, 6, 9, 12], [6, 3, 3, 2], [0, 3, 3, 4], [0, 0, 0, 0])
    q, k, v = random_tensors(layout.n_tokens, heads, torch.float32)
    before = suffix_attention(q, k, v, layout, backend="triton")
    q[9:12], k[9:12], v[9:12] = 7.0, -7.0, 1e6
    after = suffix_attention(q, k, v, layout, backend="triton")
    same = torch.ones(layout.n_tokens, dtype=torch.bool)
    same[9:12] = False
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])


def test_other_strides_and_an_output_inside_a_larger_tensor_are_fine():
    heads = Heads(4, 2, 16)
    layout = pack(7, 4, heads, torch.float16)
    q, k, v = (
        x.transpose(0, 1).contiguous().transpose(0, 1) for x in random_tensors(len(layout.tokens), heads, torch.float16)
    )
    out = torch.full((layout.n_tokens, 6, 40), torch.nan, dtype=torch.float16)[:, 1:5, 8:24]
    with touching([q, k, v, layout.tiles, layout.tokens], [out]):
        suffix_attention(q, k, v, layout, out=out, backend="triton")
    assert_attends(out, q, k, v, layout)


@pytest.mark.parametrize("far", ["token", "head"])
def test_tensors_of_more_than_two_billion_elements_are_addressed(far):
    layout = layout_of(7, 2, 30, block=64)
    strides = ((1 << 25) + 16, 64) if far == "token" else (64, (1 << 30) + 64)
    n_tokens, heads = layout.n_tokens, Heads(3, 3, 16)
    reach = (n_tokens - 1) * strides[0] + 2 * strides[1] + 16
    assert reach > 1 << 31
    q, k, v, out = (untouched(reach).as_strided((n_tokens, 3, 16), (*strides, 1)) for _ in range(4))
    for far_away, near in zip((q, k, v), random_tensors(n_tokens, heads, torch.float16), strict=True):
        far_away.copy_(near)
    with touching([q, k, v, layout.tiles, layout.tokens], [out]):
        suffix_attention(q, k, v, layout, out=out, backend="triton")
    assert_attends(out, q, k, v, layout)


def untouched(n_elements):
    """Float16 in address space only: a page is there when it is written."""
    no_reserve = 0x4000  # mmap.MAP_NORESERVE has no name before Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 2 * n_elements, flags=flags), dtype=torch.float16)


@pytest.mark.parametrize("key", module.CONFIGS, ids=str)
def test_every_default_configuration_gives_the_numbers_of_the_reference(key):
    half, d_head, long = key
    dtype = torch.bfloat16 if half else torch.float32
    longest = module.LONG if long else 20
    assert module.config_of(dtype, d_head, longest) == module.CONFIGS[key]
    heads = Heads(2, 1, d_head)
    block = tile_tokens(dtype, d_head, 2, longest)
    layout = AttentionLayout.build([0, longest], [longest, 9], [0, longest - 9], [0, 0], block=block)
    check(layout, heads, dtype)


def test_a_pack_without_tokens_launches_nothing():
    layout = AttentionLayout.build([], [], [], [])
    q = torch.zeros(0, 4, 16)
    assert suffix_attention(q, q, q, layout, backend="triton").shape == (0, 4, 16)


def test_configurations_have_the_fields_that_are_launched():
    assert Config(64, 32, 4, 2) == module.config_of(torch.float16, 80, 40)
