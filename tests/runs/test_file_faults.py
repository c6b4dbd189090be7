"""A run whose n-th file call fails, for every n: nothing is lost, nothing half written counts, and the run goes on."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.run_facts import environment, facts_of, save_model, write_facts

EVERY = "FASTTRACE_EVERY_CALL"
"""Set it, and every call fails once; otherwise each of some twelve."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")
@pytest.mark.parametrize(("begun", "first"), [("new", 2), ("begun", 5)])
@pytest.mark.parametrize("fault", ["full", "once"])
def test_a_run_whose_nth_file_call_fails_loses_nothing_and_the_next_start_completes_it(tmp_path, fault, begun, first):
    model = save_model(tmp_path / "model")
    facts = write_facts(tmp_path / "facts.jsonl", facts_of(20))
    first, step = (1, 1) if os.environ.get(EVERY) else (first, 8)
    command = map(
        str, (sys.executable, "-m", "tests.helpers.file_faults", model, facts, tmp_path, fault, begun, first, step)
    )
    done = subprocess.run([*command], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) > 3
    assert any(each["error"] for each in runs)
    assert runs[-1]["calls"] < runs[-1]["n"]
    for each in runs:
        if each["error"] is not None:
            is_ours, message = each["error"]
            assert is_ours, each
            assert "\n" not in message, each
        assert set(each["said"]) <= set(each["done"]), each
        assert each["damaged"] == 0, each
        assert each["again"] is None, each
        assert each["same"], each
