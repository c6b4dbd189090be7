"""Which machine, which versions, which commit: what every number is carried with."""

import os
import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import fasttrace

# Instruction sets that decide how fast a matmul can be.
ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
PACKAGES = ("torch", "transformers", "triton", "numba", "accelerate", "numpy", "pyvene", "transformer-lens", "nnsight")


def card(device: str = "cpu") -> dict[str, Any]:
    """The machine, the versions of what runs, and the commit."""
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else cpu_name(),
        "gpu": _gpu(device),
        "memory_gb": round(_memory_bytes(device) / 1e9, 1),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA_FLAGS if flag in _cpu_flags()],
        "python": platform.python_version(),
        "versions": {"fasttrace": fasttrace.__version__} | _versions(),
        "commit": commit(),
    }


def print_card(about: dict[str, Any]) -> None:
    """The card, in a few lines."""
    memory = f"{about['memory_gb']:.0f} GB"
    print(f"device: {about['device']}, {memory}, {about['cores']} cores, {about['threads']} threads")
    for name, value in about["gpu"].items():
        print(f"{name}: {value}")
    print(f"isa: {' '.join(about['isa']) or 'unknown'}")
    print("versions:", " ".join(f"{name}={found}" for name, found in about["versions"].items()))
    print(f"commit: {about['commit']}")


def slug(about: dict[str, Any]) -> str:
    """The device as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", f"{about['device']} {about['cores']} cores".lower()).strip("-")


def cpu_name() -> str:
    """The CPU's model name, or its architecture where the system does not tell."""
    names = re.findall(r"^model name\s*: (.*)$", _cpu_info(), re.MULTILINE)
    return names[0].strip() if names else platform.machine()


def _gpu(device: str) -> dict[str, Any]:
    """What times on a GPU depend on; empty for a CPU."""
    if torch.device(device).type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "float32 matmuls": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "float32",
    }


def _memory_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def commit() -> str:
    """The short commit, with `-dirty` if tracked files differ from it.

    Outside of git it is BENCH_COMMIT from the environment, or `unknown`.
    """
    try:
        found = _git("rev-parse", "--short=10", "HEAD")
        return f"{found}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else found
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCH_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    command, here = ["git", *arguments], Path(__file__).parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_flags() -> set[str]:
    found = re.search(r"^flags\s*: (.*)$", _cpu_info(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
