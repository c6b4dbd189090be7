"""Compiles kernels for GPUs that are not here, and counts what the machine code does."""

import io
import re
import subprocess
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

ARCHITECTURES = {80: 163 << 10, 90: 227 << 10}
"""Compute capability -> shared memory that a program can have, in bytes."""

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class MachineCode:
    """What came out of a compilation.

    Attributes:
        registers: of a thread.
        spills: instructions that move a register to or from local memory.
        shared: bytes of shared memory of a program.
        counts: how often each instruction (up to its first dot) stands in the code.
        log: of ptxas.
    """

    registers: int
    spills: int
    shared: int
    counts: dict[str, int]
    log: str

    @property
    def serialized(self) -> bool:
        """Whether ptxas had to wait for each warp-group product before the next."""
        return "serializ" in self.log.lower()


def compile_kernel(kernel: Any, arguments: dict[str, Any], capability: int) -> MachineCode:
    """Compiles a kernel as a launch with these arguments would, on an aligned allocation.

    Args:
        kernel: a function decorated with `triton.jit`.
        arguments: by name, with num_warps and num_stages; tensors of any device, "meta" included.
        capability: 80 or 90.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = dict(arguments)
    options = {
        name: arguments.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in arguments
    }
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        signature[name] = _type_of(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assembly = _disassembled(compiled.asm["cubin"])
    counts: dict[str, int] = {}
    for instruction in re.findall(r"^\s*(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)", assembly, re.M):
        counts[instruction] = counts.get(instruction, 0) + 1
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    if registers is None:
        raise RuntimeError(f"ptxas did not say how many registers it used: {log.getvalue()!r}")
    return MachineCode(
        int(registers[1]),
        counts.get("LDL", 0) + counts.get("STL", 0),
        compiled.metadata.shared,
        counts,
        log.getvalue(),
    )


def row(name: str, capability: int, code: MachineCode) -> str:
    """A line of the table that is printed."""
    products = ", ".join(f"{code.counts[kind]} {kind}" for kind in ("HGMMA", "HMMA") if kind in code.counts)
    return (
        f"\n{name:42} sm_{capability}: {code.registers:3} registers, {code.spills:2} spills, "
        f"{code.shared / 1024:5.1f} KiB, {products or 'no tensor cores'}"
    )


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _disassembled(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], check=True, capture_output=True, text=True).stdout
