"""Numbers that no change of the code may move.

``python -m tests.helpers.golden`` records them anew, with a reason; ``python -m tests.helpers.golden FILE`` writes them
elsewhere, for comparison.
"""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from typer.testing import CliRunner

import fasttrace
from fasttrace.__main__ import app
from tests.helpers.run_facts import FLAGS, facts_of, save_model
from tests.helpers.zoo import tiny_model

FILE = Path(__file__).parents[1] / "golden.npz"
ENGINES = ("wavefront", "fork", "rows", "reference")
LIBRARY, ENGINE, BUDGET = "mkl", "wavefront", 8192
"""What multiplies, on which engine, in how large packs: choices by a stop watch or by free memory would round
differently from process to process."""


def machine() -> str:
    """What rounding depends on."""
    processor = next((line for line in _processor() if line.startswith("model name")), "").partition(": ")[2]
    words = (processor, torch.backends.cpu.get_cpu_capability(), torch.__version__, transformers.__version__)
    return ", ".join(word.strip() for word in words)


def demo() -> dict[str, np.ndarray]:
    """The three grids that `fasttrace demo` draws, with two samples."""
    tracer = fasttrace.Tracer.from_pretrained("smollm2", cpu_matmul=LIBRARY)
    prompt = "The Eiffel Tower is located in the city of"
    result = tracer.trace(prompt, subject="The Eiffel Tower", target=" Paris", samples=2, engine=ENGINE, budget=BUDGET)
    assert result.metadata["attention_by"] == "kernel", result.metadata
    return {
        **{f"demo {stream}": result.grid(stream) for stream in result.streams},
        "demo base": np.array([result.clean_prob, result.corrupted_prob]),
        "demo exact tokens": _digest(list(result.tokens), list(map(int, result.token_ids)), result.span),
    }


def engines() -> dict[str, np.ndarray]:
    """All grids of two tiny random models, from each engine."""
    found = {}
    for family in ("gpt2", "llama"):
        tracer = fasttrace.Tracer(tiny_model(family), cpu_matmul=LIBRARY)
        for engine in ENGINES:
            result = tracer.trace(
                [5, 9, 13, 21, 34, 55, 60], subject=(1, 3), samples=2, window=3, noise=1.0, engine=engine
            )
            found |= {f"engines {family} {engine} {stream}": result.grid(stream) for stream in result.streams}
    return found


def noise() -> dict[str, np.ndarray]:
    """The bits of the noise of Meng et al.: they depend on no machine."""
    from fasttrace.experiment.corruption import draw

    drawn = draw((1, 4), 5, sigma=0.13, samples=3, seed=1)
    return {"noise exact": _digest(drawn.noise.numpy().tobytes().hex())}


def store() -> dict[str, np.ndarray]:
    """What `fasttrace run` writes down of twelve facts."""
    with TemporaryDirectory() as scratch:
        model, source, folder = (Path(scratch, name) for name in ("model", "facts.jsonl", "run"))
        save_model(model, "llama")
        source.write_text("".join(json.dumps(asdict(fact)) + "\n" for fact in facts_of(12)))
        words = [
            "run",
            "--model",
            model,
            "--facts",
            source,
            "--out",
            folder,
            "--quiet",
            "--cpu-matmul",
            LIBRARY,
            *FLAGS,
        ]
        outcome = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
        assert outcome.exit_code == 0, outcome.output
        read = fasttrace.Store.read(folder)
        facts, cells = read.facts(), read.frame()
    exact = ["id", "prompt", "subject", "target", "status", "reason", "span_start", "span_stop", "target_token"]
    places = ["fact", "stream", "layer", "position", "token"]
    return {
        "store prob": cells["prob"].to_numpy(),
        "store base": facts[["clean_prob", "corrupted_prob"]].to_numpy(),
        "store exact facts": _digest(facts[exact].to_csv()),
        "store exact cells": _digest(cells[places].to_csv()),
    }


def _digest(*values: object) -> np.ndarray:
    return np.array(hashlib.sha256(repr(values).encode()).hexdigest())


def _processor() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


PARTS = (demo, engines, noise, store)

if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = {name: values for part in PARTS for name, values in part().items()}
    np.savez_compressed(sys.argv[1] if sys.argv[1:] else FILE, machine=np.array(machine()), **numbers)
