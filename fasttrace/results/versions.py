"""Versions of what the numbers of a trace depend on."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
import transformers

from fasttrace import __version__
from fasttrace.fusing.choose import KERNEL_NEEDS
from fasttrace.memories import remembered

__all__ = ["versions"]


@remembered()
def versions() -> Mapping[str, str]:
    """Of what the numbers depend on, or may: what compiles kernels is named where it is installed."""
    found = {
        "fasttrace": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    for compiler in set(KERNEL_NEEDS.values()):
        with suppress(PackageNotFoundError):
            found[compiler] = version(compiler)
    return found
