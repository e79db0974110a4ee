"""Win rates, habits and paired comparisons: published figures, closed forms, properties and a simulation."""

import gzip
import itertools
import json

import numpy as np
import pytest
import statsmodels.api as sm
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import binom

from rlhf_trl.judge.length_control import fit_length, length_controlled
from rlhf_trl.judge.verdict import parse_verdict
from rlhf_trl.judge.win_rate import compare_pairs, consistency, mean, pair_up, prompt_scores, win_rate
from rlhf_trl.stats.logistic import fit_logistic


def verdict(prompt, a_first, score, a="dpo", b="reference", status="ok", lengths=(100, 100)):
    return {"prompt_id": str(prompt), "subset": "helpful-base", "a": a, "b": b, "a_first": a_first, "score": score,
            "status": status, "length_a": lengths[0], "length_b": lengths[1]}  # fmt: skip


def both_orders(scores, a="dpo", b="reference", lengths=None):
    """Verdicts on prompts 0, 1, ... from the scores of `a` when it is shown first and second."""
    return [
        verdict(prompt, a_first, score, a, b, lengths=(100, 100) if lengths is None else lengths[prompt])
        for prompt, pair in enumerate(scores)
        for a_first, score in zip((True, False), pair, strict=True)
    ]


def judged(rule, lengths):
    """Verdicts of a judge that follows a rule on the lengths of the answers shown first and second."""
    return both_orders([(rule(a, b), 1 - rule(b, a)) for a, b in lengths], lengths=lengths)


def fastchat_verdicts():
    """GPT-4's verdicts on phi-3 and phi-3-dpo in both orders, from the raw texts."""
    with gzip.open(SHARED / "judge-data" / "mtbench_gpt4_pair_verdicts.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    verdicts = []
    for row in rows:
        first, second = parse_verdict(row["g1_judgment"]), parse_verdict(row["g2_judgment"])
        scores = first, None if second is None else 1 - second
        verdicts += [one | {"prompt_id": str(row["question_id"])}
                     for one in both_orders([scores], row["model_1"], row["model_2"])]  # fmt: skip
    return verdicts


SCORE = st.sampled_from([1.0, 0.5, 0.0, None])
VERDICTS = st.lists(st.tuples(SCORE, SCORE, st.integers(0, 9), st.integers(0, 9)), max_size=12).map(
    lambda rows: both_orders([row[:2] for row in rows], lengths=[row[2:] for row in rows])
)


# --- published figures and closed forms ------------------------------------------------------------------------------


def test_phi_3_against_phi_3_dpo():
    """What FastChat's rule gives on its 75 rows, and the place that GPT-4 favours on the 73 usable ones."""
    games = fastchat_verdicts()
    found = win_rate(games, "phi-3", "phi-3-dpo")
    fastchat = found["alternatives"]["disagreement_is_tie"]
    assert (fastchat["n"], fastchat["mean"]) == (73, (18 + 35 / 2) / 73), "18 wins, 20 losses, 35 ties"
    assert found["missing"] == {"comparisons": 2, "verdicts": {"invalid": 3}}
    assert (found["wins"], found["ties"], found["losses"]) == (18 + 5, 8 + 18, 20 + 4)
    assert found["win_rate"]["mean"] == pytest.approx((18 + 8 / 2 + 18 / 2 + 5 * 0.75 + 4 * 0.25) / 73)
    assert found["alternatives"]["consistent_only"]["mean"] == 22 / 46
    habits = consistency(games)
    assert habits["first_share"]["mean"] == 78 / 121
    assert habits["first_share"]["low"] > 0.5, "GPT-4 favours the first place"
    assert habits["consistency"]["mean"] == 46 / 73
    assert habits["tie_rate"]["mean"] == 25 / 146
    assert habits["invalid_rate"]["mean"] == 3 / 150


def test_a_judge_that_always_says_a_gives_one_half_and_consistency_0():
    games = both_orders([(1.0, 0.0)] * 40)
    found, habits = win_rate(games, "dpo", "reference"), consistency(games)
    assert found["win_rate"]["mean"] == 0.5
    assert (found["wins"], found["ties"], found["losses"]) == (0, 40, 0)
    assert found["alternatives"]["consistent_only"]["mean"] is None
    assert habits["consistency"]["mean"] == 0
    assert habits["first_share"]["mean"] == 1
    # What 40 prompts without an exception leave open, in closed form.
    assert habits["consistency"]["high"] == pytest.approx(1 - 0.025 ** (1 / 40))
    assert habits["first_share"]["low"] == pytest.approx(0.025 ** (1 / 40))


def test_only_prompts_with_both_orders_count_and_the_others_are_told():
    games = [
        *both_orders([(1.0, 1.0), (1.0, 0.5)]),
        verdict(2, True, 1.0),
        verdict(2, False, None),  # a reply that says nothing
        verdict(3, True, None, status="timeout"),
        verdict(3, False, None, status="refusal"),
        verdict(4, True, 0.0),  # the other order was not judged
    ]
    assert prompt_scores(games, "dpo", "reference") == {"0": 1.0, "1": 0.75}
    found = win_rate(games, "dpo", "reference")
    verdicts = {"invalid": 1, "not judged": 1, "refusal": 1, "timeout": 1}
    assert found["missing"] == {"comparisons": 3, "verdicts": verdicts}
    assert (found["n"], found["wins"], found["win_rate"]["mean"]) == (2, 2, 0.875)
    habits = consistency(games)
    assert habits["tie_rate"]["n"] == 2
    assert habits["invalid_rate"]["mean"] == 1 / 7, "of the replies that came"


def test_a_comparison_seen_from_the_other_side():
    verdicts = [verdict(0, True, 1.0, lengths=(7, 9)), verdict(0, False, 0.5, lengths=(7, 9)), verdict(1, True, 0.0)]
    turned = pair_up(verdicts, ("reference", "dpo"))
    assert turned.scores.tolist() == [[0.5, 0.0]], "shown first, the reference tied; shown second, it lost"
    assert (turned.lengths.tolist(), turned.policies) == ([[9, 7]], [("reference", "dpo")])
    assert turned.missing == {"comparisons": 1, "verdicts": {"not judged": 1}}


def test_length_habits():
    lengths = [(200, 100), (100, 300), (50, 50), (400, 100)]
    games = judged(lambda first, second: 1.0 if first > second else 0.0 if first < second else 0.5, lengths)
    habits = consistency(games)
    assert habits["prefers_longer"]["mean"] == 1
    shorter = consistency(judged(lambda first, second: float(first < second), lengths[:2]))
    assert shorter["prefers_longer"]["mean"] == 0


def test_comparisons_of_one_prompt_are_one_unit():
    """The same verdicts on two pairs of policies of each prompt add no certainty."""
    drawn = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=(80, 2))
    once, twice = both_orders(drawn), both_orders(drawn) + both_orders(drawn, a="sft")
    one, two = consistency(once), consistency(twice)
    assert two["tie_rate"]["n"] == 80
    for name in ("consistency", "first_share", "tie_rate"):
        assert two[name] == pytest.approx(one[name])


@pytest.mark.parametrize(("one", "other", "p"), [(5, 15, 0.041389), (15, 5, 0.041389), (0, 0, 1), (0, 5, 2 / 2**5)])
def test_the_sign_test_is_exact(one, other, p):
    ours = [(1.0, 1.0)] * one + [(0.0, 0.0)] * other + [(0.5, 0.5)] * 3
    games = both_orders(ours) + both_orders([(0.5, 0.5)] * len(ours), a="grpo")
    (row,) = compare_pairs(games, ["dpo", "grpo"], "reference")
    assert row["sign_test"]["p"] == pytest.approx(p, abs=5e-7)


def test_two_policies_against_one_reference():
    """15 prompts where only one policy beats the reference, 5 where only the other does, 10 where both do.

    10 more are ties, 4 of them losses of the other policy: only the sign test counts these.
    """
    dpo = [(1.0, 1.0)] * 15 + [(0.0, 0.0)] * 5 + [(1.0, 1.0)] * 10 + [(0.5, 0.5)] * 10
    grpo = [(0.0, 0.0)] * 15 + [(1.0, 1.0)] * 5 + [(1.0, 0.5)] * 10 + [(0.0, 1.0)] * 6 + [(0.0, 0.5)] * 4
    games = both_orders(dpo) + both_orders(grpo, a="grpo") + both_orders(grpo[:3], a="ppo")
    rows = compare_pairs(games, ["dpo", "grpo", "ppo", "sft"], "reference")
    counts = {(row["first"], row["second"]): row["n"] for row in rows}
    assert list(counts) == list(itertools.combinations(["dpo", "grpo", "ppo", "sft"], 2))
    assert list(counts.values()) == [40, 3, 0, 3, 0, 0]
    first = rows[0]
    assert first["difference"]["mean"] == pytest.approx((15 - 5 + 10 * 0.25 + 4 * 0.25) / 40)
    assert (first["sign_test"]["first_better"], first["sign_test"]["second_better"]) == (29, 5)
    assert first["sign_test"]["p"] == pytest.approx(2 * binom.cdf(5, 34, 0.5))
    assert first["sign_test"]["p_holm"] == pytest.approx(3 * first["sign_test"]["p"]), "three comparisons have prompts"
    same, doubt = rows[3]["difference"], 1 - 0.025 ** (1 / 3)
    assert (same["low"], same["mean"], same["high"], same["n"]) == pytest.approx((-doubt, 0, doubt, 3))
    assert rows[2]["difference"]["mean"] is None
    assert rows[2]["sign_test"] is None


def test_the_paired_interval_is_narrower_where_prompts_are_hard_for_both():
    random_ = np.random.default_rng(1)
    hard = random_.random((200, 1)) < 0.5
    one, two = (np.where(hard, 0.0, 1.0) * np.ones((200, 2)) for _ in range(2))
    two[:20] = 0.5
    games = both_orders(one) + both_orders(two, a="grpo")
    paired = compare_pairs(games, ["dpo", "grpo"], "reference")[0]["difference"]
    alone = win_rate(games, "dpo", "reference")["win_rate"]
    assert paired["high"] - paired["low"] < (alone["high"] - alone["low"]) / 2


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_same_score_everywhere_leaves_a_doubt_that_falls_with_n(value):
    few, many = mean(np.full(5, value)), mean(np.full(500, value))
    assert few["mean"] == many["mean"] == value
    assert 0 <= few["low"] <= many["low"] <= value <= many["high"] <= few["high"] <= 1
    assert few["high"] - few["low"] == pytest.approx(1 - 0.025 ** (1 / 5))
    assert many["high"] - many["low"] == pytest.approx(1 - 0.025 ** (1 / 500))


@pytest.mark.parametrize(
    "games",
    [
        [verdict(0, True, 1.0), verdict(0, True, 1.0)],
        [verdict(0, True, 1.0), verdict(0, False, 0.0, a="reference", b="dpo")],
        [verdict(0, True, 1.0, a="reference")],
        [verdict(0, True, 0.75), verdict(0, False, 0.5)],
        [verdict(0, True, 2.0)],  # what a failure becomes that is turned round as 1 - (-1)
        [verdict(0, True, float("nan"))],
    ],
)
def test_games_that_cannot_be_are_refused(games):
    with pytest.raises(ValueError, match="prompt 0"):
        consistency(games)


# --- length control --------------------------------------------------------------------------------------------------


def drawn_lengths(n, shift, seed):
    return np.maximum(np.random.default_rng(seed).normal([300 + shift, 300], 100, size=(n, 2)), 1).astype(int).tolist()


def test_a_longer_wins_judge_is_exposed():
    games = judged(lambda first, second: 1.0 if first > second else 0.0, drawn_lengths(300, 120, 0))
    found = length_controlled(games, "dpo", "reference", 0)
    assert found["raw"]["low"] > 0.7
    assert found["length_controlled"]["high"] < 0.5 < found["raw"]["low"], "nothing is left of the win"
    assert len(found["warnings"]) == 1
    assert "moves the win rate by -" in found["warnings"][0]
    assert consistency(games)["prefers_longer"]["mean"] == 1


def test_the_length_controlled_rate_is_that_of_the_model_that_made_the_verdicts():
    """Verdicts drawn from the model itself: the interval holds sigma(theta), which the raw rate is far from."""
    n, random_ = 2000, np.random.default_rng(3)
    lengths = np.array(drawn_lengths(n, 80, 3))
    apart = lengths[:, 1] - lengths[:, 0]
    chance = expit(-1.5 * np.tanh(apart / apart.std(ddof=1)) + 0.3)
    scores = (random_.random((n, 2)) < chance[:, None]).astype(float)
    found = length_controlled(both_orders(scores, lengths=lengths), "dpo", "reference", 0)
    assert found["length_controlled"]["low"] < expit(0.3) < found["length_controlled"]["high"]
    low, high = np.quantile(fit_length(scores.mean(axis=1), apart, 0)[1:, 0], [0.025, 0.975])
    assert low < -1.5 < high
    assert found["raw"]["low"] > expit(0.3)


def test_the_length_controlled_rate_is_that_of_statsmodels():
    """Apart from the prior, which has its closed form: at the best fit, it balances the slope of the likelihood."""
    lengths = drawn_lengths(200, 30, 4)
    scores = np.random.default_rng(4).choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=(200, 2))
    for n, near in ((200, 1e-3), (20, 0.1)):
        found = length_controlled(both_orders(scores[:n], lengths=lengths[:n]), "dpo", "reference", 0)
        apart, y = np.diff(lengths[:n])[:, 0], scores[:n].mean(axis=1)
        design = np.column_stack([np.tanh(apart / apart.std(ddof=1)), np.ones(n)])
        wanted = sm.GLM(y, design, sm.families.Binomial()).fit().params
        fitted = fit_length(y, apart, 0)[0]
        assert fitted[1] == pytest.approx(logit(found["length_controlled"]["mean"]))
        assert fitted == pytest.approx(wanted, abs=near)
        assert design.T @ (y - expit(design @ fitted)) == pytest.approx([fitted[0] / 25, 0], abs=1e-5)
        assert not found["warnings"]


def test_fits_of_resamples_are_those_of_statsmodels():
    random_ = np.random.default_rng(5)
    design = np.column_stack([np.tanh(random_.normal(size=(60, 2))), np.ones(60)])
    y = random_.choice([0.0, 0.25, 0.5, 1.0], size=60)
    weights = random_.multinomial(60, np.full(60, 1 / 60), size=20).astype(float)
    found = fit_logistic(design, weights * y, weights, np.zeros(3))
    for row, weight in zip(found, weights, strict=True):
        fit = sm.GLM(y, design, sm.families.Binomial(), var_weights=weight).fit(tol=1e-12)
        assert row == pytest.approx(fit.params, abs=1e-6)


def test_a_fit_with_a_prior_has_no_slope_left():
    """Where length alone decides, the prior's slope and the likelihood's cancel at the coefficients found."""
    x, y = np.array([-0.9, -0.4, -0.1, 0.2, 0.6]), np.array([1.0, 1, 1, 0, 0])
    design, ridge = np.column_stack([x, np.ones(5)]), np.array([0.04, 0.0])
    (found,) = fit_logistic(design, y[None], np.ones((1, 5)), ridge)
    assert design.T @ (y - expit(design @ found)) == pytest.approx(ridge * found, abs=1e-6)


def test_the_raw_rate_is_the_win_rate_whatever_the_seed():
    games = both_orders([(1.0, 0.5), (0.0, 1.0), (1.0, 1.0)] * 20, lengths=drawn_lengths(60, 0, 6))
    expected = win_rate(games, "dpo", "reference")["win_rate"]
    assert [length_controlled(games, "dpo", "reference", seed)["raw"] for seed in (0, 42)] == [expected] * 2


def test_lengths_that_cannot_be_told_from_the_policy():
    scores = np.random.default_rng(6).choice([0.0, 1.0], size=(100, 2))
    same = length_controlled(both_orders(scores), "dpo", "reference", 0)
    assert same["length_controlled"] == same["raw"]
    assert not same["warnings"]
    assert "the lengths is the same for every prompt" in same["why_same"]
    constant = length_controlled(both_orders(scores, lengths=[(90, 100)] * 100), "dpo", "reference", 0)
    assert constant["length_controlled"] == constant["raw"]
    assert "dpo gives the shorter answer to 100% of the prompts" in constant["warnings"][0]
    few = length_controlled(both_orders(scores, lengths=drawn_lengths(100, 300, 6)), "dpo", "reference", 0)
    assert "dpo gives the longer answer" in few["warnings"][0]
    always = length_controlled(both_orders([(1.0, 1.0)] * 30, lengths=drawn_lengths(30, 0, 6)), "dpo", "reference", 0)
    assert always["length_controlled"] == always["raw"]
    assert always["raw"]["mean"] == 1
    assert "the scores are the same" in always["why_same"]


# --- properties ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(VERDICTS, st.randoms(use_true_random=False))
def test_results_are_json_and_do_not_depend_on_the_order_of_the_games(games, shuffler):
    def results(games):
        return [
            win_rate(games, "dpo", "reference"),
            consistency(games),
            length_controlled(games, "dpo", "reference", 0),
            compare_pairs(games, ["dpo", "grpo"], "reference"),
        ]

    shuffled = games[:]
    shuffler.shuffle(shuffled)
    assert json.dumps(results(games), allow_nan=False) == json.dumps(results(shuffled), allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(VERDICTS)
def test_one_side_and_the_other_sum_to_1(games):
    one, other = prompt_scores(games, "dpo", "reference"), prompt_scores(games, "reference", "dpo")
    assert {key: 1 - value for key, value in one.items()} == other
    mine, theirs = win_rate(games, "dpo", "reference"), win_rate(games, "reference", "dpo")
    assert (mine["wins"], mine["ties"], mine["losses"]) == (theirs["losses"], theirs["ties"], theirs["wins"])
    pairs = [(mine["win_rate"], theirs["win_rate"])]
    pairs += [(mine["alternatives"][name], theirs["alternatives"][name]) for name in mine["alternatives"]]
    controlled = [length_controlled(games, *names, 0) for names in itertools.permutations(("dpo", "reference"))]
    pairs.append((controlled[0]["length_controlled"], controlled[1]["length_controlled"]))
    for first, second in pairs:
        if first["mean"] is None:
            assert second["mean"] is None
        else:
            assert first["mean"] + second["mean"] == pytest.approx(1, abs=1e-6)
            assert first["low"] + second["high"] == pytest.approx(1, abs=1e-6)


# --- simulation ------------------------------------------------------------------------------------------------------


def test_the_interval_of_the_win_rate_holds_the_truth_19_times_in_20():
    """A judge that favours the first place, ties where it sees little between the answers, and fails at times."""
    random_, prompts, experiments = np.random.default_rng(7), 120, 600

    def judge(n):
        """Scores of `a` in both orders: the prompts differ, and the verdicts on one prompt go together."""
        seen = random_.normal(0.3, 1.0, size=(n, 1)) + np.array([0.5, -0.5]) + random_.logistic(size=(n, 2)) / 2
        return np.where(np.abs(seen) < 0.3, 0.5, (seen > 0).astype(float))

    truth = float(judge(2_000_000).mean())
    assert 0.55 < truth < 0.65
    held, seen = 0, []
    for _ in range(experiments):
        scores = judge(prompts).astype(object)
        scores[random_.random((prompts, 2)) < 0.05] = None
        found = win_rate(both_orders(scores), "dpo", "reference")
        held += found["win_rate"]["low"] <= truth <= found["win_rate"]["high"]
        seen.append(found["n"])
    assert 0.93 <= held / experiments <= 0.97
    assert 0.88 < np.mean(seen) / prompts < 0.93, "about 0.95 squared have both verdicts"
