"""Small tokenizers made on the spot: byte-level as GPT-2's, SentencePiece as Llama's, BERT's, a slow one."""

import re

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

WORDS = ["The", " Space", " Need", " is", " in", " downtown", " Seattle", "Seattle", "'s", "le"]
SENTENCEPIECE_WORDS = [*(f"▁{word.strip()}" for word in WORDS[:7]), "The", *WORDS[7:]]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"


def byte_level(
    bos: bool = False, eos: bool = False, words: list[str] = WORDS, trim_offsets: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows words as single tokens, and every other text byte by byte."""
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", *letters])}
    merges: list[tuple[str, str]] = []
    for word in words:
        _merge_up(_as_bytes(word), vocabulary, merges)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    offsets = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.post_processor = processors.Sequence([offsets, _template(vocabulary, bos, eos, end="<s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def sentencepiece_like(
    bos: bool = True, prepend_scheme: str = "first", *, eos: bool = False, unigram: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with "▁" for a space, and bytes for characters that it does not know.

    Args:
        bos, eos: what it adds to a text.
        prepend_scheme: "first" as Llama's, "always" as T5's, "never" as Gemma's, or "normalizer" as Llama's until
            transformers 4, which turns a leading space into two.
        unigram: of the most probable pieces, in place of merges.
    """
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *BYTES])}
    for letter in sorted({*"".join(SENTENCEPIECE_WORDS), "("}):
        vocabulary[letter] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in SENTENCEPIECE_WORDS:
        _merge_up(word, vocabulary, merges)
    tokenizer = Tokenizer(
        Unigram([(piece, _log_probability(piece)) for piece in vocabulary], unk_id=0, byte_fallback=True)
        if unigram
        else BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if prepend_scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    strip = [] if prepend_scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.post_processor = _template(vocabulary, bos, eos, end="</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|user|>"],
    )


def word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer as BERT's: no spaces, and "##" before what goes on a word; signs are words of their own."""
    letters = sorted({*"".join(WORDS).replace(" ", ""), *'$#-(".05'})
    pieces = ["[UNK]", *(word.strip() for word in WORDS), *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python: words with the space before them, other characters one by one; no offsets."""

    def __init__(self, lower: bool = False, metaspace: bool = False, **options):
        self.lower, self.space = lower, "▁" if metaspace else " "
        pieces = ["<unk>", "<s>", "</s>", *(word.replace(" ", self.space) for word in WORDS), f"{self.space}The"]
        self.pieces = list(dict.fromkeys([*pieces, *map(chr, range(128)), self.space]))
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {piece: number for number, piece in enumerate(self.pieces)} | self.added_tokens_encoder

    def _tokenize(self, text, **options):
        text = text.lower() if self.lower else text
        spaced = text if self.space == " " else f" {text}".replace(" ", self.space)
        words = "|".join(re.escape(piece) for piece in sorted(self.pieces, key=len, reverse=True))
        return re.findall(f"{words}|.", spaced)

    def _convert_token_to_id(self, token):
        return self.pieces.index(token) if token in self.pieces else 0

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens):
        text = "".join(tokens)
        return text if self.space == " " else text.replace(self.space, " ").removeprefix(" ")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [1, *token_ids_0, 2]


def _template(vocabulary: dict[str, int], bos: bool, eos: bool, end: str) -> processors.TemplateProcessing:
    single = ["<s>"] * bos + ["$A"] + [end] * eos
    return processors.TemplateProcessing(
        single=single, special_tokens=[(name, vocabulary[name]) for name in {"<s>", end}]
    )


def _as_bytes(word: str) -> str:
    """A word in the letters of a byte-level vocabulary."""
    return ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]


def _log_probability(piece: str) -> float:
    return -2.0 if piece in SENTENCEPIECE_WORDS else -20.0


def _merge_up(word: str, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Adds the merges that build a word from left to right."""
    built = word[0]
    for letter in word[1:]:
        if built + letter not in vocabulary:
            vocabulary[built + letter] = len(vocabulary)
        if (built, letter) not in merges:
            merges.append((built, letter))
        built += letter
