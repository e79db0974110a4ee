"""Agreement with human labels: the published statistics of 250 judge runs, and what no judge can fake."""

import gzip
import json

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa
from test_win_rate import both_orders, verdict

from rlhf_trl.judge.agreement import agreement, kappa

POINTS = {"1": 1.0, "2": 0.0, None: None}


def runs():
    with gzip.open(SHARED / "judge-data" / "llmbar_runs.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def winners(run):
    """The winner of each pair in both orders."""
    return list(zip(run["winner_swap_false"], run["winner_swap_true"], strict=True))


def run_verdicts(run, lengths=None):
    """The games of one LLMBar run, in which `a` is output 1, and its labels."""
    games = both_orders([(POINTS[first], POINTS[second]) for first, second in winners(run)], "1", "2", lengths)
    return games, {str(at): label == 1 for at, label in enumerate(run["labels"])}


def test_250_runs_of_llmbar_have_the_published_statistics(monkeypatch):
    """LLMBar counts a missing verdict and a tie as wrong: so they are judged here as a win of the wrong answer."""
    monkeypatch.setattr("rlhf_trl.judge.win_rate.RESAMPLES", 100)  # the intervals are not looked at
    checked = 0
    for run in runs():
        games, labels = run_verdicts(run)
        for one in games:
            if one["score"] is None:
                one["score"] = 0.0 if labels[one["prompt_id"]] else 1.0
        result = agreement(games, labels, 0)
        right, total = run["published"]["correct_both"].split(" = ")[0].split(" / ")
        assert result["both_correct"]["mean"] == pytest.approx(int(right) / int(total), abs=1e-12)
        average = float(run["published"]["correct_average"].rstrip("%")) / 100
        assert result["accuracy"]["mean"] == pytest.approx(average, abs=1e-12)
        won = np.array([[first == "1", second == "1"] for first, second in winners(run)], dtype=float)
        between_orders = kappa(won[:, :1], won[:, 1:], 0)["mean"]
        assert between_orders == pytest.approx(run["published"]["kappa_agreement"], abs=1e-12)
        equal, total = run["published"]["equal"].split(" = ")[0].split(" / ")
        assert np.mean([first == second for first, second in winners(run)]) == int(equal) / int(total)
        checked += 1
    assert checked == 250


def test_gpt_4_on_the_natural_set_beside_its_answers_lengths():
    """One run with its texts: the judge is far better than taking the longer answer."""
    with gzip.open(SHARED / "judge-data" / "llmbar_natural_gpt4_cot_raw.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    (run,) = [
        run for run in runs() if (run["subset"], run["judge"], run["strategy"]) == ("LLMBar/Natural", "GPT-4", "CoT")
    ]
    lengths = [(len(row["output_1"]), len(row["output_2"])) for row in rows]
    games, labels = run_verdicts(run, lengths)
    found = agreement(games, labels, 0)
    assert found["n"] == 100
    assert found["accuracy"]["mean"] == pytest.approx(float(run["published"]["correct_average"][:-1]) / 100)
    assert found["kappa"]["mean"] == pytest.approx(2 * found["accuracy"]["mean"] - 1), "without ties, chance is 1/2"
    chosen = [(one, two) if row["label"] == 1 else (two, one) for row, (one, two) in zip(rows, lengths, strict=True)]
    baseline = np.mean([(np.sign(better - worse) + 1) / 2 for better, worse in chosen])
    assert found["length_rule"]["accuracy"]["mean"] == pytest.approx(max(baseline, 1 - baseline))
    assert found["length_rule"]["over_rule"]["low"] > 0


def always(label, n=50):
    """Labels of n pairs: the human preferred `a` in the first `label` of them."""
    return {str(prompt): prompt < label for prompt in range(n)}


@pytest.mark.parametrize("label", [0, 20, 50])
def test_a_judge_that_always_says_a_is_right_half_the_time_whatever_the_labels(label):
    found = agreement(both_orders([(1.0, 0.0)] * 50), always(label), 0)
    assert found["accuracy"]["mean"] == 0.5
    assert found["both_correct"]["mean"] == 0
    assert found["kappa"]["mean"] == pytest.approx(0)
    # All agree with the label in one order of two: what 50 pairs leave open, around 0.
    assert (-found["kappa"]["low"], found["kappa"]["high"]) == pytest.approx((1 - 0.025 ** (1 / 50),) * 2)


def test_a_judge_that_only_ties_has_accuracy_one_half_and_is_never_right():
    found = agreement(both_orders([(0.5, 0.5)] * 50), always(20), 0)
    assert (found["accuracy"]["mean"], found["both_correct"]["mean"], found["kappa"]["mean"]) == (0.5, 0, 0)


def test_a_judge_that_is_always_right_is_so_in_every_frame():
    labels = always(50)
    found = agreement(both_orders([(1.0, 1.0)] * 50), labels, 0)
    assert (found["accuracy"]["mean"], found["both_correct"]["mean"], found["kappa"]["mean"]) == (1, 1, 1)
    assert found["kappa"]["low"] == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / 50)))
    turned = agreement(both_orders([(0.0, 0.0)] * 50, "reference", "dpo"), dict.fromkeys(labels, False), 0)
    assert turned["kappa"] == found["kappa"]


def test_missing_verdicts_are_left_out_and_counted():
    games = [*both_orders([(1.0, 1.0), (0.0, 0.0)]), verdict(2, True, None), verdict(2, False, 1.0)]
    games += [verdict(3, True, None, status="timeout"), verdict(3, False, None, status="timeout")]
    found = agreement(games, always(4, 4), 0)
    assert (found["n"], found["accuracy"]["mean"]) == (2, 0.5)
    assert found["missing"] == {"comparisons": 2, "verdicts": {"invalid": 1, "timeout": 2}}
    with pytest.raises(KeyError):
        agreement(games, always(1, 1), 0)


def test_the_better_length_rule_may_be_to_take_the_shorter():
    lengths = [(10, 20)] * 30 + [(20, 10)] * 15 + [(10, 10)] * 5
    found = agreement(both_orders([(1.0, 1.0)] * 50, lengths=lengths), always(50), 0)
    assert found["length_rule"]["takes"] == "shorter"
    assert found["length_rule"]["accuracy"]["mean"] == (30 + 5 / 2) / 50
    assert found["length_rule"]["over_rule"]["mean"] == pytest.approx(1 - 32.5 / 50)


def test_kappa_of_two_raters():
    """Cohen (1960) worked out by statsmodels, on three outcomes, with an interval that holds it."""
    random_ = np.random.default_rng(0)
    one = random_.choice([0.0, 0.5, 1.0], size=200)
    other = np.where(random_.random(200) < 0.6, one, random_.choice([0.0, 0.5, 1.0], size=200))
    table = [[float(np.sum((one == i) & (other == j))) for j in (0, 0.5, 1)] for i in (0, 0.5, 1)]
    wanted, found = cohens_kappa(table), kappa(one[:, None], other[:, None], 0)
    assert found["mean"] == pytest.approx(wanted.kappa)
    assert (found["low"], found["high"]) == pytest.approx((wanted.kappa_low, wanted.kappa_upp), abs=0.02)


SCORE = st.sampled_from([1.0, 0.5, 0.0, None])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(SCORE, SCORE, st.booleans(), st.integers(0, 3)), max_size=10))
def test_results_are_json_and_do_not_depend_on_which_answer_is_a(rows):
    games = both_orders([row[:2] for row in rows], lengths=[(row[3], 1) for row in rows])
    labels = {str(at): row[2] for at, row in enumerate(rows)}
    turned = [
        one
        | {"a": one["b"], "b": one["a"], "a_first": not one["a_first"]}
        | {"score": None if one["score"] is None else 1 - one["score"]}
        | {"length_a": one["length_b"], "length_b": one["length_a"]}
        for one in reversed(games)
    ]
    found, other = agreement(games, labels, 0), agreement(turned, {key: not value for key, value in labels.items()}, 0)
    json.dumps(found, allow_nan=False)
    for name in ("accuracy", "both_correct", "kappa"):
        assert found[name] == pytest.approx(other[name])
    assert found["missing"] == other["missing"]
