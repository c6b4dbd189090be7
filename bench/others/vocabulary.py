"""A tokenizer for models that have none: some packages ask for one even where prompts are given as token ids."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

SPECIAL = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "0")


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer to which the token 17 is the word "17"."""
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
