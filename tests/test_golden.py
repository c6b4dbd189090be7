"""Numbers that no change of the code may move: to the last bit on the machine that recorded them, elsewhere to 1e-6."""

import numpy as np
import pytest

from tests.helpers import golden

RECORDED = np.load(golden.FILE)


@pytest.mark.parametrize("part", golden.PARTS, ids=lambda part: part.__name__)
def test_no_number_has_moved(part):
    found = part()
    assert set(found) == {name for name in RECORDED.files if name.startswith(f"{part.__name__} ")}
    for name, values in found.items():
        if values.dtype.kind == "U" or str(RECORDED["machine"]) == golden.machine():
            moved = np.abs(values - RECORDED[name]).max() if values.dtype.kind == "f" else "a text"
            assert np.array_equal(values, RECORDED[name]), f"{name}: moved by {moved}"
        else:
            np.testing.assert_allclose(values, RECORDED[name], rtol=0, atol=1e-6, err_msg=name)
