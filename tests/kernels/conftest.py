"""The kernels need nothing of fasttrace: with `--confcutdir=tests/kernels` these tests run beside torch and pytest."""

import os
from importlib.util import find_spec

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["interpreter_*.py", "shim.py", "guard.py"]
if find_spec("triton") is None:
    collect_ignore_glob += ["compile_*.py", "aot.py"]

torch.set_num_threads(1)
if INTERPRETED:
    from tests.kernels import shim

    shim.install()
