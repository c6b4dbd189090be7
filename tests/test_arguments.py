"""Wrong arguments: an error of fasttrace that names the argument, before anything is computed."""

import enum
import inspect
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fasttrace
from fasttrace import EngineError, FasttraceError, ModelError, PlanError, PromptError, api, memories
from fasttrace.engines import ENGINES
from fasttrace.engines.memory import Budget
from fasttrace.engines.passes import run_in_passes
from fasttrace.experiment import corruption
from fasttrace.experiment.cells import grid_cells, windows_of
from fasttrace.experiment.grids import Grid
from fasttrace.experiment.settings import ENGINE_NAMES, Settings
from fasttrace.facts.dataset import Fact, read_facts
from fasttrace.reports import page as report
from fasttrace.reports.average_figures import plot_roles, save_lines, save_roles
from fasttrace.reports.averages import average, token_roles
from fasttrace.reports.exports import export
from fasttrace.reports.page import write_report
from fasttrace.results.figure import plot_figure, plot_stream, save_figure
from fasttrace.results.record import Record
from fasttrace.results.rome import rome_file_name
from fasttrace.runs.run import run
from fasttrace.runs.store import Store
from tests.conftest import all_grids, blank_scores, make_job, tiny_anatomy
from tests.helpers.run_facts import facts_of
from tests.helpers.tokenizers import byte_level
from tests.helpers.zoo import N_LAYERS, tiny_model

PROMPT = "The Space Needle is in downtown"
TRACE: dict[str, Any] = {
    "prompt": PROMPT,
    "subject": "The Space Needle",
    "target": " Seattle",
    "streams": ("mlp_output",),
    "window": 2,
    "noise": 1.0,
    "noise_subjects": None,
    "samples": 1,
    "seed": 1,
    "direction": "noising",
    "engine": "reference",
    "budget": "auto",
    "first_target_token": False,
    "progress": None,
}
MANY = {name: TRACE[name] for name in TRACE if name not in ("prompt", "subject", "target", "first_target_token")}
MANY = {name: value for name, value in MANY.items() if name != "progress"}
PAIR = {"prompt": [5, 6, 7, 8], "counterfactual": [5, 6, 9, 8], "target": 7, "foil": 8, "subject": None}
PAIR |= {name: TRACE[name] for name in ("samples", "noise", "engine", "progress")}
ABLATE = {name: PAIR[name] for name in ("prompt", "target", "foil", "engine", "progress")}
ABLATE |= {"streams": "mlp_output", "source": "zero", "positions": "each", "window": 1, "subject": (0, 2)}
MANY |= {"facts": facts_of(2), "require_correct": False, "strict": False}


FACTS = ("source", "facts", "file", "columns")
"""What messages call the source of facts."""
COUNT = itertools.count()
FEW = {"samples": 1, "noise": 1.0, "window": 2}


class Text(enum.StrEnum):
    """A text that is no plain one."""

    STREAM = "mlp_output"


class Hostile:
    """Raises whatever it is asked."""

    def __getattr__(self, name):
        raise RuntimeError(f"{name} asked for")

    def __repr__(self):
        raise RuntimeError("repr asked for")

    def __iter__(self):
        raise RuntimeError("items asked for")

    def __eq__(self, other):
        raise RuntimeError("compared")

    def __bool__(self):
        raise RuntimeError("truth asked for")

    __hash__ = None


class Index:
    """A whole number by its own word."""

    def __index__(self):
        return 2


ODD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "np.True_": lambda: np.True_,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2": lambda: 2,
    "np.int64": lambda: np.int64(2),
    "np.uint8": lambda: np.uint8(3),
    "np.uint64": lambda: np.uint64(2**63),
    "10**8": lambda: 10**8,
    "10**30": lambda: 10**30,
    "10**5000": lambda: 10**5000,
    "2.0": lambda: 2.0,
    "np.float32": lambda: np.float32(0.5),
    "1e300": lambda: 1e300,
    "nan": lambda: math.nan,
    "np nan": lambda: np.float64("nan"),
    "inf": lambda: math.inf,
    "complex": lambda: 1j,
    "Decimal": lambda: Decimal("0.5"),
    "Decimal sNaN": lambda: Decimal("sNaN"),
    "Fraction": lambda: Fraction(1, 2),
    "huge Fraction": lambda: Fraction(10**400),
    "index": Index,
    "0-d array": lambda: np.array(2),
    "0-d tensor": lambda: torch.tensor(2),
    "1-element tensor": lambda: torch.tensor([2]),
    "meta tensor": lambda: torch.tensor(2, device="meta"),
    "array": lambda: np.array([5, 6, 7]),
    "float array": lambda: np.array([0.5, math.nan]),
    "bool array": lambda: np.array([True, False]),
    "tensor": lambda: torch.tensor([[5, 6, 7, 8]]),
    "3-d tensor": lambda: torch.zeros(2, 2, 2),
    "text": lambda: "text",
    "empty": lambda: "",
    "blank": lambda: "  ",
    "digits": lambda: "3",
    "long text": lambda: "x" * 5000,
    "null byte": lambda: "a\0b",
    "surrogate": lambda: "a\ud800b",
    "line break": lambda: "a\nb",
    "np.str_": lambda: np.str_("mlp_output"),
    "enum": lambda: Text.STREAM,
    "bytes": lambda: b"abc",
    "bytearray": lambda: bytearray(b"abc"),
    "path": lambda: Path("a/b"),
    "root": lambda: Path("/"),
    "empty list": list,
    "list": lambda: [1, 3],
    "mixed list": lambda: [1, "a", None],
    "list of texts": lambda: ["mlp_output", "text"],
    "twice": lambda: ["mlp_output", "mlp_output"],
    "nested list": lambda: [[1, 2], [3]],
    "list of bools": lambda: [True, False],
    "tuple of np.int64": lambda: (np.int64(1), np.int64(3)),
    "range": lambda: range(1, 3),
    "slice": lambda: slice(1, 3),
    "odd slice": lambda: slice(None, None, -1),
    "set": lambda: {1, 3},
    "dict": lambda: {"prompt": 1},
    "input_ids": lambda: {"input_ids": [1, 2]},
    "generator": lambda: (each for each in ("mlp_output",)),
    "endless": itertools.count,
    "Series": lambda: pd.Series([5, 6, 7]),
    "frame": lambda: pd.DataFrame({"a": [1]}),
    "object": object,
    "class": lambda: int,
    "function": lambda: len,
    "ellipsis": lambda: ...,
    "NotImplemented": lambda: NotImplemented,
    "hostile": Hostile,
    "torch.dtype": lambda: torch.float16,
    "device": lambda: torch.device("cpu"),
}
"""By name, what makes it: generators last for one call."""


class ReachedError(Exception):
    """The engine was to be chosen: all arguments were taken."""


@dataclass
class Door:
    """A public function and arguments that are right.

    Attributes:
        call: takes the arguments by name.
        right: these.
        also: argument -> how messages may call it besides.
    """

    call: Callable[..., Any]
    right: dict[str, Any]
    also: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def complaints(self, odd: dict[str, Callable[[], Any]] = ODD) -> Iterator[str]:
        """Calls that end in neither a result nor an error that names the argument."""
        for argument in self.right:
            for name, make in odd.items():
                told = self._told(argument, make())
                if told is not None:
                    yield f"{argument}={name}: {told}"

    def _told(self, argument: str, value: Any) -> str | None:
        try:
            self.call(**{**self.right, argument: value})
        except ReachedError:
            return None
        except FasttraceError as error:
            names = (argument, argument.removesuffix("s"), *self.also.get(argument, ()))
            return None if any(name in str(error) for name in names) else f"is not named in {str(error)[:200]!r}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        return None


@cache
def tracer():
    tokenizer = byte_level()
    return fasttrace.Tracer(tiny_model("gpt2", vocab_size=len(tokenizer)), tokenizer)


@cache
def traced():
    return tracer().trace(**{**TRACE, "streams": ("block_output", "mlp_output"), "direction": "denoising"})


@cache
def record():
    return Record(Fact("1", PROMPT, "Needle"), traced())


@cache
def averages():
    return average([record()], bootstrap=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of three facts."""
    folder = tmp_path_factory.mktemp("store") / "run"
    run(tracer(), read_facts(facts_of(3)), folder, samples=1, noise=1.0, window=2)
    return Store.read(folder)


def test_every_public_function_has_a_door(store):
    doors = {name.partition(".")[0] for name in (*tracing_doors(store), *other_doors(store))}
    public = {name for name in fasttrace.__all__ if inspect.isfunction(getattr(fasttrace, name))}
    methods = {name for name, _ in inspect.getmembers(fasttrace.Tracer, inspect.isfunction) if not name.startswith("_")}
    assert public | methods - {"identity", "study_of"} <= doors


def opened(folder, fingerprint):
    return Store.open(f"new{next(COUNT)}" if isinstance(folder, str) and folder == "new" else folder, fingerprint)


def running(**options):
    tracer().run(folder=f"run{next(COUNT)}", **options)


def into(folder):
    tracer().run(facts_of(1), f"run{next(COUNT)}" if isinstance(folder, str) and folder == "run" else folder, **FEW)


def tracing_doors(_store):
    spans = {"prompt": ("token",)}
    many = {name: MANY[name] for name in MANY if name != "facts"}
    return {
        "trace": Door(tracer().trace, TRACE, spans),
        "trace.pair": Door(tracer().trace, PAIR, {"prompt": ("token",), "target": ("token",), "foil": ("token",)}),
        "trace_both": Door(tracer().trace_both, PAIR, {"prompt": ("token",), "target": ("token",), "foil": ("token",)}),
        "sweep": Door(tracer().sweep, PAIR | {"cells": [("mlp_output", 0, 1)]}, {"prompt": ("token",)}),
        "sweep.grid": Door(
            lambda **grid: tracer().sweep(cells=Grid(**grid), **PAIR),
            {"streams": "mlp_output", "window": 1, "positions": "each", "direction": "noising"},
        ),
        "ablate": Door(tracer().ablate, ABLATE, {"prompt": ("token",), "target": ("token",), "foil": ("token",)}),
        "trace_many": Door(lambda **options: list(tracer().trace_many(**options)), MANY, {"facts": FACTS}),
        "run": Door(running, {**many, "facts": facts_of(1), "shard": "facts", "progress": None}, {"facts": FACTS}),
        "run.folder": Door(into, {"folder": "run"}, {"folder": ("write",)}),
    }


def other_doors(store):
    result, averaged, stream = traced(), averages(), "mlp_output"
    of_n, writes, draws = {"n": ("n=",)}, {"path": ("write",)}, {"path": ("write", "format")}
    span = {"prompt": PROMPT, "subject": (0, 1), "target": None, "first_target_token": False, "tell": True}
    options = {**Settings().described(), "streams": None, "noise_subjects": None}
    pages = {"title": None, "about": None, "bad_rows": (), "notes": (), "missing": 0, "shown": None}
    roles = {"averages": averaged, "stream": stream}
    rome = {"stream": stream, "known_id": 3, "correct_prediction": True}
    means = {"records": [record()], "value": "prob", "compat": None, "bootstrap": 5, "seed": 0, "notes": ()}
    means |= {"shown": None}
    exports = {"store": store, "kind": "csv", "shown": None, "spreadsheet_safe": True}
    return {
        "encode": Door(tracer().encode, span, {"prompt": ("token",)}),
        "windows": Door(tracer().windows, {"streams": None, "window": 2}),
        "windows_of": Door(windows_of, {"streams": (stream,), "window": 2}),
        "choose_engine": Door(tracer().choose_engine, {"engine": "reference"}),
        "Settings": Door(Settings, options),
        "read_facts": Door(read_facts, {"source": facts_of(2), "strict": False, "limit": None}, {"source": FACTS}),
        "average": Door(average, means, {"records": ("no fact",)}),
        "average.shown": Door(lambda shown: fasttrace.average(store, shown=shown, bootstrap=0), {"shown": None}),
        "write_report.shown": Door(lambda shown: fasttrace.write_report(store, "b.html", shown=shown), {"shown": None}),
        "Averages.strongest": Door(averaged.strongest, {"stream": stream, "n": 1}, of_n),
        "Averages.save_csv": Door(averaged.save_csv, {"path": "a.csv"}, writes),
        "token_roles": Door(token_roles, {"span": (0, 1), "n_positions": 4, "compat": None}, {"span": ("subject",)}),
        "grid": Door(result.grid, {"stream": stream, "value": "prob"}),
        "strongest": Door(result.strongest, {"stream": stream, "n": 2}, of_n),
        "top_tokens": Door(result.top_tokens, {"run": "clean", "n": 2}, of_n),
        "summary": Door(result.summary, {"n": 2}, of_n),
        "save": Door(result.save, {"path": "a.parquet"}, writes),
        "to_csv": Door(result.to_csv, {"folder": "csv"}, {"folder": ("write",)}),
        "save_rome_npz": Door(result.save_rome_npz, {"path": "a.npz", **rome}, writes),
        "rome_file_name": Door(rome_file_name, {"known_id": 3, "stream": stream}),
        "plot": Door(result.plot, {"stream": stream}),
        "plot_stream": Door(plot_stream, {"result": result, "stream": stream}),
        "plot_figure": Door(plot_figure, {"result": result}),
        "save_figure": Door(save_figure, {"result": result, "path": "a.png", "dpi": 20}, draws),
        "plot_roles": Door(plot_roles, roles),
        "save_roles": Door(save_roles, {**roles, "path": "a.png", "dpi": 20}, draws),
        "save_lines": Door(save_lines, {"averages": averaged, "path": "b.png", "dpi": 20}, draws),
        "load": Door(fasttrace.load, {"path": "none.parquet"}, {"path": ("nothing at", "a folder at")}),
        "write_report": Door(write_report, {"records": [record()], "path": "a.html", **pages}, writes),
        "export": Door(lambda **given: export(out=f"out{next(COUNT)}", **given), exports, {"kind": ("format",)}),
        "export.out": Door(lambda out: export(store, out, "csv"), {"out": "out"}, {"out": ("write", "holds")}),
        "Store.read": Door(Store.read, {"folder": store.folder}, {"folder": ("no manifest",)}),
        "Store.open": Door(opened, {"folder": "new", "fingerprint": {"model": "a"}}, {"folder": ("write",)}),
        "Store.remaining": Door(store.remaining, {"facts": facts_of(2)}),
        "Store.write": Door(lambda **given: opened("new", {}).write(**given), {"records": [record()], "rank": 0}),
        "Store.coverage": Door(store.coverage, {"everything": False}),
        "Store.facts": Door(store.facts, {"shown": None}),
    }


OTHERS = """
encode windows windows_of choose_engine Settings read_facts average average.shown write_report.shown
Averages.strongest Averages.save_csv token_roles grid strongest top_tokens summary save to_csv save_rome_npz
rome_file_name plot plot_stream plot_figure save_figure plot_roles save_roles save_lines load write_report export
export.out Store.read Store.open Store.remaining Store.write Store.coverage Store.facts
"""
NAMES = tuple(OTHERS.split())
TRACING = ("trace", "trace.pair", "trace_both", "sweep", "sweep.grid", "ablate", "trace_many", "run", "run.folder")


@pytest.fixture
def up_to_the_engine(monkeypatch):
    """The choice of an engine, with its self-check, ends a trace: whatever is wrong has been said before."""

    def reached(*_args):
        raise ReachedError

    monkeypatch.setattr(api, "choose", reached)


def test_the_tables_have_every_door(store):
    assert (*tracing_doors(store), *other_doors(store)) == (*TRACING, *NAMES)


@pytest.mark.parametrize("name", TRACING)
def test_an_odd_argument_of_a_trace_is_taken_or_named_before_the_self_check(
    name, store, up_to_the_engine, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "\n".join(tracing_doors(store)[name].complaints()) == ""


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_argument_is_taken_or_named(name, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "_plotly_script", lambda: "")
    assert "\n".join(other_doors(store)[name].complaints()) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trace", "trace_many", "run"])
def test_a_trace_with_an_odd_argument_ends_in_grids_or_names_it(name, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = tracing_doors(store)[name].complaints()
    assert "\n".join(each for each in found if not each.startswith("progress=")) == ""  # what it raises is the user's


# What depends on the model is said before the self-check too.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": [5, 10**6]}, PromptError, "the prompt has token id 1000000, the model knows 0"),
        ({"prompt": [-1, 5], "subject": (0, 1)}, PromptError, "the prompt has token id -1"),
        ({"prompt": "The " * 40}, PromptError, "positions for 32"),
        ({"prompt": b"bytes"}, PromptError, "prompt is b'bytes': expected text, or a list"),
        ({"prompt": torch.zeros(2, 4)}, PromptError, r"prompt\[0\] is"),
        ({"prompt": {"input_ids": [1]}}, PromptError, r"prompt is what a tokenizer returned: give its \['input_ids'\]"),
        ({"subject": (5, 2)}, PromptError, r"subject span \(5, 2\) covers no tokens"),
        ({"subject": (0, 99)}, PromptError, r"subject span \(0, 99\) covers no tokens"),
        ({"subject": (0.0, 2.0)}, PromptError, r"subject\[0\] is 0.0"),
        ({"subject": {0, 2}}, PromptError, "subject is {0, 2}; give its text, or a half-open token span"),
        ({"subject": "Eiffel"}, PromptError, "subject"),
        ({"target": 10**6}, PromptError, "target is 1000000; give text, or a token id from 0 to"),
        ({"target": 1.0}, PromptError, r"target is 1.0: expected a whole number \(a token id; or give text\)"),
        ({"target": True}, PromptError, "target is True"),
        ({"noise": 1e39}, PlanError, "noise has standard deviation 1e.39 and torch.float32 holds noise of up to"),
        ({"noise": "s3", "noise_subjects": [10**6]}, PromptError, "subject .*1000000.* has token id 1000000"),
        ({"noise": "s" + "9" * 400}, PlanError, "the factor of noise is inf"),
        ({"progress": 3}, PlanError, "progress is 3: expected a function, or None"),
        (
            {"samples": 10**8},
            PlanError,
            r"samples is 100000000: expected a whole number from 1 to 1000000 \(noise draws\)",
        ),
        ({"streams": {"mlp_output"}}, PlanError, "streams is {'mlp_output'}, and a set has no order"),
        ({"streams": []}, PlanError, "no stream given"),
        ({"engine": "warp"}, EngineError, "unknown engine 'warp'; choose from auto, wavefront"),
    ],
)
def test_what_is_wrong_is_said_before_the_self_check(options, error, message, up_to_the_engine):
    with pytest.raises(error, match=message):
        tracer().trace(**{**TRACE, **options})


def test_a_stream_that_the_model_has_not_is_said_before_the_self_check(up_to_the_engine):
    experts = fasttrace.Tracer(tiny_model("mixtral"))
    with pytest.raises(ModelError, match="mlp_activation"):
        experts.trace([5, 6, 7, 8], subject=(0, 2), streams=["mlp_activation"])


def test_samples_that_memory_cannot_hold_are_refused_with_numbers(monkeypatch, up_to_the_engine):
    class Little:
        available = 2**20

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(
        PlanError, match=r"samples is 500000: .* would take \d+\.\d GiB, and 0\.0 GiB .*; give at most \d+"
    ):
        tracer().trace(**{**TRACE, "samples": 500_000})
    with pytest.raises(PlanError, match="samples is 500000"):
        tracer().trace_many(**{**MANY, "samples": 500_000})
    with pytest.raises(ReachedError):
        tracer().trace(**{**TRACE, "samples": 10})


def out_of_memory(*_args, **_options):
    raise MemoryError("Unable to allocate 9.1 GiB for an array")


def out_of_host_memory(*_args, **_options):
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize("fails", [out_of_memory, out_of_host_memory])
@pytest.mark.parametrize("call", [lambda: tracer().trace(**TRACE), lambda: list(tracer().trace_many(**MANY))])
def test_memory_that_runs_out_before_a_pass_is_an_error_of_ours(call, fails, monkeypatch):
    monkeypatch.setattr(corruption.Noise, "drawn", fails)
    with pytest.raises(EngineError, match=r"out of memory while tracing \(.*allocate.*\): lower samples or budget"):
        call()


def test_memory_for_the_bootstrap_is_counted(monkeypatch):
    class Little:
        available = 2**20

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(PlanError, match=r"bootstrap is 1000000: its draws would take .*; give at most"):
        average([record()] * 50, bootstrap=10**6)


# Values that are taken.


@pytest.mark.parametrize(
    "options",
    [
        {"samples": np.uint8(3), "seed": np.arange(5)[4], "window": np.int16(2), "budget": np.int64(500)},
        {"samples": torch.tensor(3), "seed": np.array(4), "noise": np.float32(1.0), "window": torch.tensor(2)},
        {"noise": Fraction(1), "first_target_token": np.False_, "engine": np.str_("reference")},
        {"noise": Decimal("1.0"), "streams": Text.STREAM, "window": Index()},
        {"noise": 1, "streams": np.array(["mlp_output"]), "samples": np.array(3)},
        {"streams": (name for name in ["mlp_output"])},
        {"streams": pd.Series(["mlp_output"])},
        {"prompt": np.array([5, 6, 7, 8]), "target": np.int64(9), "subject": np.array([1, 3])},
        {"prompt": torch.tensor([[5, 6, 7, 8]]), "target": torch.tensor(9), "subject": range(1, 3)},
        {"prompt": pd.Series([5, 6, 7, 8]), "target": np.array(9), "subject": slice(1, 3)},
        {"prompt": (np.int64(each) for each in (5, 6, 7, 8)), "subject": [1, 3]},
        {"prompt": range(5, 9), "subject": (np.int8(1), torch.tensor(3))},
    ],
)
def test_other_packages_numbers_give_the_same_result_and_the_same_file(options, tmp_path):
    plain = {"prompt": [5, 6, 7, 8], "subject": (1, 3), "target": 9, "samples": 3, "seed": 4, "window": 2}
    plain |= {"noise": 1.0, "streams": ("mlp_output",), "engine": "reference"}
    found, expected = (tracer().trace(**{**plain, **given}) for given in (options, {}))
    assert found == expected
    found.save(tmp_path / "a.parquet")
    assert fasttrace.load(tmp_path / "a.parquet") == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The Needle", ("The Needle",)),
        (["The Needle"], ("The Needle",)),
        (pd.Series(["The Needle", "Seattle"]), ("The Needle", "Seattle")),
        ([5, np.int64(6)], ((5, 6),)),
        (np.array([5, 6]), ((5, 6),)),
        (np.array([[5, 6], [7, 8]]), ((5, 6), (7, 8))),
        ([[5, 6], "Seattle"], ((5, 6), "Seattle")),
        (torch.tensor([5, 6]), ((5, 6),)),
    ],
)
def test_a_single_subject_of_the_noise_is_one_subject(given, expected):
    assert Settings(noise_subjects=given).noise_subjects == expected


def test_one_text_as_noise_subjects_measures_the_same_noise_as_a_list_of_it():
    options = {**TRACE, "noise": "s3"}
    one, several, letters = (
        tracer().trace(**{**options, "noise_subjects": given}).metadata["sigma"]
        for given in ("Needle", ["Needle"], list("Needle"))
    )
    assert one == several
    assert one != letters


def test_true_is_not_one():
    for name in ("window", "samples", "seed", "budget", "noise"):
        for true in (True, np.True_, torch.tensor(True)):
            with pytest.raises(PlanError, match=f"{name} .*True"):
                Settings(**{name: true})
    for name in ("first_target_token", "require_correct", "strict"):
        for one in (1, 0, "no", None):
            with pytest.raises(PlanError, match=f"{name} is .*: expected True or False"):
                Settings(**{name: one})


def test_a_window_wider_than_any_model_is_clipped_to_the_model():
    wide, all_blocks = (tracer().trace(**{**TRACE, "window": window}) for window in (2**31 - 1, 100))
    np.testing.assert_array_equal(wide.grid("mlp_output"), all_blocks.grid("mlp_output"))


# Settings are the one place of the defaults.


@pytest.mark.parametrize("call", [fasttrace.Tracer.trace, fasttrace.Tracer.trace_many])
def test_every_signature_has_the_defaults_of_settings(call):
    signature = inspect.signature(call).parameters
    shared = [each.name for each in fields(Settings) if each.name in signature]
    assert len(shared) >= 8
    for name in shared:
        assert signature[name].default == getattr(Settings, name), name


def test_settings_are_described_as_json():
    given = Settings(streams=["mlp_output"], noise_subjects=[[1, 2], "a"], samples=np.int64(3))
    described = given.described()
    assert json.loads(json.dumps(described)) == described
    assert described["noise_subjects"] == [[1, 2], "a"]
    assert Settings(**described) == given


def test_the_names_of_engines_are_known_without_loading_them():
    assert tuple(ENGINES) == ENGINE_NAMES


# Many samples.


@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 60), st.sampled_from(["narrow", "suffix", "full"]))
def test_the_largest_pack_of_many_samples_is_told_from_one(n_layers, n_positions, samples, layout):
    cells = tuple(cell for stream in fasttrace.STREAMS for cell in grid_cells(stream, 2, n_layers, n_positions))
    many = make_job(n_positions, (0, 1), samples, cells)
    assert many.peak_tokens(n_layers, layout) == many.plan(n_layers, layout).peak_tokens


def test_thousands_of_samples_take_thousands_of_passes():
    def constant(_anatomy, job, _tick):
        passes.append(job.samples)
        return blank_scores(job, 5)

    passes: list[int] = []
    engine = replace(ENGINES["wavefront"], run=constant)
    job = make_job(3, (0, 1), 2500, all_grids(("block_output",), 1, 3))
    budget = Budget(job.part(slice(None), slice(1)).peak_tokens(N_LAYERS, engine.layout))
    scores, _ = run_in_passes(engine, tiny_anatomy("gpt2"), job, budget)
    assert passes == [1] * 2500
    assert scores.cells.shape[1] == 2500


# torch's defaults.


@contextmanager
def other_defaults(device=None, dtype=torch.float32):
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "defaults",
    [
        lambda: other_defaults("meta"),
        lambda: torch.device("meta"),
        lambda: other_defaults(dtype=torch.float64),
        lambda: other_defaults(dtype=torch.float16),
    ],
    ids=["device", "context", "float64", "float16"],
)
@pytest.mark.parametrize("engine", ["auto", "rows", "reference"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bloom"])
def test_torchs_defaults_change_nothing(model_type, engine, defaults):
    options = {"noise": "s3", "samples": 2, "window": 2, "engine": engine}

    model = tiny_model(model_type)

    def grids():
        fresh = fasttrace.Tracer(model)
        memories.clear("models")
        return fresh.trace([5, 6, 7, 8], subject=(1, 3), **options)

    expected = grids()
    with defaults():
        found = grids()
    for stream in expected.streams:
        np.testing.assert_array_equal(found.grid(stream), expected.grid(stream))
    assert found.metadata["engine"] == expected.metadata["engine"]


def test_facts_are_traced_whatever_the_default_device():
    options = {**MANY, "engine": "auto", "require_correct": True}
    expected = list(tracer().trace_many(**options))
    with other_defaults("meta", torch.float64):
        found = list(tracer().trace_many(**options))
    assert [each.result for each in found] == [each.result for each in expected]
    assert [each.reason for each in found] == [each.reason for each in expected]


# Sources without an end.


def test_a_source_without_facts_and_without_an_end_is_left():
    with pytest.raises(PromptError, match="no facts in count"):
        read_facts(itertools.count())
