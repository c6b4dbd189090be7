"""A run: a set of facts traced into a store, by one process or many, from the start or from where it stopped."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch

from fasttrace.checks import one_of, path_of
from fasttrace.engines.memory import Budget
from fasttrace.errors import PlanError, PromptError, StoreError
from fasttrace.experiment.settings import Settings
from fasttrace.facts.dataset import Fact, FactSet
from fasttrace.files.writing import plain_json
from fasttrace.fusing import measure
from fasttrace.models.identity import digests
from fasttrace.results.record import Record
from fasttrace.results.versions import versions
from fasttrace.runs.manifest import SAME_SIGMA, compared, differences
from fasttrace.runs.processes import Claims, Patience, Ranks, claims
from fasttrace.runs.shared_cells import SharedCells
from fasttrace.runs.store import MANIFEST, Store
from fasttrace.study import Encoded, Study

__all__ = ["Outcome", "Told", "run"]

SHARDS = ("facts", "cells")
SHOWN = 3
"""Differences between two processes that a message names."""
SECONDS_BETWEEN_LISTINGS, LISTING_SHARE = 1.0, 20.0
"""Claims are not listed again before so many seconds, nor before so many times what the last listing took."""


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


class Tracing(Protocol):
    """What a run takes of a `Tracer`."""

    name: str
    revision: str | None

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        ...

    def identity(self) -> dict[str, Any]:
        """What makes the model this one."""
        ...

    def study_of(self, facts: FactSet, settings: Settings) -> tuple[Study, list[Encoded], list[Record]]:
        """A study, its facts as tokens, and those that cannot be."""
        ...


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
    tracer: Tracing,
    facts: FactSet,
    folder: str | os.PathLike[str],
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
    one_of("shard", shard, SHARDS)
    settings, folder = Settings(first_target_token=True, **options), path_of("folder", folder)
    ranks = ranks or Ranks.current(cpu=tracer.device.type == "cpu")
    check_same_facts(ranks, facts)
    study, encoded, refused = tracer.study_of(facts, settings)
    study = replace(study, sharing=SharedCells(ranks) if shard == "cells" else None)
    if encoded:
        study.job(encoded[0].prompt)  # raises what would otherwise be raised when the folder has been made
    study = replace(study, budget=Budget(min(ranks.all(lambda: study.budget.tokens))))
    measure.settle(ranks.all(measure.choices))
    identities = ranks.all(tracer.identity)
    fingerprint = fingerprint_of(study, tracer.name, tracer.revision, identities[ranks.rank])
    check_same_run(ranks, {**fingerprint, "shard": shard})
    sigma, notes = study.sigma, ()
    if isinstance(settings.noise, str) and settings.noise_subjects is None:
        sigma, notes = ranks.first(lambda: kept_sigma(study, folder, facts))
    about = {**study.about, "identity": digests(identities[ranks.rank]), "notes": notes}
    study = replace(study, sigma=sigma, about=about)
    store = _opened(ranks, folder, {**fingerprint, "sigma": sigma}, facts)
    store.notes += notes
    return _Run(ranks, study, store, facts, progress).run(encoded, refused)


def _opened(ranks: Ranks, folder: Path, fingerprint: Mapping[str, Any], facts: FactSet) -> Store:
    """The store in every process; the first one makes it, and sets aside what is damaged."""
    made: list[Store] = []

    def first() -> None:
        store = Store.open(folder, fingerprint)
        store.describe(facts.name, len(facts), [str(bad) for bad in facts.bad], [fact.id for fact in facts])
        made.append(store)

    ranks.first(first)
    return made[0] if made else Store.open(folder, fingerprint)


class _Run:
    """One start of a run, in one process.

    Attributes:
        packs: what is left to trace of each pack, by its number.
        written: parts of this process that the others were not told of: the ids in each, and which were skipped.
        skipped: facts that were skipped in this start, in all processes.
        done: numbers of packs that are done, as far as is known here.
        told: what was told last.
        longest: seconds that a pack took here, at most.
        before: numbers of packs that were marked as done when this start began.
        next_listing: when claims may be listed again.
    """

    def __init__(
        self,
        ranks: Ranks,
        study: Study,
        store: Store,
        facts: FactSet,
        progress: Progress | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.ranks, self.study, self.store, self.facts, self.progress = ranks, study, store, facts, progress
        self.clock = clock
        self.packs: dict[int, list[Encoded]] = {}
        self.written: dict[str, dict[str, bool]] = {}
        self.skipped = 0
        self.done: set[int] = set()
        self.told: Told | None = None
        self.longest: float | None = None
        self.before: frozenset[int] = frozenset()
        self.next_listing = self.clock() + SECONDS_BETWEEN_LISTINGS

    def run(self, encoded: Sequence[Encoded], refused: Sequence[Record]) -> Outcome:
        """Does what is left to do."""
        with claims(self.ranks, self.store.folder, self._key()) as claimed:
            left = {fact.id for fact in self.ranks.first(lambda: self.store.remaining(self.facts.facts))}
            refused = [record for record in refused if record.fact.id in left]
            self._skip(refused if self.ranks.is_first else [], len(refused))
            packs = self._packed(self._asked(encoded, left), claimed)
            still = {number: [each for each in pack if each.fact.id in left] for number, pack in enumerate(packs)}
            self.packs = {number: pack for number, pack in still.items() if pack}
            self.before = claimed.finished() if self.ranks.is_first else frozenset()
            self._tell(claimed)
            self._trace(self._free(claimed), claimed)
            while numbers := self._lost(claimed):
                mine = numbers if self._together else numbers[self.ranks.rank :: self.ranks.world]
                self._trace(claimed.taken_over(mine), claimed)
            self.done |= self.packs.keys()
            self._tell(claimed)
        return self._outcome(len(self.facts) - len(left))

    @property
    def _together(self) -> bool:
        return self.study.sharing is not None

    def _key(self) -> str:
        """What starts have in common that make the same packs, and so share them."""
        study, ids = self.study, sorted(fact.id for fact in self.facts)
        same = [self.store.fingerprint, ids, repr(study.settings.budget), study.choice.name, study.fuse]
        same.append(self._together)
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]

    def _packed(self, asked: Sequence[Encoded], claimed: Claims) -> list[list[Encoded]]:
        """The packs as the start made them that was here first: their numbers mean the same everywhere."""
        by_id = {each.fact.id: each for each in asked}
        ids = self.ranks.first(
            lambda: claimed.agreed([[each.fact.id for each in pack] for pack in self.study.packed(asked)])
        )
        packs = [[by_id.pop(fact_id) for fact_id in pack if fact_id in by_id] for pack in ids]
        return [*packs, *self.study.packed(by_id.values())]

    def _asked(self, encoded: Sequence[Encoded], left: set[str]) -> list[Encoded]:
        """Facts to trace, and those that an earlier start traced: so that every start makes the same packs."""
        if not self.study.settings.require_correct:
            return list(encoded)
        unknown = [each for each in encoded if each.fact.id in left][self.ranks.rank :: self.ranks.world]
        shares = self.ranks.all(lambda: self.study.known(unknown))
        self._skip(shares[self.ranks.rank][1], sum(len(skipped) for _, skipped in shares))
        status = self.ranks.first(self.store.statuses)
        before = [each for each in encoded if each.fact.id not in left and status[each.fact.id] == "traced"]
        return [*before, *(each for known, _ in shares for each in known)]

    def _skip(self, records: Sequence[Record], of_all: int) -> None:
        self.skipped += of_all
        if records:
            self._write(records)

    def _write(self, records: Sequence[Record]) -> str:
        name = self.store.write(records, rank=self.ranks.rank).name
        self.written[name] = {record.fact.id: record.result is None for record in records}
        return name

    def _free(self, claimed: Claims) -> Iterator[int]:
        """Numbers of packs that nobody has taken."""
        there: frozenset[str] | None = None
        for number in claimed.taken(self.packs):
            if claimed.was_gone:  # with the traces of those who did some of it, or all, while this process was stopped
                claimed.was_gone, there = False, self.store.done
            if there is None or self._missing([number], there):
                yield number

    def _trace(self, numbers: Iterator[int], claimed: Claims) -> None:
        asked: list[int] = []

        def packs() -> Iterator[list[Encoded]]:
            for number in self._same(numbers) if self._together else numbers:
                asked.append(number)
                yield self.packs[number]

        began = self.clock()
        for records in self.study.run(packs()):
            number = asked.pop(0)
            if self.ranks.is_first or not self._together:
                claimed.finish(number, self._write(records))
            began, before = self.clock(), began
            self.longest = max(self.longest or 0.0, began - before)
            self.done.add(number)
            self._tell(claimed)

    def _same(self, numbers: Iterator[int]) -> Iterator[int]:
        """The first process's numbers, in all of them."""
        while (number := self.ranks.first(lambda: next(numbers, None))) is not None:
            yield number

    def _lost(self, claimed: Claims) -> list[int]:
        """Numbers of packs that are not written, and that no other start is computing; none when all are written."""
        for written in self.ranks.all(lambda: self.written):
            self.store.learn(written)
        self.written = {}
        return self.ranks.first(lambda: self._waited(claimed))

    def _waited(self, claimed: Claims) -> list[int]:
        """Waits for packs that other starts are computing, and not for ever: then it gives those."""
        patience = Patience(self.longest)
        missing = self._missing(self.packs, self._seen())
        while missing:
            # Asked before the parts are looked at: of who is done in between, the part is there.
            holders = claimed.holders(missing)
            for name in filter(None, map(claimed.part, missing)):
                self.store.look(name)
            missing = self._missing(missing, self.store.done)
            holders = {number: holders[number] for number in missing if number in holders}
            if len(holders) < len(missing):
                return [number for number in missing if number not in holders]
            if missing and patience.is_over(holders):
                break
        return missing

    def _seen(self) -> frozenset[str]:
        return frozenset(fact_id for ids in self.store.seen.values() for fact_id in ids)

    def _missing(self, numbers: Iterable[int], there: frozenset[str]) -> list[int]:
        return [number for number in numbers if any(each.fact.id not in there for each in self.packs[number])]

    def _tell(self, claimed: Claims) -> None:
        if self.progress is None or not self.ranks.is_first:
            return
        self._list(claimed)
        done = [each for number in self.done for each in self.packs.get(number, ())]
        facts = self.skipped + sum(map(len, self.packs.values()))
        cells = len(self.study.windows) * self.study.anatomy.n_layers
        cells *= sum(len(each.prompt.token_ids) for each in done)
        told = Told(facts, self.skipped + len(done), self.skipped, cells)
        if told != self.told:
            self.told = told
            self.progress(told)

    def _list(self, claimed: Claims) -> None:
        """Learns how far other processes are, once a second at most: of many packs a listing takes long."""
        began = self.clock()
        if began < self.next_listing:
            return
        self.done |= claimed.finished() - self.before
        self.next_listing = began + max(SECONDS_BETWEEN_LISTINGS, LISTING_SHARE * (self.clock() - began))

    def _outcome(self, before: int) -> Outcome:
        traced, skipped = self.ranks.first(self._counts)
        return Outcome(self.store, len(self.facts), before, traced, skipped)

    def _counts(self) -> tuple[int, int]:
        status = self._status()
        found = [status.get(fact.id) for fact in self.facts]
        if None in found:
            raise StoreError(
                f"{found.count(None)} of {len(found)} facts are not in {self.store.folder} although they were written: "
                "parts were removed or damaged meanwhile; start the same run again, it computes them again"
            )
        return found.count("traced"), found.count("skipped")

    def _status(self) -> dict[str, str]:
        facts = self.store.facts(self.store.coverage(everything=True))
        return dict(zip(facts["id"], facts["status"], strict=True))


def fingerprint_of(study: Study, name: str, revision: str | None, identity: Mapping[str, Any]) -> dict[str, Any]:
    """All that changes a run's numbers by more than rounding, as JSON values, and what people want to know.

    Args:
        study: how facts are traced.
        name: of the model; not compared, and so is the revision.
        revision: of the model.
        identity: of the model, from `fasttrace.models.identity.identity_of`.
    """
    return {
        "model": name,
        "revision": revision,
        **identity,
        **study.settings.experiment(),
        "sigma": study.sigma,
        "streams": list(study.windows),
        "windows": dict(study.windows),
        "dtype": str(study.anatomy.dtype).removeprefix("torch."),
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
    first, *others = ranks.all(lambda: plain_json(fingerprint, "fingerprint"))
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
    measured = study.sigma
    if not os.path.exists(folder / MANIFEST):
        return measured, ()
    store = Store.read(folder)
    kept = store.fingerprint.get("sigma")
    if not isinstance(kept, float) or store.fingerprint.get("noise") != study.settings.noise:
        return measured, ()
    if math.isclose(kept, measured, rel_tol=SAME_SIGMA):
        return kept, ()
    asked = {fact.id for fact in facts}
    if not (store.done <= asked or asked <= store.done):
        return measured, ()  # another set of facts: it is refused with the difference
    return kept, (f"noise: the folder's sigma {kept:.6g} is kept; the subjects of these facts give {measured:.6g}",)
