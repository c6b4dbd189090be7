"""Second looks: what a model reads from its tokens beside the input embedding.

Gemma 3n and 4 look every token up again in per-layer embeddings, others in tables of n-grams, or route it to experts
by its id. Noise on the input embedding does not reach these, and the corrupted run would still know the subject.

No list of names finds them all, so the model is asked: two prompts whose embeddings are made equal differ in nothing
but their ids. If the logits differ, something looks twice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fasttrace.models.hooks import evaluating, output_hook

N_TOKENS = 8
LONG_PROMPT = 64
"""Tokens where a hook of somebody's fails on fewer."""

BY_CHANCE = 10
"""How much farther other ids have to move the logits than the same ids do on a model that never repeats its numbers."""


def looks_twice(model: Any, embedding: nn.Module, ids: Tensor) -> bool:
    """Whether anything but the input embedding depends on token ids; two short forward passes.

    Args:
        model: a causal language model.
        embedding: its input embedding.
        ids: [1, position] different tokens, on the model's device.
    """

    def made_equal(hidden: Tensor) -> Tensor | None:
        return embeddings.clone() if hidden.shape == embeddings.shape else None

    with evaluating(model):
        embeddings = embedding(ids)
        with output_hook(embedding, made_equal):
            first, other = (model(input_ids=each, use_cache=False).logits for each in (ids, ids.roll(1, 1)))
            if torch.equal(first, other):
                return False
            again = model(input_ids=ids, use_cache=False).logits
    return _distance(first, other) > BY_CHANCE * _distance(first, again)


def words(model: Any, vocabulary: int, n_tokens: int = N_TOKENS) -> Tensor:
    """int64 [1, position] different tokens, without those that a model's code may treat otherwise than text."""
    special = set(_special_tokens(model))
    step = max(1, vocabulary // (n_tokens + len(special)))
    found = [token for token in range(0, vocabulary, step) if token not in special]
    return torch.tensor([found[:n_tokens]], dtype=torch.long, device="cpu")


def neutral_token(model: Any, vocabulary: int) -> int:
    """The token that stands for no word: padding, where models are made to see it so; else what ends or begins a text.

    Gemma's own code looks up padding in its per-layer embeddings wherever a position is not text.
    """
    settings = vars(model.config.get_text_config(decoder=True))
    named = (settings.get(f"{role}_token_id") for role in ("pad", "eos", "bos"))
    return next((token for value in named for token in _tokens(value) if 0 <= token < vocabulary), 0)


def second_look_note(model: nn.Module, token: int) -> str:
    """The sentence that is logged once a model, and that results carry."""
    return (
        f"{type(model).__name__} looks its tokens up a second time, beside its input embedding: there corrupted runs "
        f"see token {token} in place of the subject"
    )


def _special_tokens(model: Any) -> Iterator[int]:
    """Ids that a model's code may treat otherwise than text: padding, ends of a text, images."""
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index")):
                yield from _tokens(value)


def _tokens(value: Any) -> list[int]:
    return [token for token in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(token, int)]


def _distance(logits: Tensor, others: Tensor) -> float:
    return (logits.double() - others.double()).abs().max().item()
