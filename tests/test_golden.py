"""Numbers that no change of the code may move: to the last bit on the machine that recorded them, elsewhere to 1e-6."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import golden

RECORDED = np.load(golden.FILE)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The numbers of a process of their own: settings that other tests leave in this one move last bits."""
    path = tmp_path_factory.mktemp("golden") / "found.npz"
    command = [sys.executable, "-m", "tests.helpers.golden", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return np.load(path)


def test_the_same_numbers_are_there(found):
    assert set(found.files) == set(RECORDED.files)


@pytest.mark.parametrize("name", sorted({*RECORDED.files} - {"machine"}))
def test_no_number_has_moved(found, name):
    values, recorded = found[name], RECORDED[name]
    if values.dtype.kind == "U" or str(RECORDED["machine"]) == str(found["machine"]):
        moved = np.abs(values - recorded).max() if values.dtype.kind == "f" else "a text"
        assert np.array_equal(values, recorded), f"moved by {moved}"
    else:
        np.testing.assert_allclose(values, recorded, rtol=0, atol=1e-6)
