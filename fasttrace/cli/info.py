"""What `fasttrace info` shows: versions, devices, and how a model would be traced."""

import importlib.metadata
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fasttrace import __version__
from fasttrace.errors import ModelError
from fasttrace.models.cache import cache_folder
from fasttrace.models.embedded import MODELS, has_model

if TYPE_CHECKING:
    from fasttrace.api import Tracer

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "pandas", "pyarrow", "plotnine", "numba", "triton")


def rows() -> list[tuple[str, str]]:
    """Versions and devices, as (what, value)."""
    from fasttrace.models.loading import choose_device

    try:
        cache = str(cache_folder())
        models = [(name, _whether_there(name)) for name in MODELS]
    except ModelError as error:
        cache, models = f"none: {error}", []
    return [
        ("fasttrace", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((package, _version(package)) for package in PACKAGES),
        *_device_rows(),
        ("device auto", str(choose_device("auto"))),
        ("cache", cache),
        *models,
    ]


def _whether_there(name: str) -> str:
    fetched = MODELS[name].fetched / 1e6
    return "there" if has_model(name) else f"not there yet; the first use fetches it ({fetched:.0f} MB)"


def _device_rows() -> Iterator[tuple[str, str]]:
    import torch

    yield (
        "cpu",
        f"{torch.get_num_threads()} threads; dtype auto: float32, because float16 is far slower on a CPU",
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}", f"{properties.name}, {memory}; dtype auto: float16, the fastest there"


def model_rows(tracer: "Tracer") -> list[tuple[str, str]]:
    """A model's parts and its engine, as (what, value); runs the self-check.

    Raises:
        EngineError: no engine is right for the model.
    """
    from fasttrace.fusing.choose import kernel_compiler

    choice = tracer.choose_engine()
    error = choice.self_check_error
    compiler = kernel_compiler(tracer.anatomy) if tracer.fuse and choice.name == "wavefront" else None
    checked = "not run" if error is None else f"log-probabilities differ by at most {error:.1e} from plain passes"
    return [
        ("model", f"{tracer.name} ({type(tracer.model).__name__}), {tracer.dtype} on {tracer.device}"),
        *((f"  {part}", path) for part, path in tracer.modules.items()),
        ("streams", ", ".join(tracer.streams)),
        ("engine", f"{choice.name}: {choice.reason}"),
        ("self-check", checked),
        ("attention", "the model's own code" if compiler is None else f"compiled by {compiler} where the model allows"),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
