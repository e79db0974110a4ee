"""Words, their repetition, and refusals: against counts by hand, brute force, and answers cut short."""

import gzip
import itertools
import json
import math

import numpy as np
import pytest
from conftest import shared
from hypothesis import given
from hypothesis import strategies as st

from rlhf_trl.text.refusals import refuses
from rlhf_trl.text.words import (
    common_opening,
    compare_distinct,
    count_ngrams,
    distinct,
    opening,
    repetition,
    split_words,
)

# Texts of few words, so that n-grams repeat.
TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=6).map(" ".join), min_size=1, max_size=6)


def hh_answers(name: str) -> list[str]:
    """The chosen answers of a file of real pairs."""
    with gzip.open(shared("hh-rlhf", f"{name}.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line)["chosen"].split("\n\nAssistant:")[-1].strip() for line in file]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I’m sorry, I don't KNOW.", ["i'm", "sorry", ",", "i", "don't", "know", "."]),
        ("我很抱歉。", ["我", "很", "抱", "歉", "。"]),
        ("ひらカナ漢字ABC", ["ひ", "ら", "カ", "ナ", "漢", "字", "abc"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("مرحبًا بك", ["مرحبًا", "بك"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("cafe\u0301 Straße", ["cafe\u0301", "strasse"]),
        ("!!! 🙂🙂", ["!", "!", "!", "🙂", "🙂"]),
        ("'quoted' 3.5", ["'", "quoted", "'", "3", ".", "5"]),
        (" \n\t", []),
    ],
)
def test_words(text, words):
    assert split_words(text) == words


def test_repetition_by_hand():
    assert repetition("one two three four five") == 0
    assert repetition("one two three") == repetition("") == 0
    # 9 4-grams, 4 of them different.
    assert repetition("a b c d " * 3) == pytest.approx(1 - 4 / 9)
    assert repetition("a b a b", n=2) == pytest.approx(1 / 3)
    assert repetition("!" * 23) == pytest.approx(1 - 1 / 20)
    assert repetition("好" * 23) == pytest.approx(1 - 1 / 20)


@given(words=st.lists(st.sampled_from("abcd"), min_size=1, max_size=7), draw=st.integers(1, 7))
def test_distinct_is_the_mean_over_all_draws(words, draw):
    if draw <= len(words):
        draws = [len(set(some)) / draw for some in itertools.combinations(words, draw)]
        assert distinct([" ".join(words)], 1, draw) == pytest.approx(np.mean(draws))
    else:
        assert distinct([" ".join(words)], 1, draw) is None


def test_distinct_does_not_reward_short_answers():
    """Real answers and their first halves: plain distinct-2 calls the halves more diverse by a tenth, the drawn one
    does not."""
    whole = hh_answers("helpful-base")[:400]
    halves = [" ".join(text.split()[: len(text.split()) // 2]) for text in whole]

    def plain(texts):
        return distinct(texts, 2, sum(count_ngrams(text, 2).total() for text in texts))

    assert plain(halves) / plain(whole) > 1.08
    assert 0.95 < distinct(halves, 2, 3200) / distinct(whole, 2, 3200) < 1.02
    ratio, low, high = compare_distinct(halves, whole)
    assert 0.95 < low < ratio < high < 1.02


def test_comparison_of_a_set_with_itself_and_with_one_repeated_text():
    texts = hh_answers("helpful-base")[:60]
    assert compare_distinct(texts, texts) == pytest.approx((1, 1, 1))
    ratio, low, high = compare_distinct(["the very same answer, word by word"] * 60, texts)
    assert low <= ratio <= high < 0.1
    assert compare_distinct([""] * 60, texts) is None
    assert compare_distinct(["one answer"], ["another answer"]) is None


def test_jackknife_is_the_plain_one():
    """Against leaving each prompt out by hand."""
    ours, theirs = ["a b a b c", "b c d", "a b c d e f"], ["x y z", "p q r s", "x y a b"]
    sides = [[text.split() for text in side] for side in (ours, theirs)]

    def share(side, draw):
        pairs = [pair for words in side for pair in itertools.pairwise(words)]
        return np.mean([len(set(some)) / draw for some in itertools.combinations(pairs, draw)])

    # 2-grams without the longest text: 4 + 2 of ours, 2 + 3 of theirs.
    draw = 5
    logs = []
    for out in range(3):
        kept = [[words for i, words in enumerate(side) if i != out] for side in sides]
        logs.append(math.log(share(kept[0], draw) / share(kept[1], draw)))
    error = math.sqrt(2 / 3 * sum((value - np.mean(logs)) ** 2 for value in logs))
    ratio = share(sides[0], draw) / share(sides[1], draw)
    expected = (ratio, ratio * math.exp(-2.576 * error), ratio * math.exp(2.576 * error))
    assert compare_distinct(ours, theirs) == pytest.approx(expected)


def test_openings():
    assert opening("Well, I do not know that.") == "Well, I do not"
    assert opening("  Yes.\n") == "Yes."
    assert opening(" ") == ""
    texts = ["Sure! Here is a cake.", "sure!  HERE is a pie.", "No.", "", "I think so, too, my friend."]
    assert common_opening(texts) == (0.4, "Sure! Here is a")
    assert common_opening(texts[::-1]) == (0.4, "Sure! Here is a")
    assert common_opening(["b", "a"]) == (0.5, "a")
    assert common_opening(["", " "]) == (0.0, "")
    assert common_opening(["我很抱歉，不能", "我很抱歉，但是"]) == (1.0, "我很抱歉，")
    assert common_opening(["one two three", "one two four"], words=2) == (1.0, "one two")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I can't help you with that.", True),
        ("I’m sorry, but I can’t help.", True),
        ("Sorry, I'm not comfortable with that.", True),
        ("I'd rather not.", True),
        ("I must decline.", True),
        ("I'm sorry, I'm not sure what you mean.", False),
        ("You can't help it.", False),
        ("I wouldn't do that; it may shrink.", False),
        ("x" * 300 + " I can't help you.", False),
        ("", False),
    ],
)
def test_refusals(answer, expected):
    assert refuses(answer) is expected
