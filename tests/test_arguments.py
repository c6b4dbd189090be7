"""Wrong arguments: an error of fasttrace that names the argument, before anything is computed."""

import enum
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fasttrace
from fasttrace import FasttraceError, api
from fasttrace.aggregate import average, token_roles
from fasttrace.average_plots import plot_roles, save_lines, save_roles
from fasttrace.cells import windows_of
from fasttrace.datasets import Fact, read_facts
from fasttrace.engines import ENGINES
from fasttrace.exports import export
from fasttrace.plots import plot_figure, plot_stream, save_figure
from fasttrace.report import write_report
from fasttrace.rome import rome_file_name
from fasttrace.runs import run
from fasttrace.settings import Settings
from fasttrace.stores import Record, Store
from tests.run_facts import facts_of
from tests.tokenizers import byte_level
from tests.zoo import tiny_model

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
    "engine": "reference",
    "budget": "auto",
    "first_target_token": False,
    "progress": None,
}
MANY = {name: TRACE[name] for name in TRACE if name not in ("prompt", "subject", "target", "first_target_token")}
MANY = {name: value for name, value in MANY.items() if name != "progress"}
MANY |= {"facts": facts_of(2), "require_correct": False, "strict": False}


FACTS = ("source", "facts", "file", "columns")
"""What messages call the source of facts."""
COUNT = itertools.count()


class Text(str, enum.Enum):
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
        odd: those to be tried with odd values; all by default.
        also: argument -> how a message may call it besides.
    """

    call: Callable[..., Any]
    right: dict[str, Any]
    odd: tuple[str, ...] = ()
    also: dict[str, tuple[str, ...]] = field(default_factory=dict)


def tracer():
    tokenizer = byte_level()
    return fasttrace.Tracer(tiny_model("gpt2", vocab_size=len(tokenizer)), tokenizer)


TRACER = tracer()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of three facts."""
    folder = tmp_path_factory.mktemp("store") / "run"
    run(TRACER, read_facts(facts_of(3)), folder, samples=1, noise=1.0, window=2)
    return Store.read(folder)


@pytest.fixture(scope="module")
def result():
    return TRACER.trace(**{**TRACE, "streams": ("block_output", "mlp_output")})


def _opened(folder, fingerprint):
    return Store.open(f"new{next(COUNT)}" if isinstance(folder, str) and folder == "new" else folder, fingerprint)


def doors(store, result) -> dict[str, Door]:
    """The public functions; each makes what it changes anew."""
    record = Record(Fact("1", PROMPT, "Needle"), result)
    averages = average([record], bootstrap=0)
    spans = {"prompt": ("token", "prompt"), "subject": ("subject",)}
    return {
        "trace": Door(TRACER.trace, TRACE, also=spans),
        "trace_many": Door(lambda **options: list(TRACER.trace_many(**options)), MANY, also={"facts": FACTS}),
        "run": Door(
            lambda **options: run(TRACER, read_facts(facts_of(1)), Path("run"), **options),
            {**{name: MANY[name] for name in MANY if name != "facts"}, "shard": "facts"},
        ),
        "encode": Door(
            TRACER.encode,
            {"prompt": PROMPT, "subject": (0, 1), "target": None, "first_target_token": False, "tell": True},
        ),
        "windows": Door(TRACER.windows, {"streams": None, "window": 2}),
        "windows_of": Door(windows_of, {"streams": ("mlp_output",), "window": 2}),
        "choose_engine": Door(TRACER.choose_engine, {"engine": "reference"}),
        "Settings": Door(Settings, dict.fromkeys(("streams", "noise_subjects")) | Settings().described()),
        "read_facts": Door(
            read_facts,
            {"source": facts_of(2), "strict": False, "limit": None},
            also={"source": FACTS},
        ),
        "average": Door(
            average,
            {"records": [record], "value": "prob", "compat": None, "bootstrap": 5, "seed": 0},
            also={"records": ("no fact",)},
        ),
        "Averages.strongest": Door(averages.strongest, {"stream": "mlp_output", "n": 1}, also={"n": ("n=",)}),
        "Averages.save_csv": Door(averages.save_csv, {"path": "a.csv"}, also={"path": ("write",)}),
        "token_roles": Door(
            token_roles, {"span": (0, 1), "n_positions": 4, "compat": None}, also={"span": ("subject",)}
        ),
        "grid": Door(result.grid, {"stream": "mlp_output", "value": "prob"}),
        "strongest": Door(result.strongest, {"stream": "mlp_output", "n": 2}, also={"n": ("n=",)}),
        "top_tokens": Door(result.top_tokens, {"run": "clean", "n": 2}, also={"n": ("n=",)}),
        "summary": Door(result.summary, {"n": 2}, also={"n": ("n=",)}),
        "save": Door(result.save, {"path": "a.parquet"}, also={"path": ("write",)}),
        "to_csv": Door(result.to_csv, {"folder": "csv"}, also={"folder": ("write",)}),
        "save_rome_npz": Door(
            result.save_rome_npz,
            {"path": "a.npz", "stream": "mlp_output", "known_id": 3, "correct_prediction": True},
            also={"path": ("write",)},
        ),
        "rome_file_name": Door(rome_file_name, {"known_id": 3, "stream": "mlp_output"}),
        "plot": Door(result.plot, {"stream": "mlp_output"}),
        "plot_stream": Door(plot_stream, {"result": result, "stream": "mlp_output"}),
        "plot_figure": Door(plot_figure, {"result": result}),
        "save_figure": Door(
            save_figure, {"result": result, "path": "a.png", "dpi": 20}, also={"path": ("format", "write")}
        ),
        "plot_roles": Door(plot_roles, {"averages": averages, "stream": "mlp_output"}),
        "save_roles": Door(
            save_roles,
            {"averages": averages, "path": "a.png", "stream": "mlp_output", "dpi": 20},
            also={"path": ("format", "write")},
        ),
        "save_lines": Door(
            save_lines, {"averages": averages, "path": "b.png", "dpi": 20}, also={"path": ("format", "write")}
        ),
        "load": Door(fasttrace.load, {"path": "none.parquet"}, also={"path": ("nothing at", "a folder at")}),
        "write_report": Door(
            write_report,
            {"records": [record], "path": "a.html", "title": None, "about": None, "bad_rows": (), "notes": ()},
            also={"path": ("write",)},
        ),
        "export": Door(export, {"store": store, "out": "out", "kind": "csv"}, also={"out": ("write",)}),
        "Store.read": Door(Store.read, {"folder": store.folder}, also={"folder": ("no manifest", "write")}),
        "Store.open": Door(_opened, {"folder": "new", "fingerprint": {"model": "a"}}, also={"folder": ("write",)}),
        "Store.remaining": Door(store.remaining, {"facts": facts_of(2)}),
        "Store.write": Door(lambda **given: Store.open("other", {}).write(**given), {"records": [record], "rank": 0}),
    }


DRAWN = ("save_figure", "save_roles", "save_lines", "plot", "plot_stream", "plot_figure", "plot_roles")
NAMES = tuple(
    doors_names := (
        "trace",
        "trace_many",
        "run",
        "encode",
        "windows",
        "windows_of",
        "choose_engine",
        "Settings",
        "read_facts",
        "average",
        "Averages.strongest",
        "Averages.save_csv",
        "token_roles",
        "grid",
        "strongest",
        "top_tokens",
        "summary",
        "save",
        "to_csv",
        "save_rome_npz",
        "rome_file_name",
        "plot",
        "plot_stream",
        "plot_figure",
        "save_figure",
        "plot_roles",
        "save_roles",
        "save_lines",
        "load",
        "write_report",
        "export",
        "Store.read",
        "Store.open",
        "Store.remaining",
        "Store.write",
    )
)


def complaints(door: Door, values=ODD) -> list[str]:
    """What ends in neither a result nor an error that names the argument."""
    found = []
    for argument in door.odd or door.right:
        for name, make in values.items():
            try:
                door.call(**{**door.right, argument: make()})
            except ReachedError:
                pass
            except FasttraceError as error:
                message, known_as = str(error), (argument, argument.rstrip("s"), *door.also.get(argument, ()))
                if not any(each in message for each in known_as):
                    found.append(
                        f"{argument}={name}: the message does not name it: {type(error).__name__}: {message[:150]}"
                    )
            except Exception as error:
                found.append(f"{argument}={name}: {type(error).__name__}: {str(error)[:150]}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_argument_is_taken_or_named(name, store, result, tmp_path, monkeypatch):
    def reached(*_args):
        raise ReachedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "choose", reached)
    monkeypatch.setattr(ENGINES["reference"].__module__ and api, "choose", reached)
    assert "\n".join(complaints(doors(store, result)[name])) == ""
