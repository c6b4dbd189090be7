"""Where averages and pages get their records: from a store, or from records at hand."""

from collections.abc import Iterable, Iterator
from typing import Any

from fasttrace.checks import objects
from fasttrace.results.record import Record
from fasttrace.runs.coverage import Coverage
from fasttrace.runs.store import Store

__all__ = ["shown_records"]


def shown_records(
    source: "Store | Iterable[Record]", shown: Coverage | None = None
) -> tuple[Iterator[Record] | Iterable[Any], Coverage | None]:
    """The records to go over, and of a store which facts they are.

    Args:
        source: a store, or records.
        shown: which facts of a store, see `Store.records`.

    Raises:
        PlanError: neither.
        StoreError: see `Store.records`.
    """
    if isinstance(source, Store):
        shown = source.told(shown)
        return source.records(shown), shown
    return objects("records", source, Record, "Store.read or Tracer.trace_many"), None
