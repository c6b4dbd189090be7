"""A study: settings bound to a model, which make a prompt's job, its result, and the records of many prompts.

Many prompts are encoded first, packed into common passes, planned ahead of the model, and yielded as they finish. Facts
are sorted by the shape of their prompts, so that those of one shape share a plan, and neighbours in a pack share their
rectangles. What shares a pass depends on the facts and on the budget alone: packs can be computed in any order, by any
process, with the same numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol, cast

import numpy as np
import pandas as pd
import torch

from fasttrace.checks import memory_told
from fasttrace.engines import ENGINES, Engine
from fasttrace.engines.clean import clean_tops
from fasttrace.engines.job import Job
from fasttrace.engines.memory import Budget
from fasttrace.engines.passes import Progress
from fasttrace.engines.readout import Scores
from fasttrace.engines.self_check import EngineChoice, confirm, prompts_share_passes
from fasttrace.errors import NumericsError, PromptError
from fasttrace.experiment.cells import Cell, background_of, grid_cells
from fasttrace.experiment.corruption import Corruption, Counterfactual, Embedder, NoCorruption, Noise
from fasttrace.experiment.grids import BACKGROUNDS, DIRECTIONS, directed
from fasttrace.experiment.metrics import MEANLESS
from fasttrace.experiment.settings import Settings
from fasttrace.facts.dataset import Fact
from fasttrace.models.anatomy import Anatomy, module_paths
from fasttrace.models.second_look import second_look_note
from fasttrace.planning.cost import Cost
from fasttrace.prompts.pairs import differing
from fasttrace.prompts.prompt import Prompt, token_text
from fasttrace.results.metric_grids import MetricGrids
from fasttrace.results.record import Record
from fasttrace.results.result import Directions, TraceResult
from fasttrace.results.versions import versions

__all__ = ["Encoded", "Planned", "Study", "encoded_facts"]

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


class Sharing(Protocol):
    """How several processes compute one prompt together."""

    def scores(self, study: "Study", job: Job) -> tuple[Scores, Cost]:
        """All scores of a job, in every process."""
        ...


@dataclass(frozen=True)
class Study:
    """Settings bound to a model.

    Attributes:
        anatomy: the model.
        tokenizer: its tokenizer; None without one.
        settings: what was asked for.
        windows: stream -> blocks restored together.
        sigma: standard deviation of the noise, measured where the settings have a rule.
        choice: the engine.
        fuse: compute with fused operations.
        budget: tokens of a pack.
        about: further metadata of results; its notes go before a prompt's own.
        sharing: all processes compute one prompt together; None: this one computes alone.
        corrupts: prompts have corrupted runs; where they have none, all cells are made in the clean run.
    """

    anatomy: Anatomy
    tokenizer: Any
    settings: Settings
    windows: Mapping[str, int]
    sigma: float
    choice: EngineChoice
    fuse: bool
    budget: Budget
    about: Mapping[str, Any] = field(default_factory=dict)
    sharing: Sharing | None = None
    corrupts: bool = True

    # One prompt.

    def job(self, prompt: Prompt, cells: tuple[Cell, ...] | None = None) -> Job:
        """A prompt's corrupted runs and its cells.

        Args:
            prompt: encoded.
            cells: to be scored; None: those of the grids.

        Raises:
            PlanError: samples, sigma or seed cannot be used.
        """
        runs = self._corruption(prompt).runs(prompt.token_ids, prompt.span, cast("Embedder", self.anatomy))
        ids = torch.tensor(prompt.token_ids, dtype=torch.long, device="cpu")
        foil = () if prompt.foil_id is None else (prompt.foil_id,)
        return Job(ids, runs, self._cells(len(ids)) if cells is None else cells, prompt.target_id, foil)

    def _corruption(self, prompt: Prompt) -> Corruption:
        if not self.corrupts:
            return NoCorruption()
        if prompt.counterfactuals:
            return Counterfactual(prompt.counterfactuals)
        return Noise(self.sigma, self.settings.samples, self.settings.seed)

    def _cells(self, n_positions: int) -> tuple[Cell, ...]:
        grids = (grid_cells(s, width, self.anatomy.n_layers, n_positions) for s, width in self.windows.items())
        return tuple(cell for grid in grids for cell in directed(grid, self.settings.direction))

    def both(self, prompt: Prompt, progress: Progress | None = None) -> Directions:
        """The results of both directions, from one pass."""
        alone = [replace(self, settings=replace(self.settings, direction=name)) for name in DIRECTIONS]
        cells = [study._cells(len(prompt.token_ids)) for study in alone]
        ((scores, cost),) = self.scores([self.job(prompt, tuple(chain(*cells)))], progress=progress)
        halves = np.split(scores.table, len(DIRECTIONS), axis=1)
        found = (
            study.result(prompt, replace(scores, table=half), cost) for study, half in zip(alone, halves, strict=True)
        )
        return Directions(*found)

    def result(self, prompt: Prompt, scores: Scores, cost: Cost) -> TraceResult:
        """The grids of a prompt.

        Raises:
            NumericsError: a probability is NaN.
        """
        if not np.isfinite(scores.cells).all():
            raise NumericsError(
                f"probabilities came out as NaN in {self.anatomy.dtype}, with noise of standard deviation "
                f"{self.sigma:g}; try dtype='bfloat16' or 'float32', or less noise"
            )
        shape = (len(self.windows), self.anatomy.n_layers, len(prompt.token_ids), -1)
        found = ((name, scores.of(name).reshape(shape), scores.base_of(name)) for name in scores.names)
        metrics = {name: MetricGrids.of_samples(name, tuple(self.windows), *each) for name, *each in found}
        prob = metrics.pop("prob")
        return TraceResult(
            prob=prob.mean,
            prob_std=prob.std,
            clean_prob=prob.clean,
            corrupted_prob=prob.corrupted,
            corrupted_std=prob.corrupted_std,
            tokens=prompt.tokens,
            token_ids=prompt.token_ids,
            span=prompt.span,
            target=None if self.tokenizer is None else token_text(self.tokenizer, scores.target),
            target_id=scores.target,
            top={run: self._top(*best) for run, best in scores.top.items()},
            windows=dict(self.windows),
            cost=cost,
            metadata={**self._metadata(prompt), **scores.how},
            target_ids=scores.targets,
            foil_ids=scores.foils,
            others=metrics,
        )

    def frame(
        self, coordinates: Sequence[Mapping[str, Any]], cells: Sequence[Cell], prompt: Prompt, scores: Scores
    ) -> pd.DataFrame:
        """A row per cell: its coordinates, its metrics averaged over the corrupted runs, and their effects.

        Args:
            coordinates: of the cells, column -> value.
            cells: in their order.
            prompt: encoded.
            scores: of these cells.
        """
        columns: dict[str, Any] = {}
        names = ("clean", "corrupted") if self.corrupts else ("clean",)
        runs: dict[str, dict[str, float]] = {run: {} for run in names}
        for name in scores.names:
            if name in MEANLESS:
                continue
            clean, *corrupted = scores.base_of(name)
            for run, values in zip(names, (clean, corrupted), strict=False):
                runs[run][name] = float(np.mean(values))
            columns[name] = scores.of(name).mean(-1)
            columns[f"{name}_effect"] = columns[name] - [runs[background_of(cell)][name] for cell in cells]
        frame = pd.concat([pd.DataFrame(list(coordinates)), pd.DataFrame(columns)], axis=1)
        about = self._metadata(prompt)
        del about["direction"], about["background"]  # cells have their own
        frame.attrs = {"runs": runs, "target_id": scores.target, **about, **scores.how}
        return frame

    def _top(self, ids: np.ndarray, probs: np.ndarray) -> tuple[tuple[int, str, float], ...]:
        numbers = zip(ids.tolist(), probs.tolist(), strict=True)
        return tuple((token, token_text(self.tokenizer, token), prob) for token, prob in numbers)

    def _metadata(self, prompt: Prompt) -> dict[str, Any]:
        return {
            **self.about,
            "prompt": prompt.text,
            "subject": prompt.subject,
            "notes": [*self.about.get("notes", ()), *prompt.notes, *self._second_look()],
            "direction": self.settings.direction,
            "background": BACKGROUNDS[self.settings.direction],
            **(self._pair(prompt) if prompt.counterfactuals else self._noise() if self.corrupts else {}),
            **self._foil(prompt),
            "dtype": str(self.anatomy.dtype).removeprefix("torch."),
            "device": str(self.anatomy.device),
            "attention": str(self.anatomy.config._attn_implementation),
            "modules": module_paths(self.anatomy),
            "engine": self.choice.name,
            "engine_reason": self.choice.reason,
            "self_check_error": self.choice.self_check_error,
            "hooks": self.choice.hooks,
            "attention_by": "model",
            "versions": dict(versions()),
        }

    def _noise(self) -> dict[str, Any]:
        return {**self.settings.experiment(), "sigma": self.sigma}

    def _pair(self, prompt: Prompt) -> dict[str, Any]:
        """What a counterfactual is, in place of noise."""
        others = [[token_text(self.tokenizer, token_id) for token_id in ids] for ids in prompt.counterfactuals]
        return {
            "counterfactual": list(prompt.counterfactual_texts),
            "counterfactual_ids": [list(ids) for ids in prompt.counterfactuals],
            "counterfactual_tokens": others,
            "differing": list(differing(prompt.token_ids, prompt.counterfactuals)),
            "samples": len(prompt.counterfactuals),
        }

    def _foil(self, prompt: Prompt) -> dict[str, Any]:
        if prompt.foil_id is None:
            return {}
        foil = None if self.tokenizer is None else token_text(self.tokenizer, prompt.foil_id)
        return {"foil": foil, "foil_id": prompt.foil_id}

    def _second_look(self) -> list[str]:
        """What the corrupted runs see beside noised embeddings, if anything."""
        token = self.anatomy.neutral_token
        return [] if token is None or not self.sigma else [second_look_note(self.anatomy.model, token)]

    @property
    def engine(self) -> Engine:
        """What the cells run on."""
        return ENGINES[self.choice.name]

    def scores(
        self, jobs: Sequence[Job], ready: Any = None, progress: Progress | None = None
    ) -> list[tuple[Scores, Cost]]:
        """Runs jobs of this study in this process; see `Engine.scores`.

        Raises:
            EngineError, NumericsError: see `Engine.scores`.
        """
        return self.engine.scores(self.anatomy, jobs, self.budget, fuse=self.fuse, ready=ready, progress=progress)

    # Many prompts.

    @property
    def target_rule(self) -> str:
        """What is scored, in words: a part of what makes two runs the same run."""
        compat = self.settings.compat
        if self.settings.require_correct:
            return f"clean top token, if {CORRECT[compat]}"
        return "first token of the answer" + (f"; known if {CORRECT[compat]}" if compat else "")

    def known(self, facts: Sequence[Encoded]) -> tuple[list[Encoded], list[Record]]:
        """Of facts that all have to be known by the model: those that are, and those that are skipped.

        Those that are have the clean run's top token as target.
        """
        asked, skipped = [], []
        for each, top in zip(facts, clean_tops(self.anatomy, [each.prompt.token_ids for each in facts]), strict=True):
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
        if self.settings.compat == "rome":
            return token_text(self.tokenizer, top).strip() == each.fact.target.strip()
        return top == each.prompt.target_id

    def _unknown(self, each: Encoded, top: int) -> str:
        """Why a fact does not count as known."""
        if each.fact.target is None:
            return "it has no expected answer, so that nothing tells whether the model knows it"
        said = token_text(self.tokenizer, top)
        reason = f"the model goes on with {said!r}, not with {each.fact.target!r}"
        if self.settings.compat == "rome":
            return f"{reason} (compat='rome')"
        if each.prompt.target_id is None:
            return reason
        return f"{reason}, whose first token is {token_text(self.tokenizer, each.prompt.target_id)!r}"

    def packed(self, facts: Iterable[Encoded]) -> list[list[Encoded]]:
        """Which facts share a pass: neighbours of like shape, the longest first, within the budget."""
        together = self.sharing is None and prompts_share_passes(self.anatomy, self.choice.name, self.fuse)
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
        rows = len(self.windows) * self.anatomy.n_layers * suffixes
        return (1 + self.settings.samples) * length + self.settings.samples * rows

    def trace_all(self, facts: Sequence[Encoded], refused: Sequence[Record]) -> Iterator[Record]:
        """What becomes of every fact, in this process.

        Args:
            facts: those to trace.
            refused: of the others.
        """
        yield from refused
        if self.settings.require_correct:
            facts, skipped = self.known(facts)
            yield from skipped
        for records in self.run(self.packed(facts)):
            yield from records

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
        jobs = [self.job(each.prompt) for each in facts]
        return Planned(facts, jobs, self.engine.ready(self.anatomy, jobs, self.budget, self.fuse))

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
        if self.sharing is not None:
            return [self.sharing.scores(self, job) for job in planned.jobs]
        confirm(self.anatomy, self.choice)
        return self.scores(planned.jobs, planned.ready)

    def _record(self, each: Encoded, scores: Scores, cost: Cost) -> Record:
        try:
            result = self.result(each.prompt, scores, cost)
        except NumericsError as error:
            return self._not_finite(each, error)
        return Record(each.fact, result, correct=self._is_correct(each, int(scores.base_of("top1")[0])))

    def _not_finite(self, each: Encoded, error: NumericsError) -> Record:
        if self.settings.strict:
            raise error
        return Record(each.fact, reason=str(error))


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


def with_target(each: Encoded, target_id: int) -> Encoded:
    """The same fact, with another token to score."""
    return replace(each, prompt=replace(each.prompt, target_id=target_id))
