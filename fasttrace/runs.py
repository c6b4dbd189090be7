"""A run: a set of facts traced into a store, by one process or many, from the start or from where it stopped."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttrace import cpu_linears, kernel_choice
from fasttrace.datasets import Fact, FactSet
from fasttrace.distributed import CellSharded, Claims, Ranks, claims
from fasttrace.engines.memory import Budget
from fasttrace.errors import PlanError, PromptError
from fasttrace.identity import digests
from fasttrace.manifest import SAME_SIGMA, compared, differences, plain_json
from fasttrace.many import Encoded, Study, study_of
from fasttrace.stores import MANIFEST, Record, Store
from fasttrace.sweeps import versions

if TYPE_CHECKING:
    from fasttrace.api import Tracer

__all__ = ["Outcome", "Told", "run"]

SHARDS = ("facts", "cells")
SHOWN = 3
"""Differences between two processes that a message names."""


@dataclass(frozen=True)
class Told:
    """How far a run is, of all processes.

    Attributes:
        facts: to do in this start.
        done: of these, skipped ones included.
        skipped: of these.
        cells: computed in this start.
    """

    facts: int
    done: int
    skipped: int
    cells: int


Progress = Callable[[Told], None]


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        store: where the facts are.
        facts: asked for.
        before: done by earlier starts.
        traced, skipped: of all that were asked for.
    """

    store: Store
    facts: int
    before: int
    traced: int
    skipped: int


def run(
    tracer: "Tracer",
    facts: FactSet,
    folder: str | Path,
    *,
    ranks: Ranks | None = None,
    shard: str = "facts",
    progress: Progress | None = None,
    **options: Any,
) -> Outcome:
    """Traces facts into a folder; what is there already is not computed again.

    Args:
        tracer: the model, the same in every process.
        facts: from `read_facts`, the same in every process.
        folder: of the store, made when missing; all processes see it.
        ranks: the processes; None: as the launcher says.
        shard: "facts" deals packs of prompts to processes; "cells" lets all of them work on one prompt after the
            other, each on a part of its cells.
        progress: called in the first process after each pack.
        options: of `Tracer.trace_many`.

    Raises:
        StoreError: the folder cannot be written to, or holds another run; it lists what differs.
        PromptError: processes have different facts, or see `Tracer.trace_many`.
        PlanError: an unknown shard, processes that would run different things, or see `Tracer.trace_many`, as for
            other errors.
    """
    if shard not in SHARDS:
        raise PlanError(f"unknown shard {shard!r}: give one of {', '.join(SHARDS)}")
    ranks = ranks or Ranks.current(cpu=tracer.device.type == "cpu")
    check_same_facts(ranks, facts)
    study, encoded, refused = study_of(tracer, facts, **options)
    if shard == "cells":
        values = {field.name: getattr(study, field.name) for field in fields(study)}
        study = CellSharded(**values, ranks=ranks)
    if encoded:
        study.sweep.job(encoded[0].prompt)  # raises what would otherwise be raised when the folder has been made
    study = replace(study, budget=Budget(min(ranks.all(lambda: study.budget.tokens))))
    cpu_linears.settle(ranks.all(cpu_linears.choices))
    kernel_choice.settle(ranks.all(kernel_choice.choices))
    identities = ranks.all(tracer.identity)
    fingerprint = fingerprint_of(study, tracer.name, tracer.revision, identities[ranks.rank])
    check_same_run(ranks, {**fingerprint, "shard": shard})
    sigma, notes = study.sweep.sigma, ()
    if isinstance(fingerprint["noise"], str) and options.get("noise_subjects") is None:
        sigma, notes = ranks.first(lambda: kept_sigma(study, Path(folder), facts))
    about = {**study.sweep.about, "identity": digests(identities[ranks.rank]), "notes": notes}
    study = replace(study, sweep=replace(study.sweep, sigma=sigma, about=about))
    store = _opened(ranks, Path(folder), {**fingerprint, "sigma": sigma}, facts)
    store.notes += notes
    return _Run(ranks, study, store, facts, progress).run(encoded, refused)


def _opened(ranks: Ranks, folder: Path, fingerprint: Mapping[str, Any], facts: FactSet) -> Store:
    """The store in every process; the first one makes it, and sets aside what is damaged."""

    def first() -> None:
        store = Store.open(folder, fingerprint)
        store.describe(facts.name, len(facts), [str(bad) for bad in facts.bad], [fact.id for fact in facts])

    ranks.first(first)
    return Store.open(folder, fingerprint)


class _Run:
    """One start of a run, in one process.

    Attributes:
        packs: what is left to trace.
        skipped: facts that were skipped in this start, in all processes.
        told: what was told last.
    """

    def __init__(self, ranks: Ranks, study: Study, store: Store, facts: FactSet, progress: Progress | None):
        self.ranks, self.study, self.store, self.facts, self.progress = ranks, study, store, facts, progress
        self.packs: list[list[Encoded]] = []
        self.skipped = 0
        self.told: Told | None = None

    def run(self, encoded: Sequence[Encoded], refused: Sequence[Record]) -> Outcome:
        """Does what is left to do."""
        left = {fact.id for fact in self.ranks.first(lambda: self.store.remaining(self.facts.facts))}
        refused = [record for record in refused if record.fact.id in left]
        self._skip(refused if self.ranks.is_first else [], len(refused))
        packs = self._packed(self._asked(encoded, left))
        still = ([each for each in pack if each.fact.id in left] for pack in packs)
        self.packs = [pack for pack in still if pack]
        with claims(self.ranks, self.store.folder) as claimed:
            self._tell(claimed)
            self._trace(claimed)
            self.ranks.all(lambda: None)  # others may have been at their last packs when this process told last
            self._tell(claimed)
        return self._outcome(len(self.facts) - len(left))

    def _packed(self, asked: Sequence[Encoded]) -> list[list[Encoded]]:
        """The packs as the first process makes them: their numbers mean the same everywhere."""
        by_id = {each.fact.id: each for each in asked}
        ids = self.ranks.first(lambda: [[each.fact.id for each in pack] for pack in self.study.packed(asked)])
        return [[by_id[fact_id] for fact_id in pack] for pack in ids]

    def _asked(self, encoded: Sequence[Encoded], left: set[str]) -> list[Encoded]:
        """Facts to trace, and those that an earlier start traced: so that every start makes the same packs."""
        if not self.study.require_correct:
            return list(encoded)
        unknown = [each for each in encoded if each.fact.id in left][self.ranks.rank :: self.ranks.world]
        shares = self.ranks.all(lambda: self.study.known(unknown))
        self._skip(shares[self.ranks.rank][1], sum(len(skipped) for _, skipped in shares))
        status = self._status()
        before = [each for each in encoded if each.fact.id not in left and status[each.fact.id] == "traced"]
        return [*before, *(each for known, _ in shares for each in known)]

    def _skip(self, records: Sequence[Record], of_all: int) -> None:
        self.skipped += of_all
        if records:
            self.store.write(records, rank=self.ranks.rank)

    def _trace(self, claimed: Claims) -> None:
        numbers: list[int] = []
        together = isinstance(self.study, CellSharded)

        def asked() -> Iterator[list[Encoded]]:
            for number in range(len(self.packs)) if together else claimed.taken(len(self.packs)):
                numbers.append(number)
                yield self.packs[number]

        for records in self.study.run(asked()):
            if self.ranks.is_first or not together:
                self.store.write(records, rank=self.ranks.rank)
            claimed.finish(numbers.pop(0))
            self._tell(claimed)

    def _tell(self, claimed: Claims) -> None:
        if self.progress is None or not self.ranks.is_first:
            return
        done = [each for number in claimed.finished() for each in self.packs[number]]
        facts = self.skipped + sum(map(len, self.packs))
        cells = len(self.study.sweep.windows) * self.study.sweep.anatomy.n_layers
        cells *= sum(len(each.prompt.token_ids) for each in done)
        told = Told(facts, self.skipped + len(done), self.skipped, cells)
        if told != self.told:
            self.told = told
            self.progress(told)

    def _outcome(self, before: int) -> Outcome:
        status = self._status()
        found = [status[fact.id] for fact in self.facts]
        return Outcome(self.store, len(found), before, found.count("traced"), found.count("skipped"))

    def _status(self) -> dict[str, str]:
        facts = self.store.facts(self.store.coverage(everything=True))
        return dict(zip(facts["id"], facts["status"], strict=True))


def fingerprint_of(study: Study, name: str, revision: str | None, identity: Mapping[str, Any]) -> dict[str, Any]:
    """All that changes a run's numbers by more than rounding, as JSON values, and what people want to know.

    Args:
        study: how facts are traced.
        name: of the model; not compared, and so is the revision.
        revision: of the model.
        identity: of the model, from `fasttrace.identity.identity_of`.
    """
    sweep = study.sweep
    return {
        "model": name,
        "revision": revision,
        **identity,
        "noise": sweep.about["noise"],
        "sigma": sweep.sigma,
        "samples": sweep.samples,
        "seed": sweep.seed,
        "streams": list(sweep.windows),
        "windows": dict(sweep.windows),
        "dtype": str(sweep.anatomy.dtype).removeprefix("torch."),
        "metric": "probability",
        "target": study.target_rule,
        "versions": dict(versions()),
    }


# All processes do the same.


def check_same_facts(ranks: Ranks, facts: FactSet) -> None:
    """Refuses, in every process, a set of facts that is another one in some process.

    Raises:
        PromptError: it names the process and the first fact that differs.
    """
    if ranks.world == 1:
        return
    digest = hashlib.sha256(repr(facts.facts).encode("utf-8", "backslashreplace")).hexdigest()
    if len(set(ranks.all(lambda: digest))) == 1:
        return
    first = ranks.first(lambda: facts.facts)
    found = ranks.all(lambda: _first_difference(first, facts.facts, ranks.rank))
    rank = next(rank for rank, difference in enumerate(found) if difference)
    raise PromptError(
        f"process {rank} has other facts than process 0 ({found[rank]}): give all processes, on every machine, "
        "the same file of facts"
    )


def _first_difference(first: Sequence[Fact], here: Sequence[Fact], rank: int) -> str | None:
    places = ("in process 0", f"in process {rank}")
    for one, other in zip_longest(first, here):
        if one != other:
            if one is None or other is None or one.id != other.id:
                names = [None if fact is None else fact.id for fact in (one, other)]
                return differences({"fact": names[0]}, {"fact": names[1]}, places)[0]
            return f"fact {one.id!r}: {differences(asdict(one), asdict(other), places)[0]}"
    return None


def check_same_run(ranks: Ranks, fingerprint: Mapping[str, Any]) -> None:
    """Refuses, in every process, a run that is another one in some process.

    Raises:
        PlanError: it names the process and what differs.
    """
    first, *others = ranks.all(lambda: plain_json(fingerprint))
    for rank, other in enumerate(others, start=1):
        found = differences(*compared(first, other), ("in process 0", f"in process {rank}"))
        if found:
            raise PlanError(
                f"process {rank} would not run what process 0 runs ({'; '.join(found[:SHOWN])}): give all processes, "
                "on every machine, the same model and the same options"
            )


# Noise that is measured.


def kept_sigma(study: Study, folder: Path, facts: FactSet) -> tuple[float, tuple[str, ...]]:
    """The sigma of the run that is in a folder, where rows were added to its facts or left out; else the study's own.

    Args:
        study: with noise that was measured on the facts' own subjects.
        folder: of the run; it may have none yet.
        facts: all that are asked for.

    Returns:
        Sigma, and a note where it is not what the subjects would give.

    Raises:
        StoreError: the folder's manifest cannot be read.
    """
    measured = study.sweep.sigma
    if not os.path.exists(folder / MANIFEST):
        return measured, ()
    store = Store.read(folder)
    kept = store.fingerprint.get("sigma")
    if not isinstance(kept, float) or store.fingerprint.get("noise") != study.sweep.about["noise"]:
        return measured, ()
    if math.isclose(kept, measured, rel_tol=SAME_SIGMA):
        return kept, ()
    asked = {fact.id for fact in facts}
    if not (store.done <= asked or asked <= store.done):
        return measured, ()  # another set of facts: it is refused with the difference
    return kept, (f"noise: the folder's sigma {kept:.6g} is kept; the subjects of these facts give {measured:.6g}",)
