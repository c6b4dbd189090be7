"""Small tokenizers made on the spot: byte-level as GPT-2's, with or without a beginning-of-sequence token."""

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

WORDS = ["The", " Space", " Need", " is", " in", " downtown", " Seattle", "Seattle", "'s", "le"]


def byte_level(bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows WORDS as single tokens, and every other text byte by byte."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", *letters])}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        _merge_up(word.replace(" ", "Ġ"), vocabulary, merges)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
            ]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def _merge_up(word: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Adds the merges that build a word from left to right."""
    built = word[0]
    for letter in word[1:]:
        if built + letter not in vocabulary:
            vocabulary[built + letter] = len(vocabulary)
        if (built, letter) not in merges:
            merges.append((built, letter))
        built += letter
