"""The tools themselves: a gate that passes wrong grids, or a wrong ratio, would falsify every number."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench import families, peers, run
from bench.card import card, slug
from bench.cases import CASES, STREAMS, Cell, Workload, build
from bench.gate import DisagreementError, Plain, agree, spread_cells
from bench.split import HEAD, marked
from bench.timing import Section, Timing, interleave, ratios


@dataclass
class Grids:
    """What a trace returns, as far as the gate looks."""

    prob: dict[str, np.ndarray]
    clean_prob: float
    corrupted_prob: float


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-llama"])
def workload(request: pytest.FixtureRequest) -> Workload:
    return build(CASES[request.param])


@pytest.fixture
def grids(workload: Workload) -> Grids:
    shape = (len(STREAMS), workload.case.n_layers, workload.case.tokens)
    probs = np.reshape(peers.FullRows(workload).probs(workload.case.cells()), shape)
    return Grids(dict(zip(STREAMS, probs, strict=True)), *Plain(workload).base())


def test_the_gate_passes_right_grids(workload, grids):
    assert agree(grids, workload) < 1e-5


@pytest.mark.parametrize("stream", STREAMS)
def test_the_gate_refuses_a_grid_off_by_a_thousandth(workload, grids, stream):
    grids.prob[stream] *= 1.001
    with pytest.raises(DisagreementError, match="not timed"):
        agree(grids, workload)


def test_the_gate_refuses_nan_and_a_shifted_window(workload, grids):
    grids.prob["mlp_activation"] = np.roll(grids.prob["mlp_activation"], 1, axis=0)
    with pytest.raises(DisagreementError):
        agree(grids, workload)
    grids.prob["mlp_activation"] = np.full_like(grids.prob["mlp_activation"], np.nan)
    with pytest.raises(DisagreementError):
        agree(grids, workload)


@pytest.mark.parametrize("name", ["pyvene", "pyvene-grouped", "rome", "rows"])
def test_every_peer_computes_the_same_cells(workload, grids, name):
    if "pyvene" in name:
        pytest.importorskip("pyvene")
    cells = spread_cells(workload.case, 9)
    expected = [grids.prob[stream][layer, position] for stream, layer, position in cells]
    np.testing.assert_allclose(peers.PEERS[name](workload).probs(cells), expected, rtol=1e-5)


def test_a_plain_cell_that_restores_the_whole_last_state_is_the_clean_run(workload):
    last = Cell("block_output", workload.case.n_layers - 1, workload.case.tokens - 1)
    assert Plain(workload).cell(last) == pytest.approx(Plain(workload).base()[0], rel=1e-6)


def test_cells_are_spread_over_streams_and_blocks():
    cells = spread_cells(CASES["gpt2-12"], 18)
    assert [sum(cell.stream == stream for cell in cells) for stream in STREAMS] == [6, 6, 6]
    assert sorted({cell.layer for cell in cells}) == [1, 3, 5, 7, 9, 11]
    assert len({cell.position for cell in cells}) == 7


def test_time_for_some_cells_is_scaled_to_all_by_stream():
    case = CASES["gpt2-12"]
    shares = peers._by_stream(spread_cells(case, 18))
    seconds = {stream: [1.0, 2.0] for stream in STREAMS}
    assert peers._for_all_cells(case, shares, seconds) == [3 * 84 / 6, 2 * 3 * 84 / 6]


def test_interleaved_runs_take_turns():
    calls: list[str] = []
    seconds = interleave({name: partial(calls.append, name) for name in "ab"}, rounds=3)
    assert calls == list("ababab")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_percentiles_and_ratios_are_in_order():
    timing = Timing.of([3.0, 1.0, 2.0])
    assert timing.p20 < timing.p50 == 2.0 < timing.p80
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == (3.0, 2.0, 4.0)


def test_others_share_of_the_machine_is_a_share():
    with Section() as section:
        torch.ones(2000, 2000).matmul(torch.ones(2000, 2000))
    assert 0 <= section.others <= 1


def test_peak_memory_sees_what_was_freed():
    with Section() as small:
        pass
    with Section() as large:
        torch.ones(50_000_000)
    if not small.exact:
        pytest.skip("this system does not let a process reset its peak")
    assert 150e6 < large.peak - small.peak < 500e6


def test_weights_are_the_same_each_time_and_tied():
    first, second = (build(CASES["tiny-gpt2"]) for _ in range(2))
    assert first.prompt == second.prompt
    for ours, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert first.model.get_parameter("lm_head.weight") is first.model.get_parameter("transformer.wte.weight")


def test_an_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--cases", "gpt5"])
    assert "unknown case or dtype 'gpt5'" in capsys.readouterr().err


def test_a_device_is_a_plain_folder_name():
    name = slug(card())
    assert name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert all(pair != ("-", "-") for pair in pairwise(name))


def test_what_the_profiler_marks_is_computed_as_it_is_timed(workload):
    head = workload.model.get_output_embeddings()
    with marked(workload.model), profile(activities=[ProfilerActivity.CPU]) as recorded:
        assert not any("forward" in vars(module) for module in workload.model.modules())
        head(torch.ones(1, head.in_features))
    assert [event.key for event in recorded.key_averages()].count(HEAD) == 1
    assert not head._forward_hooks
    assert not head._forward_pre_hooks


def test_the_table_of_families_has_counts_first_then_known_models_and_reasons_in_words():
    raised = "the model's code does not take such a pass"
    sparse = {"wavefront": f"{raised} (RuntimeError)", "fork": f"{raised} (no attribute 'update_indexer')"}
    found = [
        families.Examined("gpt2", "wavefront", {"wavefront": 1e-6}, {"fork": f"{raised} (KeyError: 3)"}),
        families.Examined("axk2", "rows", {"rows": 1e-6}, sparse),
        families.Examined("blt", "none: no list of 8 blocks in BltForCausalLM"),
    ]
    page = families.page(found, ("wavefront", "fork", "rows"))
    order = ["wavefront 1, rows 1, no engine 1", "| GPT-2, DistilGPT-2 | `gpt2` | wavefront |", "| `axk2` | rows |"]
    assert sorted(order, key=page.index) == order
    assert page.count("sparse attention chooses its keys") == 2
    assert page.count("its code expects whole prompts") == 1
    assert "| `blt` | none: no list of blocks is found |" in page
    assert "Error" not in page


def test_reasons_of_engines_that_a_model_gets_stay():
    assert families.in_words("rows", ()) == "rows"
    assert families.in_words("cannot be built: needs timm", ()) == "cannot be built: needs timm"


def test_every_model_that_people_know_is_a_type_of_the_table():
    assert set(families.KNOWN.values()) <= {*families.zoo.ALL, *families.zoo.VARIANTS}
