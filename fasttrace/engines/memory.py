"""How many tokens a pack may have: free memory over the bytes that one token takes.

The bytes are a model of the allocator's peak inside a pass, measured on GPT-2 and Llama-like shapes
(`test_memory.py` measures it again): hidden states, projections and keys of one block at a time, the widest
activation of its MLP, and apart from the pack the logits of one chunk of rows.
"""

import logging
from collections.abc import Iterable, Sized
from dataclasses import dataclass

import psutil
import torch
from torch import distributed

from fasttrace.checks import memory_for
from fasttrace.engines.readout import CHUNK_BYTES
from fasttrace.experiment.metrics import METRICS
from fasttrace.experiment.settings import token_budget
from fasttrace.models.anatomy import Anatomy
from fasttrace.prompts.prompt import Prompt

logger = logging.getLogger("fasttrace")

HIDDEN_COPIES = 14
"""Tensors of a token's hidden width that are alive at once while a block runs: 8 to 13 were seen."""

WIDE_COPIES = 3
"""The same of its widest activation: before, inside and after the activation function."""

READOUT_BYTES = 4 * CHUNK_BYTES
"""Logits of a chunk of rows, in the model's type and in float32, and what a softmax adds."""

MEMORY_SHARE = 0.7
"""Part of the free memory that an automatic budget lets a pass take."""

CPU_TOKENS = 8192
"""Largest pack that an automatic budget makes on a CPU: larger ones leave its caches and run slower per token. An
offloaded model's weights are loaded once a pass, which larger packs make up for."""


def bytes_per_token(anatomy: Anatomy) -> int:
    """Memory that one token of a pack takes at the peak of a pass."""
    return anatomy.dtype.itemsize * (HIDDEN_COPIES * anatomy.d_model + WIDE_COPIES * anatomy.widest)


@dataclass
class Budget:
    """Most tokens of a pack, lowered when memory runs out.

    Attributes:
        tokens: that number.
    """

    tokens: int

    def lower(self, failed: int) -> None:
        """Halves it below a pack of `failed` tokens that did not fit."""
        self.tokens = max(1, min(self.tokens, failed) // 2)
        logger.warning("out of memory with %d tokens in a pass; going on with at most %d", failed, self.tokens)


def tokens_allowed(anatomy: Anatomy, budget: int | str) -> int:
    """Most tokens of a pack.

    Args:
        anatomy: the model.
        budget: that number, or "auto" from the free memory of the device that has least of it.

    Raises:
        PlanError: neither "auto" nor a number >= 1.
    """
    if budget == "auto":
        free = _least_of_ranks(anatomy, min(map(free_bytes, anatomy.devices)))
        by_memory = max(1, int((MEMORY_SHARE * free - READOUT_BYTES) / bytes_per_token(anatomy)))
        in_cache = anatomy.device.type == "cpu" and not anatomy.is_offloaded
        return min(by_memory, CPU_TOKENS) if in_cache else by_memory
    return int(token_budget(budget))


def check_samples(anatomy: Anatomy, samples: int, streams: Sized, prompts: Iterable[Prompt]) -> None:
    """Refuses noise samples that main memory cannot hold.

    Args:
        anatomy: the model.
        samples: noise draws.
        streams: the grids of a prompt.
        prompts: each is traced with all samples; only the largest counts.

    Raises:
        PlanError: their noise and scores need more than the free memory.
    """
    cells = len(streams) * anatomy.n_layers
    sizes = (_bytes_per_sample(anatomy, cells, len(each.token_ids), each.span) for each in prompts)
    memory_for("samples", samples, samples * max(sizes, default=0), "their noise and scores")


def _bytes_per_sample(anatomy: Anatomy, cells: int, length: int, span: tuple[int, int]) -> int:
    """Noise as drawn and as scaled, logits and distributions, and the cells' metrics as computed and as joined."""
    scores = 8 * cells * length * len(METRICS)
    return 2 * (8 * (span[1] - span[0]) * anatomy.d_model + 4 * anatomy.vocabulary + scores)


def shares_passes(anatomy: Anatomy) -> bool:
    """Whether several processes compute this model together, so that all have to make the same passes."""
    return getattr(anatomy.model, "_device_mesh", None) is not None


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device, what torch holds without using it included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def _least_of_ranks(anatomy: Anatomy, count: int) -> int:
    if not shares_passes(anatomy):
        return count
    least = torch.tensor(count, dtype=torch.long, device=anatomy.device)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return int(least)
