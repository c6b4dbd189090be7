"""Causal tracing of language models: the whole figure in one forward pass of the unmodified model.

Names are imported when they are first asked for, so that the command line starts without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttrace.api import Tracer
    from fasttrace.engines import ENGINES
    from fasttrace.errors import (
        EngineError,
        FasttraceError,
        ModelError,
        NumericsError,
        PlanError,
        PromptError,
        StoreError,
    )
    from fasttrace.experiment.cells import SITES, STREAMS
    from fasttrace.facts.dataset import Fact, read_facts
    from fasttrace.planning.cost import Cost
    from fasttrace.reports.averages import average
    from fasttrace.reports.exports import export
    from fasttrace.reports.page import write_report
    from fasttrace.results.record import Record
    from fasttrace.results.result import TraceResult, load
    from fasttrace.runs.store import Store

__version__ = "0.1.0"

__all__ = [
    "ENGINES",
    "SITES",
    "STREAMS",
    "Cost",
    "EngineError",
    "Fact",
    "FasttraceError",
    "ModelError",
    "NumericsError",
    "PlanError",
    "PromptError",
    "Record",
    "Store",
    "StoreError",
    "TraceResult",
    "Tracer",
    "average",
    "export",
    "load",
    "read_facts",
    "write_report",
]

_HOMES = {"Tracer": "api", "SITES": "experiment.cells", "STREAMS": "experiment.cells", "Cost": "planning.cost"}
_HOMES |= {"ENGINES": "engines", "TraceResult": "results.result", "load": "results.result", "Record": "results.record"}
_HOMES |= {"average": "reports.averages", "export": "reports.exports", "write_report": "reports.page"}
_HOMES |= {"Store": "runs.store", "Fact": "facts.dataset", "read_facts": "facts.dataset"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fasttrace' has no attribute {name!r}")
    home = import_module(f"fasttrace.{_HOMES.get(name, 'errors')}")
    globals()[name] = getattr(home, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
