"""The clean run alone: plain forward passes over prompts of one length."""

from collections.abc import Sequence
from itertools import groupby

import torch

from fasttrace.engines.readout import CHUNK_BYTES
from fasttrace.models.anatomy import Anatomy
from fasttrace.models.hooks import evaluating

__all__ = ["clean_tops"]


def clean_tops(anatomy: Anatomy, prompts: Sequence[Sequence[int]]) -> list[int]:
    """The most probable next token of each prompt.

    Args:
        anatomy: the model.
        prompts: token ids.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    tops = [0] * len(prompts)
    with evaluating(anatomy.model):
        for length, same in groupby(order, key=lambda number: len(prompts[number])):
            numbers, size = list(same), max(1, CHUNK_BYTES // (4 * anatomy.vocabulary * length))
            for begin in range(0, len(numbers), size):
                part = numbers[begin : begin + size]
                tokens = [prompts[number] for number in part]
                ids = torch.tensor(tokens, dtype=torch.long, device=anatomy.device)
                found = anatomy.model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1).tolist()
                for number, top in zip(part, found, strict=True):
                    tops[number] = top
    return tops
