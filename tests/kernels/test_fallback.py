"""Attention of a pack on a CPU equals the row-by-row reference, in torch and compiled by numba; no Triton needed."""

import os
import subprocess
import sys

import pytest
import torch
from fasttrace_kernels import suffix_attention as module
from fasttrace_kernels import suffix_attention_cpu
from fasttrace_kernels.layout import AttentionLayout
from fasttrace_kernels.suffix_attention import suffix_attention, tile_tokens

from tests.kernels.packs import (
    DTYPES,
    Heads,
    assert_attends,
    layout_of,
    poisoned,
    random_sinks,
    random_tensors,
)

HEADS = (Heads(14, 2, 64), Heads(3, 3, 80), Heads(4, 2, 128), Heads(4, 1, 24, 16))
OPTIONS = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 2.0, "scale": 0.5},
    "sinks": {"sinks": True},
    "all": {"window": 7, "softcap": 3.0, "sinks": True, "scale": 0.2},
}


def options_of(name, heads):
    options = dict(OPTIONS[name])
    if options.pop("sinks", False):
        options["sinks"] = random_sinks(heads)
    return options


def case(n_positions, heads, dtype=torch.float32, block=32, n_base=3, n_rows=20, order="base"):
    layout = layout_of(n_positions, n_base, n_rows, block, order=order)
    return *random_tensors(layout.n_tokens, heads, dtype), layout


@pytest.fixture(params=["torch", "numba"])
def backend(request):
    """Every way of a CPU in turn."""
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("n_positions", [1, 5, 12, 40])
def test_both_ways_equal_the_reference_up_to_rounding(n_positions, heads, dtype, options, backend):
    q, k, v, layout = case(n_positions, heads, dtype)
    options = options_of(options, heads)
    out = poisoned(q, v)
    assert suffix_attention(q, k, v, layout, out=out, backend=backend, **options) is out
    assert_attends(out, q, k, v, layout, **options)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    numba = pytest.importorskip("numba")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    q, k, v, layout = case(12, HEADS[0], n_rows=60)
    inside, found, started = numba.get_num_threads(), [], []
    right = numba.set_num_threads
    monkeypatch.setattr(numba, "set_num_threads", lambda threads: started.append(threads) or right(threads))
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(suffix_attention(q, k, v, layout, backend="numba"))
    assert torch.equal(*found)
    assert started == [1, inside, 2, inside]


@pytest.mark.slow
def test_a_process_forked_off_one_in_which_numba_ran_computes_without_it():
    """In processes of their own: OpenMP ends a child that would use its parent's threads."""
    pytest.importorskip("numba")
    code = (
        "import os, torch; torch.set_num_threads(1)\n"
        "from tests.kernels.test_fallback import HEADS, assert_attends, case, suffix_attention\n"
        "q, k, v, layout = case(12, HEADS[0])\n"
        "suffix_attention(q, k, v, layout, backend='numba')\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    assert_attends(suffix_attention(q, k, v, layout), q, k, v, layout)\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}, timeout=120
    )


@pytest.mark.slow
def test_a_folder_of_compiled_code_that_fails_costs_one_compilation(monkeypatch, caplog):
    pytest.importorskip("numba")
    q, k, v, layout = case(5, HEADS[0])
    right, asked = suffix_attention_cpu._compiled, []

    def compiled(d_key, d_value, kept):
        asked.append(kept)
        if kept:
            raise OSError("no space left on device")
        return right(d_key, d_value, kept=False)

    monkeypatch.setattr(suffix_attention_cpu, "_compiled", compiled)
    monkeypatch.setattr(suffix_attention_cpu, "_NOT_KEPT", set())
    for _ in range(2):
        assert_attends(suffix_attention(q, k, v, layout, backend="numba"), q, k, v, layout)
    assert asked == [True, False, False]
    assert caplog.text.count("no space left") == 1


def test_every_size_of_heads_has_a_file_of_its_own():
    """numba's own file for all of them would be written by several processes at once."""
    pytest.importorskip("numba")
    names = {suffix_attention_cpu._compiled(*sizes, kept=True).py_func.__qualname__ for sizes in ((64, 64), (24, 16))}
    assert len(names) == 2


@pytest.mark.parametrize("error", [ModuleNotFoundError("no numba"), ImportError("Numba needs NumPy 2.3 or less")])
def test_a_numba_that_cannot_be_imported_is_done_without(error, monkeypatch, caplog):
    def broken(_):
        raise error

    monkeypatch.setattr(suffix_attention_cpu, "import_module", broken)
    assert not suffix_attention_cpu.is_installed.__wrapped__()
    assert caplog.text.count("Numba needs NumPy") == (type(error) is ImportError)


@pytest.mark.slow
def test_torch_keeps_its_number_of_threads():
    """In a process of its own: numba starts its threads once."""
    pytest.importorskip("numba")
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests.kernels.test_fallback import HEADS, case, suffix_attention\n"
        "suffix_attention(*case(12, HEADS[0]), backend='numba')\n"
        "assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}, timeout=120
    )


def test_nan_and_inf_stay_in_their_rows():
    pytest.importorskip("numba")
    q, k, v, layout = case(9, HEADS[0])
    start, length, _, _ = layout.rows[:, -1]
    v[start + length - 1] = torch.inf
    k[start + length - 1] = torch.nan
    out = suffix_attention(q, k, v, layout, backend="numba")
    assert out[start + length - 1].isnan().all()
    assert out[: start + length - 1].isfinite().all()


def test_numba_is_taken_where_it_is_installed_and_can_compute(monkeypatch):
    pytest.importorskip("numba")
    calls, right = [], suffix_attention_cpu.attend
    monkeypatch.setattr(suffix_attention_cpu, "attend", lambda q, *rest: calls.append(q.dtype) or right(q, *rest))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        suffix_attention(*case(5, HEADS[0], dtype))
    assert calls == [torch.float32, torch.bfloat16]
    monkeypatch.setattr(suffix_attention_cpu, "is_installed", lambda: False)
    suffix_attention(*case(5, HEADS[0]))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("tensor", "installed", "error", "message"),
    [
        (torch.zeros(1, 1, 16, dtype=torch.float64), True, ValueError, "takes float32, float16, bfloat16"),
        (torch.zeros(1, 1, 16, requires_grad=True), True, ValueError, "no backward"),
        (torch.zeros(1, 1, 16), False, RuntimeError, "numba is not installed here"),
    ],
)
def test_what_numba_cannot_compute_it_refuses(tensor, installed, error, message, monkeypatch):
    monkeypatch.setattr(suffix_attention_cpu, "is_installed", lambda: installed)
    layout = AttentionLayout.build([0], [1], [0], [0])
    with pytest.raises(error, match=message):
        suffix_attention(tensor, tensor, tensor, layout, backend="numba")


@pytest.mark.parametrize("order", ["base", "first", "random"])
@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("options", ["plain", "all"])
def test_any_order_of_rows_and_any_tile_give_the_same_numbers(order, block, options, backend):
    q, k, v, layout = case(9, HEADS[0], block=block, order=order)
    options = options_of(options, HEADS[0])
    assert_attends(suffix_attention(q, k, v, layout, backend=backend, **options), q, k, v, layout, **options)


@pytest.mark.parametrize("rows", [(1, 0), (2, 0), (1, 1)], ids=["one row", "base rows only", "one suffix"])
def test_small_packs_equal_the_reference(rows, backend):
    q, k, v, layout = case(5, HEADS[1], n_base=rows[0], n_rows=rows[1])
    assert_attends(suffix_attention(q, k, v, layout, backend=backend), q, k, v, layout)


def test_a_pack_without_tokens_gives_an_output_without_tokens(backend):
    layout = AttentionLayout.build([], [], [], [])
    q = torch.zeros(0, 4, 16)
    assert suffix_attention(q, q, q, layout, backend=backend).shape == (0, 4, 16)


def test_little_memory_only_means_more_steps(monkeypatch):
    q, k, v, layout = case(12, HEADS[0], block=8)
    whole = suffix_attention(q, k, v, layout, backend="torch")
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert len(list(module._chunks(layout.key_counts, 1024))) == layout.n_tiles
    torch.testing.assert_close(suffix_attention(q, k, v, layout, backend="torch"), whole)


def test_float64_keeps_its_digits():
    q, k, v, layout = case(12, HEADS[0], torch.float64)
    options = options_of("all", HEADS[0])
    out = suffix_attention(q, k, v, layout, **options)
    expected = module_reference(q, k, v, layout, **options)
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=1e-12)


def module_reference(*args, **kwargs):
    from fasttrace_kernels import reference

    return reference.suffix_attention(*args, **kwargs)


def test_a_window_sees_what_transformers_lets_it_see():
    from transformers.masking_utils import sliding_window_overlay

    overlay, window = sliding_window_overlay(3), []
    layout = AttentionLayout.build([0], [8], [0], [0])
    for key in range(8):
        v = torch.zeros(8, 1, 16)
        v[key] = 1
        seen = suffix_attention(torch.zeros(8, 1, 16), torch.zeros(8, 1, 16), v, layout, window=3)[:, 0, 0] > 0
        window.append(seen)
    expected = [[key <= query and bool(overlay(0, 0, query, key)) for query in range(8)] for key in range(8)]
    assert torch.stack(window).tolist() == expected


def test_the_torch_path_can_be_differentiated():
    q, k, v, layout = case(5, HEADS[1])
    q = q.clone().requires_grad_()
    suffix_attention(q, k, v, layout).sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 4)}, r"\[token, head, d_head\]"),
        ({"q": torch.zeros(7, 4, 16)}, "layout is of 8 tokens"),
        ({"q": torch.zeros(8, 3, 16)}, "heads do not fit"),
        ({"k": torch.zeros(8, 2, 17)}, "heads do not fit"),
        ({"v": torch.zeros(8, 1, 16)}, "heads do not fit"),
        ({"k": torch.zeros(8, 2, 16).half()}, "one floating type"),
        ({"k": torch.zeros(8, 2, 16, device="meta")}, "one device"),
        ({"k": torch.zeros(8, 2, 32)[..., ::2]}, r"call \.contiguous"),
        ({"window": 0}, "window >= 1"),
        ({"softcap": -1.0}, "softcap > 0"),
        ({"sinks": torch.zeros(3)}, r"contiguous \[4\]"),
        ({"out": torch.zeros(8, 4, 15)}, r"out must be \[8, 4, 16\]"),
        ({"backend": "cuda"}, "pass 'auto'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    layout = AttentionLayout.build([0, 5], [5, 3], [0, 2], [0, 0])
    given = {"q": torch.zeros(8, 4, 16), "k": torch.zeros(8, 2, 16), "v": torch.zeros(8, 2, 16), "layout": layout}
    with pytest.raises(ValueError, match=message):
        suffix_attention(**given | change)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 1, 16, dtype=torch.float64), "not torch.float64"),
        (torch.zeros(1, 1, 16, requires_grad=True), "no backward"),
        (torch.zeros(1, 1, 272), "up to 256"),
    ],
)
def test_what_the_kernel_cannot_compute_it_refuses(tensor, message):
    layout = AttentionLayout.build([0], [1], [0], [0])
    with pytest.raises(ValueError, match=message):
        suffix_attention(tensor, tensor, tensor, layout, backend="triton")


def test_a_kernel_asked_for_by_name_runs_or_raises():
    layout = AttentionLayout.build([0], [1], [0], [0])
    q = torch.zeros(1, 1, 16)
    with pytest.raises(RuntimeError, match="pass backend='torch'"):
        suffix_attention(q, q, q, layout, backend="triton")


@pytest.mark.parametrize("group", [1, 2, 4, 7, 16, 48, 71])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_the_advised_size_fill_one_program(group, dtype):
    for d_head in (16, 64, 80, 256):
        tokens = tile_tokens(dtype, d_head, group, longest=20)
        block_m = module.config_of(dtype, d_head, 20).block_m
        assert tokens * module._fold(group) <= block_m < (tokens + 1) * module._fold(group) or tokens == 1


@pytest.mark.slow
def test_importing_the_kernels_imports_no_compiler():
    code = "import sys, fasttrace_kernels.suffix_attention;sys.exit('triton' in sys.modules or 'numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
