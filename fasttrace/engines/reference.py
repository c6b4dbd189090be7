"""The specification: one cell, one sample, one plain forward pass at a time.

Slow and obvious. It reads cells, never compiled tables; the tests hold the other engines to it.
"""

from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from fasttrace.adapters import Anatomy
from fasttrace.cells import Cell
from fasttrace.engines.job import Job, Tick
from fasttrace.hooks import evaluating, hidden_hook, output_hook
from fasttrace.readout import Scores

Values = dict[tuple[str, int], Tensor]
"""(site, layer) -> [1, position, width]."""


def run(anatomy: Anatomy, job: Job, tick: Tick) -> Scores:
    """Runs every cell of a job for every noise sample; see `job.Job`."""
    sites = {(edit.site, edit.layer) for cell in job.cells for edit in cell}
    scores, corrupted = np.zeros((len(job.cells), job.samples)), []
    with evaluating(anatomy.model):
        clean_values, clean = _recorded(anatomy, job, None, sites)
        target = int(clean.argmax()) if job.target is None else job.target
        for sample, noise in enumerate(job.corruption.noise):
            corrupted_values, distribution = _recorded(anatomy, job, noise, sites)
            corrupted.append(distribution)
            values = {"clean": clean_values, "corrupted": corrupted_values}
            for number, cell in enumerate(job.cells):
                scores[number, sample] = _restored(anatomy, job, noise, cell, values)[target]
                tick()
    return Scores(target, scores, clean, np.stack(corrupted))


def _recorded(anatomy: Anatomy, job: Job, noise: Tensor | None, sites) -> tuple[Values, np.ndarray]:
    values: Values = {}
    with ExitStack() as stack:
        for site, layer in sites:
            _at(stack, anatomy, site, layer, lambda x, key=(site, layer): values.__setitem__(key, x.clone()))
        return values, _distribution(anatomy, job, noise)


def _restored(anatomy: Anatomy, job: Job, noise: Tensor, cell: Cell, values: dict[str, Values]) -> np.ndarray:
    with ExitStack() as stack:
        for edit in cell:
            value = values[edit.source][edit.site, edit.layer][:, edit.position]
            _at(stack, anatomy, edit.site, edit.layer, lambda x, v=value, p=edit.position: _with(x, p, v))
        return _distribution(anatomy, job, noise)


def _with(hidden: Tensor, position: int, value: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[:, position] = value
    return hidden


def _at(stack: ExitStack, anatomy: Anatomy, site: str, layer: int, rewrite) -> None:
    places: dict[str, tuple] = {
        "block_input": (hidden_hook, anatomy.blocks),
        "block_output": (output_hook, anatomy.blocks),
        "attention_output": (output_hook, anatomy.attention),
        "mlp_output": (output_hook, anatomy.mlp),
        "mlp_activation": (hidden_hook, anatomy.down),
    }
    hook, modules = places[site]
    stack.enter_context(hook(modules[layer], rewrite))


def _distribution(anatomy: Anatomy, job: Job, noise: Tensor | None) -> np.ndarray:
    begin, end = job.corruption.span

    def corrupt(embeddings: Tensor) -> Tensor | None:
        if noise is None:
            return None
        subject = embeddings[:, begin:end].double() + noise.to(embeddings.device)
        return torch.cat((embeddings[:, :begin], subject.to(embeddings.dtype), embeddings[:, end:]), dim=1)

    with output_hook(anatomy.embedding, corrupt):
        logits = anatomy.model(input_ids=job.token_ids[None].to(anatomy.device), use_cache=False).logits
    return logits[0, -1].float().softmax(-1).cpu().numpy()
