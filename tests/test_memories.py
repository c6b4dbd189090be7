"""What a process remembers: forgetting it changes no number, and a model goes when nobody holds it."""

import gc
import re
import weakref
from pathlib import Path

import numpy as np
import pytest

import fasttrace
from fasttrace import memories
from fasttrace.engines import self_check
from tests.conftest import FAMILIES
from tests.helpers.zoo import tiny_model

PACKAGE = Path(__file__).parents[1] / "fasttrace"
OPTIONS = {"subject": (1, 3), "noise": 0.5, "samples": 2, "window": 2, "target": 9}
NO_MEMORIES = {
    "memories.py": "here they are made",
    "engines/attention_ragged.py": "what is changed of a configuration while passes run",
    "models/hooks.py": "locks, which another thread may hold",
    "runs/processes.py": "what is done once in a process",
    "runs/shelf.py": "an object's own, which goes with it",
}


def trace(model, engine="auto"):
    return fasttrace.Tracer(model).trace([5, 6, 7, 8, 9], engine=engine, **OPTIONS)


@pytest.mark.parametrize("engine", ["auto", "rows", "fork", "reference"])
def test_forgetting_changes_no_number(family, engine):
    model = tiny_model(family)
    first, again = trace(model, engine), trace(model, engine)
    memories.clear()
    forgotten = trace(model, engine)
    for found in (again, forgotten):
        for stream in first.streams:
            np.testing.assert_array_equal(found.grid(stream), first.grid(stream))


def test_what_was_forgotten_is_found_out_again(family):
    model = tiny_model(family)
    trace(model)
    assert self_check._CHECKS[model]
    memories.clear("models")
    assert model not in self_check._CHECKS
    trace(model)
    assert self_check._CHECKS[model]


@pytest.mark.parametrize("engine", ["auto", "rows", "fork", "reference"])
def test_a_model_that_nobody_holds_is_freed(family, engine):
    model = tiny_model(family)
    trace(model, engine)
    alive = [weakref.ref(model), weakref.ref(next(model.parameters()))]
    del model
    gc.collect()
    assert [each() for each in alive] == [None, None]


def test_a_memory_by_module_goes_with_the_module():
    memory, model = memories.by_module(), tiny_model(FAMILIES[0])
    memory[model] = "known"
    del model
    gc.collect()
    assert not memory


def test_nothing_is_about_what_no_memory_is_about():
    with pytest.raises(KeyError, match="weather"):
        memories.clear("weather")


def test_no_memory_is_declared_elsewhere():
    ways = re.compile(r"\b(lru_cache|WeakKeyDictionary|WeakValueDictionary)\b|@cache\b|^_[A-Z_]+: dict\[.*= \{\}", re.M)
    own = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    found = {name for name, text in own.items() if ways.search(text)}
    assert found == NO_MEMORIES.keys()
