"""Subjects and targets are found through offsets, or refused with the tokens shown."""

import pytest

from fasttrace.errors import PromptError
from fasttrace.prompts import encode
from tests.tokenizers import byte_level

TEXT = "The Space Needle is in downtown"


def coded(prompt=TEXT, subject="The Space Needle", target=" Seattle", tokenizer=None, **options):
    tokenizer = tokenizer or byte_level()
    return encode(tokenizer, prompt, subject, target, vocabulary=len(tokenizer), **options)


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
