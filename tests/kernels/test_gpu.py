"""The attention kernel on a real GPU, against float64 and against torch's FlashAttention; skipped where there is none.

They need torch, triton and pytest: `python -m pytest --confcutdir=tests/kernels tests/kernels/test_gpu*.py`.
"""

import pytest
import torch
from fasttrace_kernels import suffix_attention as module
from fasttrace_kernels.layout import AttentionLayout
from fasttrace_kernels.suffix_attention import suffix_attention, tile_tokens

from tests.kernels.packs import (
    DTYPES,
    Heads,
    assert_attends,
    poisoned,
    random_rows,
    random_sinks,
    random_tensors,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICE = "cuda"

ALL = {"window": 9, "softcap": 3.0, "sinks": True, "scale": 0.2}
OPTIONS = {"plain": {}, "window": {"window": 4}, "softcap": {"softcap": 2.0}, "sinks": {"sinks": True}, "all": ALL}
HEADS = (
    Heads(25, 25, 64),
    Heads(9, 3, 64),
    Heads(14, 2, 64),
    Heads(4, 4, 80),
    Heads(4, 4, 96),
    Heads(8, 2, 128),
    Heads(8, 4, 256),
    Heads(4, 4, 192, 128),
    Heads(40, 1, 32),
    Heads(4, 2, 8),
)


def case(n_positions, n_rows, heads, dtype, order="base", block=None):
    widest = max(heads.d_head, heads.d_value or 0)
    block = block or tile_tokens(dtype, widest, heads.query // heads.kv, n_positions)
    layout = AttentionLayout.build(*random_rows(n_positions, 3, n_rows, order=order), block=block).to(DEVICE)
    return *random_tensors(layout.n_tokens, heads, dtype, device=DEVICE), layout


def check(q, k, v, layout, heads, **options):
    if options.pop("sinks", False):
        options["sinks"] = random_sinks(heads, DEVICE)
    out = suffix_attention(q, k, v, layout, out=poisoned(q, v), backend="triton", **options)
    assert_attends(out, q, k, v, layout, **options)
    return out


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_kernel_equals_the_reference_up_to_rounding(heads, dtype, options):
    check(*case(12, 100, heads, dtype), heads, **OPTIONS[options])


@pytest.mark.parametrize("n_positions", [1, 2, 7, 40, 200, 256, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_of_every_length_equal_the_reference(n_positions, dtype):
    heads = Heads(8, 2, 64)
    for options in ({}, {"window": 100, "softcap": 30.0, "sinks": True}):
        check(*case(n_positions, 30, heads, dtype), heads, **options)


@pytest.mark.parametrize("d_head", [64, 128, 256])
def test_long_prompts_of_every_head_size_equal_the_reference(d_head):
    heads = Heads(4, 2, d_head)
    check(*case(600, 20, heads, torch.bfloat16), heads)


@pytest.mark.parametrize("order", ["first", "random"])
@pytest.mark.parametrize("block", [1, 5, 300])
def test_any_order_and_any_tile_equal_the_reference(order, block):
    heads = Heads(14, 2, 64)
    check(*case(12, 100, heads, torch.bfloat16, order, block), heads, **ALL)


def test_the_torch_path_computes_the_same_on_a_gpu():
    heads = Heads(14, 2, 64)
    q, k, v, layout = case(12, 100, heads, torch.float16)
    assert_attends(suffix_attention(q, k, v, layout, backend="torch"), q, k, v, layout)


def test_a_launch_is_the_same_every_time():
    heads = Heads(9, 3, 64)
    q, k, v, layout = case(40, 200, heads, torch.bfloat16)
    first = suffix_attention(q, k, v, layout)
    for _ in range(20):
        assert torch.equal(first, suffix_attention(q, k, v, layout, out=poisoned(q, v)))


def test_a_launch_waits_for_nothing_and_can_be_recorded():
    heads = Heads(9, 3, 64)
    q, k, v, layout = case(40, 200, heads, torch.bfloat16)
    expected, out = suffix_attention(q, k, v, layout), poisoned(q, v)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            suffix_attention(q, k, v, layout, out=out)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("far", ["token", "head"])
def test_tensors_of_more_than_two_billion_elements_are_addressed(far):
    heads = Heads(3, 3, 16)
    q, k, v, layout = case(7, 30, heads, torch.float16)
    strides = ((1 << 24) + 16, 64) if far == "token" else (64, (1 << 30) + 64)
    reach = (layout.n_tokens - 1) * strides[0] + 2 * strides[1] + 16
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * 2 * reach:
        pytest.skip(f"needs {10 * reach >> 30} GiB of GPU memory")
    assert reach > 1 << 31
    shape = (layout.n_tokens, 3, 16)
    far_away = [torch.empty(reach, dtype=q.dtype, device=DEVICE).as_strided(shape, (*strides, 1)) for _ in range(4)]
    for target, source in zip(far_away, (q, k, v), strict=False):
        target.copy_(source)
    assert_attends(suffix_attention(*far_away[:3], layout, out=far_away[3]), q, k, v, layout)


def test_every_default_configuration_runs():
    for half, d_head, long in module.CONFIGS:
        dtype = torch.float16 if half else torch.float32
        n_positions = module.LONG + 40 if long else 20
        heads = Heads(4, 2, d_head)
        check(*case(n_positions, 20, heads, dtype), heads)
