"""Subjects and targets are found where the model sees them, or refused with the tokens shown."""

import logging

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fasttrace.errors import PromptError
from fasttrace.prompts import encode, plain_ids
from tests.tokenizers import CHAT_TEMPLATE, WORDS, Slow, byte_level, sentencepiece_like

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
        ({"prompt": [1, 2.5], "subject": (0, 1)}, "whole token ids"),
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


def test_after_a_special_token_nothing_is_put_before_the_target():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": ["[/INST]"]})
    assert piece(tokenizer, coded(f"{TEXT}[/INST]", target="Seattle", tokenizer=tokenizer)) == "Seattle"
    assert piece(tokenizer, coded(f"{TEXT} [/x]", target="Seattle", tokenizer=tokenizer)) == "ĠSeattle"


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
