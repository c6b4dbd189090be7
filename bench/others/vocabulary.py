"""A tokenizer for models that have none: some packages ask for one even where prompts are given as token ids."""

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

# A word of its own: otherwise the 0 of "100" would be one, too.
ZERO = AddedToken("0", single_word=True)
SPECIAL = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), ZERO)


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer to which the token 17 is the word "17"."""
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
