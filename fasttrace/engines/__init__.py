"""Engines: four ways to run the same cells, held to the same numbers.

`wavefront` runs a sweep in one packed forward pass, `fork` does so for models with attention code of their own,
`rows` runs the same cells as full rows of a growing batch, `reference` one cell at a time.
"""

from fasttrace.engines import reference, rows, wavefront
from fasttrace.engines.engine import Engine
from fasttrace.engines.job import Job, Tick

__all__ = ["ENGINES", "Engine", "Job", "Tick"]

_ALL = (
    Engine("wavefront", wavefront.run, wavefront.LAYOUT, wavefront.run_jobs, wavefront.make_ready),
    Engine("fork", wavefront.run_fork, wavefront.FORK_LAYOUT),
    Engine("rows", rows.run, rows.LAYOUT),
    Engine("reference", reference.run),
)

ENGINES = {engine.name: engine for engine in _ALL}
"""By name, in the order in which "auto" tries them."""
