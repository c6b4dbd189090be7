"""Tracers of tiny models that read text."""

import fasttrace
from tests.helpers.tokenizers import byte_level
from tests.helpers.zoo import tiny_model

PROMPT = "The Space Needle is in downtown"


def tracer_with_text(family="gpt2", bos=False):
    tokenizer = byte_level(bos)
    return fasttrace.Tracer(tiny_model(family, vocab_size=len(tokenizer)), tokenizer)
