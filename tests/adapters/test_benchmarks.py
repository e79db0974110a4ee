"""Rows of benchmarks: read as they are published, and the official figures of known scores, worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_trl.adapters.score import score_file, summarise
from rlhf_trl.run.files import write_jsonl

ASK = {"prompt": "Why?"}


@pytest.fixture
def known(monkeypatch):
    """A reward model that takes a number as its own score."""
    monkeypatch.setattr("rlhf_trl.adapters.score.encode", lambda *_: ([1], [1]))
    monkeypatch.setattr("rlhf_trl.adapters.score.positions", lambda _: None)
    scores = lambda prompts, answers, *_: torch.tensor([float(text) for text in answers], dtype=torch.float64)  # noqa: E731
    return SimpleNamespace(score=scores, tokenizer=None, model=None)


def lists(chosen, rejected, **more):
    return {**ASK, "chosen": list(map(str, chosen)), "rejected": list(map(str, rejected)), **more}


REWARD_BENCH_2 = [
    lists([3], [1, 2, 2], subset="Focus", id="1"),
    lists([3], [3, 1, 1], subset="Focus", id="2"),  # half of it
    lists([1], [3, 1, 1], subset="Math", id="3"),
    lists([5], [3, 1], subset="Ties", id="ref:1"),
    lists([4, 3.5], [3, 2], subset="Ties", id="tied:1"),  # apart by no more than right answers among themselves
    lists([1], [2], subset="Ties", id="ref:2"),
    lists([5, 4.9], [1], subset="Ties", id="tied:2"),
]
TIES = 0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * (0 + math.tanh(-1 / 0.1 - 1)) / 2
RM_BENCH = [
    lists([1, 2, 3], [0, 2.5, 2.9], domain="chat"),
    lists([9, 9, 9], [1, 2, 3], domain="safety-refuse"),
    lists([0, 0, 0], [1, 2, 3], domain="safety-response"),
]
SIDES = {"response_A": "1", "response_B": "2"}
JUDGE_BENCH = [
    {"question": "Why?", "source": "livebench-math", "label": label, **SIDES} for label in ("B>A", "A>B", "B>A")
] + [{"question": "Why?", "source": "livecodebench", "label": "A>B", "response_A": "1", "response_B": "1"}]
RESPONSES = {"response_1": "1", "response_2": "2"}
PPE = [{**ASK, **RESPONSES, "winner": winner, "language": "English"} for winner in ("model_b", "model_a", "tie")]
BEST_OF_K = [
    {**ASK, **RESPONSES, "response_3": "3", "scores": [False, True, False]},
    {**ASK, **RESPONSES, "response_3": "3", "scores": [0, 0, 1], "category": "law"},
]
PAIRS = [{**ASK, "chosen": "2", "rejected": text, "subset": "xstest"} for text in ("1", "3")]
RIGHT = {"alpacaeval-easy": 1, "mt-bench-easy": 0, "mt-bench-hard": 1, "donotanswer": 0, "math-prm": 1, "hep-go": 0}
REWARD_BENCH = [{**ASK, "chosen": str(right), "rejected": "0.5", "subset": name} for name, right in RIGHT.items()]
REASONING = 984 / (984 + 164)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            REWARD_BENCH_2,
            ["RewardBench 2: Focus 75.0%, Math 0.0%", f"Ties {TIES:.1%}", f"score {(0.75 + TIES) / 3:.1%}"],
        ),
        (RM_BENCH, ["RM-Bench: chat 55.6%, safety 50.0%, hard 25.0%, normal 58.3%, easy 75.0%, score 52.8%"]),
        (JUDGE_BENCH, ["JudgeBench: livebench-math 66.7%, livecodebench 0.0%, all pairs 50.0%"]),
        (PPE, ["PPE pairs: English 50.0%, all pairs 50.0%", "2 of 3 lines scored"]),
        (BEST_OF_K, ["PPE best of K: best of K 50.0%"]),
        (PAIRS, ["RewardBench: xstest 50.0%, all pairs 50.0%"]),
        (
            REWARD_BENCH,
            [
                f"Chat {100 / 128:.1%}, Chat Hard 100.0%, Safety 0.0%, Reasoning {REASONING:.1%}",
                f"score {(100 / 128 + 1 + REASONING) / 4:.1%}",
            ],
        ),
        ([lists([2], [1])], ["RewardBench 2: all 100.0%, score 100.0%"]),
    ],
)
def test_the_official_figures_of_known_scores(known, tmp_path, rows, expected):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    text = summarise(score_file(known, tmp_path / "rows.jsonl"))
    assert all(part in text for part in expected), text


def test_the_scores_of_a_row_stand_as_its_answers_do(known, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [REWARD_BENCH_2[4], BEST_OF_K[0], JUDGE_BENCH[0]])
    ties, best, pair = score_file(known, tmp_path / "rows.jsonl")
    assert (ties["chosen"], ties["rejected"], ties["id"]) == ([4, 3.5], [3, 2], "tied:1")
    assert (best["chosen"], best["rejected"]) == ([2], [1, 3])
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == (2, 1, 1)


@pytest.mark.parametrize(
    "row",
    [
        lists([1], [""]), lists([1], [2]) | {"prompt": None}, {**BEST_OF_K[0], "scores": [1] * 9}, [1],
        {**PPE[0], "winner": []}, {**JUDGE_BENCH[0], "response_B": 7},
    ],
)  # fmt: skip
def test_a_row_that_is_none_says_why(known, tmp_path, row):
    write_jsonl(tmp_path / "rows.jsonl", [row])
    assert "why_not" in score_file(known, tmp_path / "rows.jsonl")[0]
