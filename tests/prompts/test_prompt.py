"""Subjects and targets are found where the model sees them, or refused with the tokens shown."""

# ruff: noqa: RUF001 (quotes and dashes of all kinds are what some tests are about)

import logging
import unicodedata

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fasttrace.errors import ModelError, PromptError
from fasttrace.prompts.prompt import encode, plain_ids, subjects_of, token_text
from fasttrace.prompts.tokenization import check_tokenizer
from tests.helpers.tokenizers import CHAT_TEMPLATE, WORDS, Slow, byte_level, sentencepiece_like, word_pieces

TEXT = "The Space Needle is in downtown"
SCHEMES = ("first", "always", "never", "normalizer")
SENTENCEPIECE = [
    pytest.param({"prepend_scheme": scheme, "unigram": unigram}, id=f"{scheme}-{'unigram' if unigram else 'bpe'}")
    for scheme in SCHEMES
    for unigram in (False, True)
]


def coded(prompt=TEXT, subject="The Space Needle", target=" Seattle", tokenizer=None, **options):
    tokenizer = tokenizer or byte_level()
    return encode(tokenizer, prompt, subject, target, **{"vocabulary": len(tokenizer)} | options)


def piece(tokenizer, prompt):
    """The target as the vocabulary spells it."""
    return tokenizer.convert_ids_to_tokens(prompt.target_id)


def covered(prompt):
    return prompt.tokens[slice(*prompt.span)]


def test_the_tutorials_prompt_has_its_seven_tokens_and_four_of_the_subject():
    prompt = coded()
    assert prompt.tokens == ("The", " Space", " Need", "le", " is", " in", " downtown")
    assert prompt.span == (0, 4)
    assert prompt.subject == "The Space Needle"
    assert prompt.target_id == byte_level()(" Seattle")["input_ids"][0]


def test_a_bos_token_stays_and_shifts_the_span():
    prompt = coded(tokenizer=byte_level(bos=True))
    assert prompt.tokens[0] == "<s>"
    assert prompt.token_ids[0] == 0
    assert prompt.span == (1, 5)
    assert prompt.target_id != 0, "the target is encoded without the beginning-of-sequence token"


def test_a_subject_inside_the_prompt_is_found():
    assert coded(subject="downtown").span == (6, 7)


def test_space_around_the_subject_does_not_matter():
    assert coded(subject=" Space Needle ").span == (1, 4)


def test_a_subject_glued_to_punctuation_is_found():
    prompt = coded("The Space Needle's downtown", "The Space Needle")
    assert prompt.span == (0, 4)
    assert prompt.tokens[4] == "'s"


def test_a_subject_of_multi_byte_characters_covers_all_their_pieces():
    prompt = coded("The Zoë is in", "Zoë")
    assert prompt.tokens[:4] == ("The", " ", "Z", "o")
    assert prompt.span == (2, 6), "Z, o and the two bytes of ë"
    assert prompt.tokens[prompt.span[1]] == " is"


def test_an_emoji_subject_covers_all_its_bytes():
    prompt = coded("The 🗼 is", "🗼")
    assert prompt.tokens[prompt.span[1]] == " is"
    assert prompt.span[1] - prompt.span[0] >= 4


def test_a_span_may_be_given_instead_of_text():
    prompt = coded(subject=(1, 4))
    assert prompt.span == (1, 4)
    assert prompt.subject == "Space Needle"


def test_token_ids_need_no_tokenizer():
    prompt = encode(None, [5, 6, 7], (0, 2), 9, vocabulary=10)
    assert prompt.token_ids == (5, 6, 7)
    assert prompt.tokens == ("5", "6", "7")
    assert (prompt.text, prompt.subject, prompt.target_id) == (None, None, 9)


def test_the_target_may_be_left_to_the_model():
    assert coded(target=None).target_id is None


def test_the_first_token_of_a_long_target_is_taken_only_when_asked():
    tokenizer = byte_level()
    with pytest.raises(PromptError, match=r"target ' Tacoma' is \d tokens, \[.*\]; .*first_target_token"):
        coded(target=" Tacoma")
    assert coded(target=" Tacoma", first_target_token=True).target_id == tokenizer(" Tacoma")["input_ids"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": [], "subject": (0, 1)}, "prompt is empty"),
        ({"prompt": [1, 2.5], "subject": (0, 1)}, r"prompt\[1\] is 2.5: .*token id"),
        ({"prompt": [1, 10**6], "subject": (0, 1)}, "token id 1000000, the model knows 0"),
        ({"prompt": [1, -2], "subject": (0, 1)}, "token id -2, the model knows 0"),
        ({"prompt": [1, 2], "subject": "The"}, "give a half-open token span: 0:"),
        ({"subject": "Eiffel"}, "'Eiffel' does not occur in the prompt; its tokens are 0:'The' 1:' Space'"),
        ({"subject": ""}, "subject is empty"),
        ({"subject": "  "}, "subject is empty"),
        ({"subject": "n"}, "occurs 3 times in the prompt, at token spans"),
        ({"subject": (2, 2)}, "covers no tokens of a prompt of 7"),
        ({"subject": (3, 9)}, "covers no tokens of a prompt of 7"),
        ({"subject": (-1, 2)}, "covers no tokens"),
        ({"subject": 3}, "half-open token span such as"),
        ({"target": ""}, "target is empty"),
        ({"target": -1}, "target is -1"),
        ({"target": 10**6}, "a token id from 0 to"),
        ({"target": 1.5}, "target is 1.5"),
        ({"target": True}, "target is True"),
        (
            {"prompt": "The Space", "subject": "Space", "target": "'s", "vocabulary": 285},
            "target is 291; .* from 0 to 284",
        ),
        ({"max_positions": 6}, "7 tokens, the model has positions for 6"),
    ],
)
def test_what_cannot_be_traced_is_an_error_that_says_why(arguments, message):
    with pytest.raises(PromptError, match=message):
        coded(**arguments)


def test_text_without_a_tokenizer_is_an_error_that_says_what_to_give():
    with pytest.raises(PromptError, match=r"give token ids, or Tracer\(model, tokenizer\)"):
        encode(None, TEXT, (0, 4), 3, vocabulary=10)
    with pytest.raises(PromptError, match=r"give token ids, or Tracer\(model, tokenizer\)"):
        encode(None, [1, 2], (0, 1), " Seattle", vocabulary=10)


# The target: what the model would see after the prompt.


def test_a_target_without_its_space_is_the_token_after_a_space_and_the_user_is_told():
    tokenizer = byte_level()
    prompt = coded(target="Seattle")
    assert piece(tokenizer, prompt) == "ĠSeattle"
    (other,) = plain_ids(tokenizer, "Seattle")
    assert prompt.notes == (
        f"target 'Seattle' follows the prompt after a space: scoring ' Seattle' (token id {prompt.target_id}); "
        f"for 'Seattle' (token id {other}) give that id as the target",
    )
    assert coded(target=other).target_id == other


def test_everything_told_is_one_warning_and_nothing_is_said_where_nothing_differs(caplog):
    with caplog.at_level(logging.INFO, "fasttrace"):
        assert coded(target=" Seattle").notes == ()
        assert coded(target=None).notes == ()
        assert not caplog.records
        notes = coded("The Space Needles", "Needle", "Seattle", byte_level(eos=True, words=[" Needles", *WORDS])).notes
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("fasttrace", "WARNING")
    assert len(notes) == 3
    assert record.getMessage() == "; ".join(notes)


@pytest.mark.parametrize("target", ["Seattle", " Seattle"])
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_with_sentencepiece_too_the_target_is_the_piece_with_the_space(kind, target):
    tokenizer = sentencepiece_like(**kind)
    prompt = coded(target=target, tokenizer=tokenizer)
    assert piece(tokenizer, prompt) == "▁Seattle"
    assert len(prompt.notes) == (target == "Seattle")


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_target_glued_to_the_prompt_is_the_piece_without_a_space(kind):
    tokenizer = sentencepiece_like(**kind)
    for end in (" (", "\n", " - ", "\n\n", "'"):
        assert piece(tokenizer, coded(f"{TEXT}{end}", target="Seattle", tokenizer=tokenizer)) == "Seattle"


@pytest.mark.parametrize(
    ("prompt", "target", "seen"),
    [
        ("The x", "y", " y"),
        ("The 4", "2", " 2"),
        ("The x", "é", " é"),
        ("The x.", "y", " y"),
        ("The x:", "y", " y"),
        ("The (x)", "y", " y"),
        ("The 5%", "y", " y"),
        ("The é", "y", " y"),
        ("The e\u0301", "y", " y"),
        ("The 수도는", "서", " 서"),
        ("The x", " y", " y"),
        ("The x\n", "y", "y"),
        ("The x\t", "y", "y"),
        ("The (", "y", "y"),
        ('The "', "y", "y"),
        ("The $", "5", "5"),
        ("The x-", "y", "y"),
        ("The x", ".", "."),
        ("The x", ",", ","),
        ("The x", "'s", "'s"),
        ("The x", "\n", "\n"),
        ("The x", " ", " "),
        ("The 日本の", "首", "首"),
        ("The ひ", "ら", "ら"),
        ("The データ", "ー", "ー"),
        ("The 人々", "は", "は"),
        ("The 首都。", "東", "東"),
        ("The ไทย", "ก", "ก"),
        ("The ខ្មែរ", "ក", "ក"),
        ("The 用Google", "搜", "搜"),
        ("The 首都は", "T", "T"),
        ("The \uff21", "T", "T"),
    ],
)
def test_a_space_goes_between_words_of_scripts_with_spaces_and_nowhere_else(prompt, target, seen):
    tokenizer = byte_level(words=["The", *(word for word in (" y", " 2", " é", " 서", seen) if len(word.encode()) > 1)])
    found = coded(prompt, "The", target, tokenizer)
    assert [found.target_id] == plain_ids(tokenizer, seen)
    assert len(found.notes) == (target != seen)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The ticket costs", "$5"),
        ("The song was covered by", '"Mad Max" Vale'),
        ("The freezer is set to", "-5"),
        ("The finish is", "#1"),
        ("The price is", "€5"),
        ("The mood is", "😀"),
        ("The text is", "(5"),
        ("The author of “Winter Harbour”", "Ilona"),
        ("The singer of »Oslo«", "Ilona"),
        ("The singer of „Oslo“", "Ilona"),
        ('The singer of "Oslo"', "Ilona"),
        ("The أين تقع أوسلو؟", "في"),
        ("The capital is", "東京"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_the_scored_token_is_that_of_the_running_text_whatever_begins_the_target(prompt, target, known):
    start = f" {target.split()[0]}"
    tokenizer = byte_level(words=["The", start, start.strip()] if known else ["The"])
    expected = tokenizer(f"{prompt} {target}")["input_ids"][len(tokenizer(prompt)["input_ids"])]
    found = coded(prompt, "The", target, tokenizer, first_target_token=True)
    assert found.target_id == expected
    assert "follows the prompt after a space" in found.notes[0]
    as_ids = coded(tokenizer(prompt)["input_ids"], (0, 1), target, tokenizer, first_target_token=True)
    assert as_ids.target_id == expected


@pytest.mark.parametrize(("prompt", "target"), [("The well", "-"), ("The 5", "€"), ("The l’", "eau"), ("The 3.", "14")])
def test_where_writers_differ_the_token_without_a_space_is_taken_and_the_note_says_how_to_get_the_other(prompt, target):
    tokenizer = byte_level(words=["The", f" {target}", target])
    found = coded(prompt, "The", target, tokenizer)
    (other,) = plain_ids(tokenizer, f" {target}")
    assert [found.target_id] == plain_ids(tokenizer, target)
    assert found.notes == (
        f"target {target!r} follows the prompt without a space: scoring {target!r} (token id {found.target_id}); "
        f"for {f' {target}'!r} (token id {other}) write the target with a space before it, or give that id",
    )
    assert coded(prompt, "The", f" {target}", tokenizer).target_id == other
    assert coded(prompt, "The", other, tokenizer).target_id == other


@pytest.mark.parametrize(("end", "target"), [(" (", " Seattle"), (" “", " Seattle"), (" downtown-", " Seattle")])
def test_a_space_that_the_user_typed_stays(end, target):
    assert piece(byte_level(), coded(f"{TEXT}{end}", target=target)) == "ĠSeattle"


def test_what_hardly_anyone_types_on_purpose_is_told():
    notes = coded(f"{TEXT} ", target=" Seattle").notes
    assert notes == ("the prompt ends in a space and the target begins with one: the model sees both",)
    notes = coded(target="\ufeffSeattle", first_target_token=True).notes
    assert notes[-1].endswith("begins with the invisible character U+FEFF, which is tokenized too")


@pytest.mark.parametrize("target", ["Seattle", " Seattle", "$5", "-5", '"5"', "(5"])
def test_word_pieces_have_no_spaces_and_the_first_piece_of_a_word_is_scored(target):
    tokenizer = word_pieces()
    prompt = coded(target=target, tokenizer=tokenizer, first_target_token=True)
    assert prompt.target_id == plain_ids(tokenizer, target)[0]
    assert not any("without a space" in note for note in prompt.notes)
    glued = coded("The Space Need", "The", "le", tokenizer)
    assert piece(tokenizer, glued) == "le"


def test_after_a_special_token_nothing_is_put_before_the_target():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": ["[/INST]"]})
    assert piece(tokenizer, coded(f"{TEXT}[/INST]", target="Seattle", tokenizer=tokenizer)) == "Seattle"
    assert piece(tokenizer, coded(f"{TEXT} [/x]", target="Seattle", tokenizer=tokenizer)) == "ĠSeattle"
    assert piece(tokenizer, coded(target="[/INST]", tokenizer=tokenizer)) == "[/INST]"


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like(), Slow()], ids=["bytes", "pieces", "slow"])
def test_after_a_space_in_the_prompt_the_target_has_none_and_the_user_is_told(tokenizer):
    prompt = coded(f"{TEXT} ", target="Seattle", tokenizer=tokenizer)
    assert prompt.tokens[-1] == " "
    assert piece(tokenizer, prompt) == "Seattle"
    assert prompt.notes[-1] == (
        "prompt and target together would be other tokens, ending in [' downtown', ' Seattle']: scoring 'Seattle' "
        f"(token id {prompt.target_id}) on its own; drop the whitespace at the prompt's end"
    )


def test_a_long_target_that_would_merge_with_the_prompt_begins_at_its_own_first_token():
    tokenizer = byte_level()
    prompt = coded(f"{TEXT} ", target="Seattle's", tokenizer=tokenizer, first_target_token=True)
    assert piece(tokenizer, prompt) == "Seattle"


def test_a_target_that_would_merge_with_the_prompt_is_told_without_advice_on_whitespace():
    tokenizer = byte_level(words=["The", "東京", "京"])
    prompt = coded("The 東", "The", "京", tokenizer)
    assert [prompt.target_id] == plain_ids(tokenizer, "京")
    (note,) = prompt.notes
    assert "ending in [' ', '東京']" in note
    assert note.endswith("on its own")


@pytest.mark.parametrize("target", ["Seattle", " Seattle"])
def test_behind_token_ids_the_target_follows_the_same_rule_and_the_user_is_told(target):
    for tokenizer, expected in ((byte_level(), "ĠSeattle"), (sentencepiece_like(), "▁Seattle")):
        prompt = coded(plain_ids(tokenizer, TEXT), (0, 4), target, tokenizer)
        assert piece(tokenizer, prompt) == expected
        assert prompt.notes[-1] == (
            "the prompt is token ids: target ' Seattle' was tokenized without it, "
            f"scoring ' Seattle' (token id {prompt.target_id})"
        )
        assert len(prompt.notes) == 1 + (target == "Seattle")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_behind_token_ids_that_end_in_whitespace_the_target_has_no_space(scheme):
    tokenizer = sentencepiece_like(prepend_scheme=scheme)
    for end in (" ", "\n"):
        prompt = coded(plain_ids(tokenizer, TEXT + end), (0, 4), "Seattle", tokenizer)
        assert piece(tokenizer, prompt) == "Seattle"


def test_a_target_that_merges_with_the_text_it_is_tried_behind_is_tried_behind_another():
    tokenizer = byte_level(words=[*WORDS, "\n\n"])
    prompt = coded(plain_ids(tokenizer, TEXT), (0, 4), "\n", tokenizer)
    assert [prompt.target_id] == plain_ids(tokenizer, "\n")


def test_text_that_the_tokenizer_drops_is_no_prompt_and_nothing_to_try_a_target_behind():
    tokenizer = sentencepiece_like(prepend_scheme="always")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    assert plain_ids(tokenizer, "\n") == []
    prompt = coded(plain_ids(tokenizer, f"{TEXT} ("), (0, 4), "Seattle", tokenizer)
    assert piece(tokenizer, prompt) == "Seattle"
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("The", "")
    with pytest.raises(PromptError, match="the prompt is empty: 'The' gives no tokens"):
        coded("The", "The", tokenizer=tokenizer)


def test_where_a_space_makes_no_difference_nothing_is_said():
    words = {word: number for number, word in enumerate(["<unk>", ".", "The", "Space", "Seattle"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    prompt = coded("The Space", "Space", "Seattle", tokenizer)
    assert (prompt.target_id, prompt.notes) == (words["Seattle"], ())
    with pytest.raises(PromptError, match=r"target '\\n' gives no token of its own behind the prompt; give a token id"):
        coded("The Space", "Space", "\n", tokenizer)


def test_a_target_that_is_one_token_only_without_the_space_is_an_error_that_says_so():
    tokenizer = byte_level(words=["Seattle"])
    (single,) = plain_ids(tokenizer, "Seattle")
    message = rf"target ' Seattle' is 2 tokens, \[' ', 'Seattle'\]; without the space it is one, token id {single};"
    with pytest.raises(PromptError, match=message):
        coded(target="Seattle", tokenizer=tokenizer)


def test_the_first_token_of_a_long_target_is_the_first_behind_the_prompt_and_a_mere_space_is_told():
    tokenizer = sentencepiece_like()
    prompt = coded(target="Tacoma", tokenizer=tokenizer, first_target_token=True)
    assert piece(tokenizer, prompt) == "▁T"
    prompt = coded(target=" 1945", tokenizer=tokenizer, first_target_token=True)
    assert piece(tokenizer, prompt) == "▁"
    assert prompt.notes == ("the first token of target ' 1945', [' ', '1', '9', '4', '5'], is only whitespace",)


@pytest.mark.parametrize("first", [False, True])
def test_a_target_of_unknown_characters_is_an_error(first):
    with pytest.raises(PromptError, match=r"target '東' has characters unknown to the tokenizer, \['<unk>'\]"):
        coded(target="東", tokenizer=Slow(), first_target_token=first)
    assert coded(target="<unk>", tokenizer=Slow()).target_id == 0


@pytest.mark.parametrize("argument", ["prompt", "target"])
def test_half_of_a_character_is_refused(argument):
    with pytest.raises(PromptError, match="half of a character"):
        coded(**{argument: f"{TEXT} \ud800"})


# What fasttrace asks of a tokenizer.


class Processor:
    """As of models of text and images: images come first."""

    def __init__(self, **parts):
        self.__dict__.update(parts)

    def __call__(self, images=None, text=None):
        raise ValueError("You have to specify text")

    def decode(self, ids):
        return ""


@pytest.mark.parametrize(
    ("tokenizer", "advice"),
    [
        ("gpt2", r"the text 'gpt2': load it with AutoTokenizer.from_pretrained\('gpt2'\)"),
        (PreTrainedTokenizerFast, r"the class transformers.*: give a loaded one, .*.from_pretrained\(NAME\)"),
        (byte_level().backend_tokenizer, r"a tokenizers.Tokenizer: wrap it, transformers.PreTrainedTokenizerFast\(tok"),
        (
            Processor(tokenizer=byte_level()),
            r"a processor of texts and images: give its tokenizer, processor.tokenizer",
        ),
        (Processor(), r"has no convert_ids_to_tokens: give a Hugging Face tokenizer, .* or a processor's .tokenizer"),
        (torch.nn.Linear(1, 1), r"has no decode and no convert_ids_to_tokens: give a Hugging Face tokenizer"),
        (7, r"has no __call__ and no decode"),
    ],
)
def test_what_is_no_tokenizer_is_refused_with_what_to_give(tokenizer, advice):
    with pytest.raises(ModelError, match=f"^the tokenizer is .*{advice}"):
        check_tokenizer(tokenizer)


def test_tokenizers_are_handed_on():
    for tokenizer in (None, byte_level(), sentencepiece_like(), word_pieces(), Slow()):
        assert check_tokenizer(tokenizer) is tokenizer


class Strange(Slow):
    """A tokenizer that calls tokens which it has not by whatever it is told."""

    def __init__(self, answer):
        self.answer = answer
        super().__init__()

    def decode(self, ids, **options):
        if max(ids) < len(self.pieces):
            return super().decode(ids, **options)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def convert_ids_to_tokens(self, ids, *rest, **options):
        return None if isinstance(ids, int) and ids >= len(self.pieces) else super().convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    "answer", [IndexError("piece id is out of range."), TypeError(), OverflowError(), None, "", []]
)
def test_tokens_that_a_tokenizer_has_not_are_called_by_their_ids(answer):
    assert token_text(Strange(answer), 5000) == "<5000>"
    assert token_text(Strange(answer), Slow().pieces.index(" Need")) == " Need"
    prompt = encode(Strange(answer), [4, 5000, 5001], (1, 3), 5002, vocabulary=6000)
    assert prompt.tokens[1:] == ("<5000>", "<5001>")
    assert "<5000>" in prompt.subject or answer in ("", None, [])


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like(), word_pieces(), Slow()])
def test_every_kind_of_tokenizer_has_a_name_for_what_it_has_not(tokenizer):
    assert token_text(tokenizer, len(tokenizer) + 7) == f"<{len(tokenizer) + 7}>"
    assert token_text(None, 5) == "5"


def test_a_tokenizer_with_more_tokens_than_its_model_is_named_where_it_shows():
    tokenizer = byte_level()
    advice = f"the tokenizer has {len(tokenizer)} tokens: is it this model's"
    with pytest.raises(PromptError, match=f"the prompt has token id .*{advice}"):
        coded(vocabulary=200)
    with pytest.raises(PromptError, match=f"target is .*{advice}"):
        coded("is", "is", " Seattle", vocabulary=tokenizer(" Seattle")["input_ids"][0])
    with pytest.raises(PromptError, match=f"subject 'The' has token id .*{advice}"):
        subjects_of(tokenizer, ["The"], 200)


# Subjects to measure the noise on.


def test_subjects_are_texts_or_token_ids():
    tokenizer = byte_level()
    the, ids = plain_ids(tokenizer, "The"), plain_ids(tokenizer, "The Space")
    assert subjects_of(tokenizer, ("The", tuple(ids)), 999) == [the, ids]
    with pytest.raises(PromptError, match="there are no subjects"):
        subjects_of(tokenizer, (), 999)
    for empty in ("", ()):
        with pytest.raises(PromptError, match="which has no tokens; leave it out"):
            subjects_of(tokenizer, ("The", empty), 999)


def test_whole_numbers_of_other_packages_are_taken():
    ids = [5, 6, 7]
    expected = encode(None, ids, (0, 2), 9, vocabulary=10)
    for given in (np.array(ids), torch.tensor(ids), [np.int64(5), 6, 7], tuple(ids)):
        assert encode(None, given, np.array([0, 2]), np.int32(9), vocabulary=10) == expected
    for wrong in ([1.0], [True], ["1"], 5, b"ab"):
        with pytest.raises(PromptError, match="token id"):
            encode(None, wrong, (0, 1), 9, vocabulary=10)
    with pytest.raises(PromptError, match=r"subject\[1\] is 1.5: expected a whole number"):
        encode(None, ids, (0, 1.5), 9, vocabulary=10)


# What a tokenizer adds to a text.


@pytest.mark.parametrize("tokenizer", [byte_level(True, True), sentencepiece_like(eos=True), Slow()])
def test_a_token_put_at_the_end_is_dropped_and_the_user_is_told(tokenizer):
    ends = tokenizer.decode(tokenizer("The")["input_ids"][-1:])
    prompt = coded(tokenizer=tokenizer)
    assert prompt.tokens[0] == "<s>"
    assert prompt.tokens[-1] == " downtown"
    assert prompt.span == (1, 5)
    assert tokenizer.decode([prompt.target_id]).strip() == "Seattle"
    assert prompt.notes == (f"the tokenizer ends texts with {ends!r}: left out, for the model to continue",)


def test_an_end_token_that_the_user_wrote_stays():
    prompt = coded(f"{TEXT}</s>", tokenizer=sentencepiece_like(eos=True))
    assert prompt.tokens[-2:] == (" downtown", "</s>")


@pytest.mark.parametrize("tokenizer", [byte_level(bos=True), sentencepiece_like(), Slow()])
def test_a_beginning_token_that_the_user_wrote_is_not_doubled_and_the_user_is_told(tokenizer):
    prompt = coded("<s>The Space", "Space", tokenizer=tokenizer)
    assert tokenizer("<s>The Space")["input_ids"][:2] == [prompt.token_ids[0]] * 2, "the trap is there"
    assert prompt.tokens == ("<s>", "The", " Space")
    assert prompt.span == (2, 3)
    assert prompt.notes[0] == "the prompt already begins with '<s>': the tokenizer's own was left out"


def test_a_chat_template_is_left_alone():
    tokenizer = sentencepiece_like()
    plain = coded(tokenizer=tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert coded(tokenizer=tokenizer) == plain
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": f" {TEXT}"}], tokenize=False)
    assert rendered == f"<s><|user|> {TEXT}"
    prompt = coded(rendered, tokenizer=tokenizer)
    assert prompt.tokens == ("<s>", "<|user|>", *plain.tokens[1:])
    assert covered(prompt) == covered(plain)


def test_a_tokenizer_that_splits_a_text_otherwise_with_special_tokens_is_an_error():
    class Reversing(Slow):
        def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
            return token_ids_0[::-1]

    with pytest.raises(PromptError, match=r"one way with special tokens and in another without.*as token ids"):
        coded(tokenizer=Reversing())


# Subjects.


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_with_sentencepiece_subjects_are_found_at_the_start_inside_and_at_the_end(kind, bos):
    tokenizer = sentencepiece_like(bos, **kind)
    at_start = coded(tokenizer=tokenizer)
    assert at_start.span == (bos, bos + 4)
    assert "".join(covered(at_start)).strip() == "The Space Needle"
    assert covered(coded(subject="Space Needle", tokenizer=tokenizer)) == (" Space", " Need", "le")
    assert covered(coded(subject="downtown", tokenizer=tokenizer)) == (" downtown",)
    assert at_start.notes == ()


@pytest.mark.parametrize("subject", ["🗼", "東京", "Zoë", "ë"])
@pytest.mark.parametrize("start", ["", "The "])
@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_with_sentencepiece_a_multi_byte_subject_covers_its_bytes_and_no_space(kind, start, subject):
    prompt = coded(f"{start}{subject} is", subject, tokenizer=sentencepiece_like(**kind))
    letters = sum(len(letter.encode()) if len(letter.encode()) > 1 else 1 for letter in subject)
    assert prompt.span[1] - prompt.span[0] == letters, "a token for each letter or byte"
    assert prompt.tokens[prompt.span[1]] == " is"
    assert all(token.strip() for token in covered(prompt))
    assert prompt.notes == ()


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_byte_level_piece_of_a_space_and_half_a_character_belongs_to_the_subject(trim_offsets):
    tokenizer = byte_level(trim_offsets=trim_offsets)
    halves = byte_level(words=[*WORDS, " 🗼"], trim_offsets=trim_offsets)
    assert coded("The 🗼 is", "🗼", tokenizer=tokenizer).span == (2, 6)
    assert coded("The 🗼 is", "🗼", tokenizer=halves).span == (1, 2)
    assert coded("The 🗼 is", "🗼", tokenizer=halves).notes == ()


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(trim_offsets=False), sentencepiece_like(False), Slow()])
@pytest.mark.parametrize(
    "text", ["The Space Needle's", "The Space Needle.", "The Space Needle, is", "The Space Needle"]
)
def test_punctuation_behind_a_subject_stays_outside(tokenizer, text):
    prompt = coded(text, "Space Needle", tokenizer=tokenizer)
    assert "".join(covered(prompt)) == " Space Needle"


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like(False), Slow(), Slow(metaspace=True)])
def test_punctuation_around_a_subject_stays_outside(tokenizer):
    assert "".join(covered(coded("The (Space) is", "Space", tokenizer=tokenizer))) == "Space"


def test_a_token_that_crosses_the_subjects_border_belongs_to_it_and_the_user_is_told():
    tokenizer = byte_level(words=[" (Need", "le's", *WORDS])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    prompt = coded("The (Needle's is", "Needle", None, tokenizer)
    assert covered(prompt) == (" (Need", "le's")
    assert prompt.notes == (
        "subject 'Needle' shares its tokens [' (Need', \"le's\"] with the text around it: \"(Needle's\"",
    )


def test_a_whole_word_comes_before_the_same_letters_inside_others():
    prompt = coded("The le is in Needle", "le")
    assert covered(prompt) == (" ", "le")[1:] or covered(prompt) == (" ", "l", "e")[1:]
    assert prompt.notes == ()
    with pytest.raises(
        PromptError, match=r"'le' occurs 2 times in the prompt, at token spans \(2, 3\), \(4, 5\); give"
    ):
        coded("The le le Needle", "le", tokenizer=byte_level(words=["The", "le"]))


def test_the_place_of_a_subject_can_be_given():
    first, second = (coded("The Space is in Space", "Space", subject_start=start) for start in (4, 16))
    assert (first.span, second.span) == ((1, 2), (4, 5))
    assert covered(first) == covered(second) == (" Space",)
    for start in (5, -1, 99):
        with pytest.raises(PromptError, match=f"does not stand at character {start} "):
            coded("The Space is in Space", "Space", subject_start=start)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like()])
@pytest.mark.parametrize(("form", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_subject_in_another_unicode_form_covers_the_letters_of_the_prompt(form, other, tokenizer):
    prompt, subject = unicodedata.normalize(form, "The Zoë is in"), unicodedata.normalize(other, "Zoë")
    found = coded(prompt, subject, tokenizer=tokenizer)
    same = coded(prompt, unicodedata.normalize(form, subject), tokenizer=tokenizer)
    assert found.span == same.span
    assert same.notes == ()
    assert "in another Unicode form" in found.notes[0]


def test_what_looks_like_the_subject_is_shown():
    with pytest.raises(
        PromptError, match=r"occur in the prompt, but 'The' does \(there 'T' U\+0054, here 't' .*tokens are"
    ):
        coded(subject="the")


@pytest.mark.parametrize("metaspace", [False, True])
def test_a_slow_tokenizer_whose_tokens_spell_the_prompt_needs_no_offsets(metaspace):
    tokenizer = Slow(metaspace=metaspace)
    prompt = coded(subject="The Space Needle", tokenizer=tokenizer)
    assert "".join(covered(prompt)).strip() == "The Space Needle"
    assert prompt.span == (1, 5)
    assert len(prompt.notes) == 1, "of the end token"
    assert coded(subject="downtown", tokenizer=tokenizer).span == (7, 8)


@pytest.mark.parametrize(("tokenizer", "text"), [(Slow(lower=True), TEXT), (Slow(), "The Zoë Space Needle")])
def test_a_slow_tokenizer_whose_tokens_do_not_spell_the_prompt_needs_a_span(tokenizer, text):
    with pytest.raises(PromptError, match=r"characters are not known .*; give a half-open token span: 0:'<s>'"):
        coded(text, "Space Needle", target=None, tokenizer=tokenizer)
    assert coded(text, (1, 3), target=None, tokenizer=tokenizer).span == (1, 3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_show_their_space_with_either_kind_of_tokenizer(scheme):
    tokens = coded(tokenizer=sentencepiece_like(False, scheme)).tokens
    assert tokens[1:] == coded().tokens[1:]
    assert tokens[0].strip() == "The"


def test_the_tokens_of_a_text_that_stands_alone_hold_no_special_ones():
    for tokenizer in (byte_level(True, True), sentencepiece_like(eos=True), Slow()):
        alone = plain_ids(tokenizer, "The Space")
        assert [tokenizer.decode([token_id]).strip() for token_id in alone] == ["The", "Space"]
