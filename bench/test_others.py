"""The other tools: each computes what fasttrace computes, or it is not timed."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bench import peers
from bench.cases import CASES, STREAMS, Cell, Workload, build
from bench.gate import DisagreementError, editing, spread_cells
from bench.others import MissingError, Peer
from bench.others.lens import same_sweep, with_other_subject
from bench.others.plain import FullRows
from bench.others.vocabulary import number_tokenizer
from fasttrace.errors import FasttraceError

PACKAGES = {"pyvene": "pyvene", "transformer-lens": "transformer_lens", "nnsight": "nnsight"}


class Wrong(FullRows):
    """Off by a thousandth."""

    def probs(self, cells):
        return [prob * 1.001 for prob in super().probs(cells)]


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-llama"])
def workload(request: pytest.FixtureRequest) -> Workload:
    return build(CASES[request.param])


@pytest.fixture(scope="module")
def ours(workload: Workload) -> peers.Ours:
    """The case's own work, traced once."""
    tracer = peers.fasttrace.Tracer(workload.model)
    result = tracer.trace(workload.prompt, engine="rows", **workload.trace_options())
    return peers.Ours("rows", lambda: None, result)


def _on_first(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, tuple], tuple]:
    """A hook that edits a module's first argument."""
    return lambda _, args: (edit(args[0]), *args[1:])


def replaced(workload: Workload, cell: Cell) -> float:
    """A cell of TransformerLens's sweep in two plain passes: the clean value at a block's input, MLP or attention."""
    trunk, attention = ("transformer.h", "attn") if workload.case.is_gpt2 else ("model.layers", "self_attn")
    child = {"block_output": "", "mlp_activation": ".mlp", "attention_output": f".{attention}"}[cell.stream]
    module = workload.model.get_submodule(f"{trunk}.{cell.layer}{child}")
    clean: list[torch.Tensor] = []

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        clean.append(hidden[:, cell.position].clone())
        return hidden

    def restore(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, cell.position] = clean[0]
        return hidden

    for ids, edit in ((torch.tensor([workload.prompt]), keep), (with_other_subject(workload), restore)):
        with torch.no_grad(), ExitStack() as stack:
            if cell.stream == "block_output":  # restored where the block begins
                handle = module.register_forward_pre_hook(_on_first(edit))
                stack.callback(handle.remove)
            else:
                stack.enter_context(editing(module, edit))
            logits = workload.model(ids, use_cache=False).logits[0, -1]
    return logits.softmax(-1)[workload.target].item()


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
def test_the_sweep_of_transformer_lens_is_the_clean_value_of_one_module_among_replaced_tokens(workload, engine):
    cells = spread_cells(workload.case, 18)
    found = dict(zip(workload.case.cells(), same_sweep(workload, engine)(), strict=True))
    expected = [replaced(workload, cell) for cell in cells]
    assert len({round(prob, 9) for prob in expected}) > len(cells) // 2
    np.testing.assert_allclose([found[cell] for cell in cells], expected, rtol=1e-5)


def test_the_sweep_runs_on_the_engine_that_was_asked_for(workload):
    with pytest.raises(FasttraceError, match="zigzag"):
        same_sweep(workload, "zigzag")()


def test_the_other_subject_differs_in_each_of_its_tokens_and_nowhere_else(workload):
    begin, end = workload.case.subject
    differs = with_other_subject(workload)[0] != torch.tensor(workload.prompt)
    assert differs.nonzero().flatten().tolist() == list(range(begin, end))


def test_a_number_is_the_word_of_its_token():
    tokenizer = number_tokenizer(101)
    assert tokenizer("17 0 100").input_ids == [17, 0, 100]
    assert tokenizer.decode([17, 100]) == "17 100"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_there_is_named_with_what_to_install(workload, name, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(MissingError, match=rf"pip install .*{name}=="):
        peers.PEERS[name](workload)


def test_a_version_without_a_bridge_is_left_out_like_a_missing_one(workload, monkeypatch):
    old = ModuleType("transformer_lens")
    vars(old)["patching"] = ModuleType("transformer_lens.patching")
    monkeypatch.setitem(sys.modules, "transformer_lens", old)
    monkeypatch.delitem(sys.modules, "transformer_lens.model_bridge", raising=False)
    with pytest.raises(MissingError, match="model_bridge"):
        peers.PEERS["transformer-lens"](workload)


@pytest.mark.parametrize("name", PACKAGES)
def test_an_installed_tool_agrees(workload, ours, name):
    pytest.importorskip(PACKAGES[name], reason=f"{name} is not installed: it is in the extra `peers`")
    cells = workload.case.cells() if name == "nnsight" else spread_cells(workload.case, 9)
    found = peers.compare(name, workload, ours, cells, rounds=1)
    assert found.max_relative_difference < 1e-5
    assert found.cells_measured == len(cells)


def test_a_tool_off_by_a_thousandth_is_not_timed(workload, ours, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "wrong", Wrong)
    monkeypatch.setattr(peers, "interleave", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(DisagreementError, match="not timed"):
        peers.compare("wrong", workload, ours, [], rounds=1)


def test_a_tool_with_work_of_its_own_is_held_against_that_work(workload, ours, monkeypatch):
    """Its cells are not the case's; fasttrace is timed on the same work, on the engine of the case."""
    engines: list[str] = []

    class Other(Peer):
        def probs(self, cells):
            return [2.0 + STREAMS.index(cell.stream) + cell.layer for cell in cells]

        def same_work(self, engine):
            engines.append(engine)
            return lambda: self.probs(self.workload.case.cells())

    monkeypatch.setitem(peers.PEERS, "other", Other)
    found = peers.compare("other", workload, ours, spread_cells(workload.case, 6), rounds=1)
    assert (found.max_relative_difference, found.cells_measured, engines) == (0, 6, ["rows"])


@pytest.mark.parametrize(("peer", "code"), [("nnsight", 0), ("wrong", 1)])
def test_what_is_left_out_is_told_and_only_a_disagreement_fails(peer, code, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    monkeypatch.setitem(peers.PEERS, "wrong", Wrong)
    arguments = ["--case", "tiny-gpt2", "--peers", f"{peer},rows", "--rounds", "1", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        peers.main([*arguments, "--out", str(tmp_path / "report.json")])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == code
    assert list(report["left_out"]) == [peer]
    assert [found["tool"] for found in report["peers"]] == ["rows"]
    assert report == json.loads((tmp_path / "report.json").read_text())
