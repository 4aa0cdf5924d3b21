"""Claim: error rates are counted as the field counts them, and Whisper's spelling decides no verdict."""
import random

import pytest

from eval import comparable, edit_distance, spell_out, word_error_rate


def test_word_error_rate_agrees_with_jiwer():
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(0)
    texts = [[" ".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(50)] for _ in range(2)]
    assert word_error_rate(*texts) == pytest.approx(100 * jiwer.wer(*texts))
    assert edit_distance("a b c".split(), "a x c d".split()) == 2 and word_error_rate(["a b"], [""]) == 100


def test_the_cap_keeps_one_endless_answer_from_standing_for_all():
    references, hypotheses = ["one two", "three four"], ["one two", "four " * 200]
    assert word_error_rate(references, hypotheses) > 1000
    assert word_error_rate(references, hypotheses, cap=True) == 50


@pytest.mark.parametrize("heard, reference, words", [
    ("735.", "seven three five", "seven three five"), ("7-3-5", "seven three five", "seven three five"),
    ("2,345", "two thousand three hundred and forty five", "two thousand three hundred and forty five"),
    ("206!", "two hundred and six", "two hundred and six"), ("Twenty-six", "twenty six", "twenty six"),
    ("123456", "nine hundred", "one two three four five six")])
def test_numerals_are_spelled_out_as_the_reference_is(heard, reference, words):
    assert spell_out(heard, reference) == words
    assert comparable(reference, heard) == (reference, words)


def test_other_texts_are_compared_in_whispers_own_spelling():
    pytest.importorskip("whisper_normalizer")
    assert len(set(comparable("mister smith doesn't pay twenty dollars", "Mr. Smith does not pay $20."))) == 1
