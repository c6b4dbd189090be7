"""Causal tracing of language models: the whole figure in one forward pass of the unmodified model."""

from fasttrace.api import Tracer
from fasttrace.cells import SITES, STREAMS
from fasttrace.cost import Cost
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
from fasttrace.results import TraceResult, load

__version__ = "0.1.0"

__all__ = [
    "ENGINES",
    "SITES",
    "STREAMS",
    "Cost",
    "EngineError",
    "FasttraceError",
    "ModelError",
    "NumericsError",
    "PlanError",
    "PromptError",
    "StoreError",
    "TraceResult",
    "Tracer",
    "load",
]
