"""How numbers and texts are shown: to the precision that they have, and with nothing hidden."""

import pytest

from rlhf_trl.text.display import visible
from rlhf_trl.text.format import format_dollars, format_estimate


@pytest.mark.parametrize(
    "character", [*map(chr, range(0x202A, 0x202F)), "\u2066", "\u200b", "\ufeff", "\x9b", "\r", "\ud800"]
)
def test_characters_that_act_or_hide_are_printed_as_codes(character: str) -> None:
    assert visible(f"a{character}b") == f"a⟨U+{ord(character):04X}⟩b"


def test_text_of_all_scripts_is_left_alone() -> None:
    text = "naïve – “quoted”\n\tעברית العربية हिन्दी 日本語 👩\u200d🚀 می\u200cخواهم"
    assert visible(text) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ((1.234, 1.012, 1.449), "1.23 [1.01, 1.45]"),
        ((-0.0004, -0.21, 0.2), "0.00 [−0.21, 0.20]"),
        ((412.4, 388.0, 431.0), "412 [388, 431]"),
        ((0.0123, 0.0119, 0.0127), "0.01230 [0.01190, 0.01270]"),
        ((0.0, 0.0, 0.0), "0"),
        ((212.4, 96.0, None), "212 [96, ∞]"),
        ((212.4, None, 388.0), "212 [−∞, 388]"),
        ((212.4, None, None), "212 [−∞, ∞]"),
    ],
)
def test_estimates_are_printed_to_the_precision_they_have(estimate: tuple[float | None, ...], text: str) -> None:
    assert format_estimate(dict(zip(("mean", "low", "high"), estimate, strict=True))) == text


@pytest.mark.parametrize(
    ("dollars", "text"),
    [(0.0, "$0.00"), (0.4, "$0.40"), (12.344, "$12.34"), (0.0312, "$0.031"), (0.00004, "$0.000040")],
)
def test_dollars_are_not_rounded_to_nothing(dollars: float, text: str) -> None:
    assert format_dollars(dollars) == text
