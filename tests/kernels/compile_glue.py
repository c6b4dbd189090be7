"""The token-wise kernels, compiled for sm_80 and sm_90 as their launchers launch them.

`python -m pytest -s tests/kernels/compile_*.py`, with triton installed and without TRITON_INTERPRET. Launches are
caught on meta tensors, so that tiles, warps and flags are the real ones. What is refused: register spills on sm_90
(a few are let pass on sm_80), more shared memory than there is, products in half precision that miss the tensor cores,
loads and stores narrower than 128 bits.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from fasttrace_kernels import launch as launch_module
from fasttrace_kernels import rms_norm as rms_norm_module
from fasttrace_kernels import rotary as rotary_module
from fasttrace_kernels import swiglu as swiglu_module

from tests.kernels import aot

HALF = (torch.float16, torch.bfloat16)
ROWS = 4046


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(dtype: torch.dtype, d: int, **options: Any) -> None:
    rms_norm_module.rms_norm(empty(ROWS, d, dtype=dtype), empty(d, dtype=dtype), 1e-6, **options, backend="triton")


def product(dtype: torch.dtype, n: int, activation: str) -> None:
    swiglu_module.swiglu(empty(ROWS, n, dtype=dtype), empty(ROWS, n, dtype=dtype), activation, backend="triton")


def rotation(dtype: torch.dtype, heads: int, key_heads: int, dim: int, rotated: int) -> None:
    q, k = (empty(1, ROWS, n, dim, dtype=dtype).transpose(1, 2) for n in (heads, key_heads))
    angles = empty(1, ROWS, rotated, dtype=dtype)
    rotary_module.rotary(q, k, angles, angles, backend="triton")


GEMMA = {"offset": 1.0, "round_before_weight": False}
CASES: dict[str, Callable[[torch.dtype], None]] = {
    **{f"norm of {d}": lambda dtype, d=d: norm(dtype, d) for d in (128, 576, 4096, 16384)},
    "Gemma's norm of 2304": lambda dtype: norm(dtype, 2304, **GEMMA),
    "silu of 1536": lambda dtype: product(dtype, 1536, "silu"),
    "gelu of 9216": lambda dtype: product(dtype, 9216, "gelu_tanh"),
    "rotation of SmolLM2": lambda dtype: rotation(dtype, 9, 3, 64, 64),
    "rotation of Llama 3 8B": lambda dtype: rotation(dtype, 32, 8, 128, 128),
    "rotation of Phi 2": lambda dtype: rotation(dtype, 32, 32, 80, 32),
}
OTHERS = {
    torch.float16: ("norm of 4096", "silu of 1536", "rotation of SmolLM2"),
    torch.float32: (
        "norm of 4096",
        "gelu of 9216",
        "rotation of Phi 2",
    ),
}
PAIRS = [(case, torch.bfloat16) for case in CASES] + [(case, dtype) for dtype in OTHERS for case in OTHERS[dtype]]


@cache
def machine_code(case: str, dtype: torch.dtype, capability: int) -> dict[str, aot.MachineCode]:
    """What each launch of a case compiles to, by the name of its kernel."""
    found = {}

    def catch(function: Callable[..., None], _programs: int, *args: Any, **options: Any) -> None:
        constants = {name: value for name, value in options.items() if name.isupper()}
        arguments = inspect.signature(function).bind(*args, **constants).arguments
        compiler = {name: value for name, value in options.items() if not name.isupper()}
        found[function.__name__] = aot.compile_kernel(launch_module.jitted(function), arguments | compiler, capability)

    with pytest.MonkeyPatch.context() as patch:
        for module in (rms_norm_module, rotary_module, swiglu_module):
            patch.setattr(module, "launch", catch)
        CASES[case](dtype)
    return found


@pytest.mark.parametrize("capability", aot.ARCHITECTURES)
@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_compiles_to_code_that_fits_the_machine(case, dtype, capability):
    for name, code in machine_code(case, dtype, capability).items():
        print(aot.row(f"{case} {str(dtype)[6:]} {name[1:-7]}", capability, code))
        assert code.shared <= aot.ARCHITECTURES[capability]
        assert code.spills <= (0 if capability == 90 else 16)
        assert not code.serialized
        assert code.counts.get("LDG", 0) <= 16, "narrow loads"
        assert code.counts.get("STG", 0) <= 16, "narrow stores"


def test_rotation_adds_rounded_products():
    code = machine_code("rotation of SmolLM2", torch.float32, 90)["_rotary_kernel"]
    assert "FFMA" not in code.counts
