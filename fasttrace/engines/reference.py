"""The specification: one cell, one sample, one plain forward pass at a time.

Slow and obvious. It reads cells, never compiled tables; the tests hold the other engines to it.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fasttrace.engines.job import Job, Tick, answer_tables
from fasttrace.engines.metrics import Answers, distributions, over_reads, scored
from fasttrace.engines.readout import Scores
from fasttrace.errors import EngineError
from fasttrace.experiment.cells import CLEAN, Cell, Edit, Vector, background_of
from fasttrace.experiment.sites import SITE
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import forward_pass, hidden_hook, output_hook

Run = tuple[Cell, int, int]
"""A row of a plain pass: its edits, the run in which they are made, and the corrupted run that they may take from."""

Values = dict[tuple[str, int], Tensor]
"""(site, layer) -> [row, position, ...]."""


def run(anatomy: Anatomy, job: Job, tick: Tick, rows: int = 1) -> Scores:
    """Runs every cell of a job for every noise sample; see `job.Job`.

    Args:
        anatomy: the model.
        job: what to run.
        tick: called after each restored run.
        rows: runs in one pass, each a whole prompt. One is the specification; the self-check takes more.

    Raises:
        EngineError: a block that the model leaves out.
    """
    base: list[Run] = [((), number, number) for number in range(1 + len(job.runs))]
    restored: list[Run] = [
        (cell, _number_of(background_of(cell), 1 + sample), 1 + sample)
        for cell in job.cells
        for sample in range(job.samples)
    ]
    sites = {(edit.site, edit.layer) for cell in job.cells for edit in cell}
    values: dict[tuple[str, int], list[Tensor]] = {place: [] for place in sites}
    with forward_pass(anatomy.model):
        base_logits = []
        for part in _parts(base, rows):
            recorded, logits = _pass(anatomy, job, part, {}, sites)
            base_logits.append(logits)
            for place, value in recorded.items():
                values[place].append(value)
        for site, layer in (place for place, parts in values.items() if not parts):
            raise EngineError(f"the {site} of block {layer} is never computed for a prompt of text")
        known = {place: torch.cat(parts) for place, parts in values.items()}
        all_base = torch.cat(base_logits)
        targets, foils = (torch.from_numpy(table).to(all_base.device) for table in answer_tables([job]))
        answers = Answers.of(all_base[0], targets, foils, job.metrics)
        scores = [np.zeros((len(answers.names), 0))]
        for part in _parts(restored, rows):
            scores.append(_scored(_pass(anatomy, job, part, known, ())[1], answers))
            for _ in part:
                tick()
    cells = np.concatenate(scores, 1).reshape(len(answers.names), len(job.cells), job.samples)
    of_base = np.concatenate([_scored(logits, answers) for logits in base_logits], 1)
    found = tuple(map(int, answers.targets[0] if len(answers.targets) == 1 else answers.targets[:, 0]))
    return Scores(found, job.foil, answers.names, cells, of_base, distributions(all_base[:, 0]))


def _scored(logits: Tensor, answers: Answers) -> np.ndarray:
    """[metric, row] of logits [row, read, vocab]."""
    of_reads = []
    for read in range(logits.shape[1]):
        rows = np.full(len(logits), read)
        on_device = torch.from_numpy(rows).to(logits.device)
        of_reads.append(scored(logits[:, read], answers, rows, on_device).cpu().double().numpy())
    return over_reads(answers.names, np.stack(of_reads, axis=1))


def _number_of(run: str, corrupted: int) -> int:
    """The number of a run that a cell names."""
    return 0 if run == CLEAN else corrupted


def _parts(runs: Sequence[Run], size: int) -> list[Sequence[Run]]:
    return [runs[begin : begin + size] for begin in range(0, len(runs), size)]


def _pass(
    anatomy: Anatomy, job: Job, runs: Sequence[Run], known: Values, wanted: Collection[tuple[str, int]]
) -> tuple[Values, Tensor]:
    """One forward pass: the values it was asked to record, and logits [row, read, vocab]."""
    recorded: Values = {}
    with ExitStack() as stack:
        is_fed_otherwise = job.runs.neutral is not None and job.runs.ids is None
        prompt = anatomy.embedding(job.token_ids[None].to(anatomy.device))[0] if is_fed_otherwise else None
        stack.enter_context(output_hook(anatomy.embedding, partial(_corrupted, job, runs, prompt)))
        for place in wanted:
            _at(stack, anatomy, len(runs), *place, lambda x, place=place: recorded.__setitem__(place, x.clone()))
        for row, (cell, _, corrupted) in enumerate(runs):
            for edit in cell:
                value = _value_of(edit, known[edit.site, edit.layer], corrupted)
                _at(stack, anatomy, len(runs), edit.site, edit.layer, partial(_overwritten, row, edit, value))
        seen = torch.cat((job.token_ids[None], job.runs.seen(job.token_ids)))
        ids = seen[[number for _, number, _ in runs]].to(anatomy.device)
        logits = anatomy.model(input_ids=ids, use_cache=False).logits
    return recorded, logits[:, list(job.reads or (-1,))]


def _corrupted(job: Job, runs: Sequence[Run], prompt: Tensor | None, embeddings: Tensor) -> Tensor:
    """Noise on the subject's embeddings; `prompt` has those of the prompt where runs are fed with other ids."""
    if job.runs.noise is None:
        return embeddings
    begin, end = job.runs.span
    embeddings = embeddings.clone()
    for row, (_, number, _) in enumerate(runs):
        if number > 0:
            subject = (embeddings[row] if prompt is None else prompt)[begin:end]
            embeddings[row, begin:end] = job.runs.added(subject, job.runs.noise[number - 1])
    return embeddings


def _value_of(edit: Edit, known: Tensor, corrupted: int) -> Tensor:
    """What an edit writes; `known` has the site's values in the base runs, [run, position, ...]."""
    if not isinstance(edit.source, Vector):
        return known[_number_of(edit.source, corrupted), edit.position]
    own = known[0, edit.position]
    return torch.zeros_like(own) if edit.source.values is None else edit.source.values.to(own).expand_as(own)


def _overwritten(row: int, edit: Edit, value: Tensor, hidden: Tensor) -> Tensor:
    hidden[row, edit.position] = value
    return hidden


def _at(stack: ExitStack, anatomy: Anatomy, n_rows: int, site: str, layer: int, rewrite) -> None:
    """Hooks a site; `rewrite` sees it as [row, position, ...], whatever the module's own axes are."""
    axis = anatomy.row_axis if SITE[site].part == "blocks" else 0

    def rewrite_rows(hidden: Tensor) -> Tensor | None:
        copy = hidden.clone()
        rows = copy.unflatten(0, (n_rows, -1)) if copy.dim() == 2 else copy.movedim((axis, axis + 1), (0, 1))
        return None if rewrite(rows) is None else copy

    hook = hidden_hook if SITE[site].side == "input" else output_hook
    stack.enter_context(hook(anatomy.modules_at(site)[layer], rewrite_rows))
