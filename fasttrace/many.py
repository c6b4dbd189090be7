"""Many prompts: encoded first, packed into common passes, planned ahead of the model, yielded as they finish.

Facts are sorted by the shape of their prompts, so that those of one shape share a plan, and neighbours in a pack share
their rectangles. What shares a pass depends on the facts and on the budget alone: packs can be computed in any order,
by any process, with the same numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from fasttrace.checks import memory_told
from fasttrace.engines import LAYOUTS, READY
from fasttrace.engines.job import Job
from fasttrace.engines.memory import Budget, check_samples, tokens_allowed
from fasttrace.engines.passes import run_together
from fasttrace.engines.readout import CHUNK_BYTES, Scores
from fasttrace.engines.self_check import confirm, prompts_share_passes
from fasttrace.errors import NumericsError, PromptError
from fasttrace.experiment.settings import Settings
from fasttrace.facts.dataset import Fact, check_answers, read_facts
from fasttrace.fusing.choose import fused
from fasttrace.models.hooks import evaluating
from fasttrace.planning.cost import Cost
from fasttrace.prompts.prompt import Prompt, token_text
from fasttrace.results.record import Record
from fasttrace.sweeps import Sweep

if TYPE_CHECKING:
    from fasttrace.api import Tracer

CORRECT = {None: "correct", "rome": "correct by ROME's rule (it is the whole answer)"}
"""What it takes for a fact to be known, by the name of the rule."""

MOST_PROMPTS = 64
"""In one pack; more would only make packs harder to deal out."""


@dataclass(frozen=True)
class Encoded:
    """A fact as the model sees it."""

    fact: Fact
    prompt: Prompt

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens and subject: prompts of one shape share a plan."""
        return len(self.prompt.token_ids), *self.prompt.span


@dataclass(frozen=True)
class Planned:
    """What is to share a pass.

    Attributes:
        facts: one or several.
        jobs: theirs.
        ready: their pass; None where the engine makes it when its turn comes.
    """

    facts: Sequence[Encoded]
    jobs: Sequence[Job]
    ready: Any = None


@dataclass(frozen=True)
class Study:
    """How facts are traced.

    Attributes:
        sweep: what is done to each.
        encode: a fact's prompt, subject and target as tokens; raises PromptError.
        fuse: compute with fused operations.
        budget: tokens of a pack.
        require_correct: skip facts that the model does not know; of the others the clean top token is scored.
        strict: raise at the first fact that cannot be traced.
        compat: how to tell whether a fact is known. None: the clean top token is the first token of the answer, as the
            answer is tokenized behind the prompt. "rome", as in the code published with Meng et al. (2022): that token
            and the whole answer are the same text, space around them aside.
    """

    sweep: Sweep
    encode: Callable[[Fact], Prompt]
    fuse: bool
    budget: Budget
    require_correct: bool = False
    strict: bool = False
    compat: str | None = None

    @property
    def target_rule(self) -> str:
        """What is scored, in words: a part of what makes two runs the same run."""
        if self.require_correct:
            return f"clean top token, if {CORRECT[self.compat]}"
        return "first token of the answer" + (f"; known if {CORRECT[self.compat]}" if self.compat else "")

    def encoded(self, facts: Iterable[Fact]) -> tuple[list[Encoded], list[Record]]:
        """Facts as tokens, and those that cannot be.

        Raises:
            PromptError: one cannot be, and `strict`.
        """
        return encoded_facts(facts, self.encode, self.strict)

    def known(self, facts: Sequence[Encoded]) -> tuple[list[Encoded], list[Record]]:
        """Of facts that all have to be known by the model: those that are, and those that are skipped.

        Those that are have the clean run's top token as target.
        """
        asked, skipped = [], []
        for each, top in zip(facts, clean_tops(self.sweep, [each.prompt for each in facts]), strict=True):
            correct = self._is_correct(each, top)
            if correct:
                asked.append(with_target(each, top))
            else:
                skipped.append(Record(each.fact, reason=self._unknown(each, top), correct=correct))
        return asked, skipped

    def _is_correct(self, each: Encoded, top: int) -> bool | None:
        """Whether the model knows a fact; None without an answer."""
        if each.fact.target is None:
            return None
        if self.compat == "rome":
            return token_text(self.sweep.tokenizer, top).strip() == each.fact.target.strip()
        return top == each.prompt.target_id

    def _unknown(self, each: Encoded, top: int) -> str:
        """Why a fact does not count as known."""
        if each.fact.target is None:
            return "it has no expected answer, so that nothing tells whether the model knows it"
        said = token_text(self.sweep.tokenizer, top)
        reason = f"the model goes on with {said!r}, not with {each.fact.target!r}"
        if self.compat == "rome":
            return f"{reason} (compat='rome')"
        if each.prompt.target_id is None:
            return reason
        return f"{reason}, whose first token is {token_text(self.sweep.tokenizer, each.prompt.target_id)!r}"

    def packed(self, facts: Iterable[Encoded]) -> list[list[Encoded]]:
        """Which facts share a pass: neighbours of like shape, the longest first, within the budget."""
        together = prompts_share_passes(self.sweep.anatomy, self.sweep.choice.name, self.fuse)
        packs: list[list[Encoded]] = []
        room = 0
        for each in sorted(facts, key=lambda each: (*each.shape, each.fact.id), reverse=True):
            tokens = self.most_tokens(each.prompt)
            if not together or tokens > room or len(packs[-1]) == MOST_PROMPTS:
                packs.append([])
                room = self.budget.tokens
            packs[-1].append(each)
            room -= tokens
        return packs

    def most_tokens(self, prompt: Prompt) -> int:
        """Tokens that a prompt adds to a pack, at most: its base rows, and every cell's row from its position on."""
        length, begin = len(prompt.token_ids), prompt.span[0]
        suffixes = (length - begin) * (length - begin + 1) // 2
        rows = len(self.sweep.windows) * self.sweep.anatomy.n_layers * suffixes
        return (1 + self.sweep.samples) * length + self.sweep.samples * rows

    def run(self, packs: Iterable[Sequence[Encoded]]) -> Iterator[list[Record]]:
        """The records of pack after pack; while one is computed, the next is being planned.

        Args:
            packs: asked for one by one, one ahead of what is computed.
        """
        with memory_told("tracing"), ThreadPoolExecutor(1, "fasttrace-planner") as planner:
            upcoming = None
            for pack in packs:
                current, upcoming = upcoming, planner.submit(self._planned, pack)
                if current is not None:
                    yield self._records(current.result())
            if upcoming is not None:
                yield self._records(upcoming.result())

    def _planned(self, facts: Sequence[Encoded]) -> Planned:
        jobs = [self.sweep.job(each.prompt) for each in facts]
        make_ready, layout = READY.get(self.sweep.choice.name), LAYOUTS.get(self.sweep.choice.name)
        if len(jobs) == 1 or make_ready is None:
            if layout is not None and jobs[0].peak_tokens(self.sweep.anatomy.n_layers, layout) <= self.budget.tokens:
                jobs[0].plan(self.sweep.anatomy.n_layers, layout)  # into the cache, where the engine looks first
            return Planned(facts, jobs)
        return Planned(facts, jobs, make_ready(self.sweep.anatomy, jobs, self.fuse))

    def _records(self, planned: Planned) -> list[Record]:
        try:
            found = self._scores(planned)
        except NumericsError as error:
            if len(planned.facts) == 1:
                return [self._not_finite(planned.facts[0], error)]
            alone = (
                self._records(Planned([fact], [job])) for fact, job in zip(planned.facts, planned.jobs, strict=True)
            )
            return [record for records in alone for record in records]
        return [self._record(fact, *each) for fact, each in zip(planned.facts, found, strict=True)]

    def _scores(self, planned: Planned) -> list[tuple[Scores, Cost]]:
        anatomy, name = self.sweep.anatomy, self.sweep.choice.name
        confirm(anatomy, self.sweep.choice)
        with fused(anatomy, self.fuse and name != "reference"):
            return run_together(name, anatomy, planned.jobs, self.budget, planned.ready)

    def _record(self, each: Encoded, scores: Scores, cost: Cost) -> Record:
        try:
            result = self.sweep.result(each.prompt, scores, cost)
        except NumericsError as error:
            return self._not_finite(each, error)
        return Record(each.fact, result, correct=self._is_correct(each, int(scores.base_of("top1")[0])))

    def _not_finite(self, each: Encoded, error: NumericsError) -> Record:
        if self.strict:
            raise error
        return Record(each.fact, reason=str(error))


def study_of(tracer: "Tracer", facts: Any, **options: Any) -> tuple[Study, list[Encoded], list[Record]]:
    """A study, its facts as tokens, and those that cannot be; options are those of `Tracer.trace_many`."""
    settings = Settings(first_target_token=True, **options)
    found = read_facts(facts, strict=settings.strict)
    if settings.require_correct:
        check_answers(found)
    windows = tracer.windows(settings.streams, settings.window)
    allowed = tokens_allowed(tracer.anatomy, settings.budget)
    encode = partial(_encode, tracer)
    encoded, refused = encoded_facts(found.facts, encode, settings.strict)
    check_samples(tracer.anatomy, settings.samples, windows, [each.prompt for each in encoded])
    subjects = settings.noise_subjects or found.subjects
    sweep = tracer.sweep(windows, settings.noise, subjects, settings.samples, settings.seed, settings.engine)
    how = (settings.require_correct, settings.strict, settings.compat)
    study = Study(sweep, encode, tracer.fuse, Budget(allowed), *how)
    study = replace(study, sweep=replace(sweep, about={**sweep.about, "target_rule": study.target_rule}))
    return study, encoded, refused


def encoded_facts(
    facts: Iterable[Fact], encode: Callable[[Fact], Prompt], strict: bool
) -> tuple[list[Encoded], list[Record]]:
    """Facts as tokens, and those that cannot be.

    Raises:
        PromptError: one cannot be, and `strict`.
    """
    encoded, refused = [], []
    for fact in facts:
        try:
            encoded.append(Encoded(fact, encode(fact)))
        except PromptError as error:
            if strict:
                raise PromptError(f"fact {fact.id!r}: {error}") from error
            refused.append(Record(fact, reason=str(error)))
    return encoded, refused


def _encode(tracer: "Tracer", fact: Fact) -> Prompt:
    where = {} if fact.subject_start is None else {"subject_start": fact.subject_start}
    prompt = tracer.encode(fact.prompt, fact.subject, fact.target, first_target_token=True, tell=False, **where)
    return replace(prompt, notes=(*fact.notes, *prompt.notes)) if fact.notes else prompt


def trace_all(study: Study, facts: Sequence[Encoded], known: Sequence[Record]) -> Iterator[Record]:
    """What becomes of every fact, in this process."""
    yield from known
    if study.require_correct:
        facts, skipped = study.known(facts)
        yield from skipped
    for records in study.run(study.packed(facts)):
        yield from records


def with_target(each: Encoded, target_id: int) -> Encoded:
    """The same fact, with another token to score."""
    return replace(each, prompt=replace(each.prompt, target_id=target_id))


def clean_tops(sweep: Sweep, prompts: Sequence[Prompt]) -> list[int]:
    """The most probable next token of each prompt, by plain forward passes over prompts of one length."""
    anatomy = sweep.anatomy
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].token_ids))
    tops = [0] * len(prompts)
    with evaluating(anatomy.model):
        for length, same in groupby(order, key=lambda number: len(prompts[number].token_ids)):
            numbers, size = list(same), max(1, CHUNK_BYTES // (4 * anatomy.vocabulary * length))
            for begin in range(0, len(numbers), size):
                part = numbers[begin : begin + size]
                tokens = [prompts[number].token_ids for number in part]
                ids = torch.tensor(tokens, dtype=torch.long, device=anatomy.device)
                found = anatomy.model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1).tolist()
                for number, top in zip(part, found, strict=True):
                    tops[number] = top
    return tops
