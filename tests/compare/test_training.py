"""Stability, convergence and compute of training runs: closed forms, noise, and what means the same."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from report_fixtures import GOLD, STAGES, recipe_of, training_stats

from rlhf_trl.compare.step import compare_stages, render, summarise, weigh
from rlhf_trl.compare.training import describe_curve, needed, reach, sampled_tokens, smooth
from rlhf_trl.recipe.recipe import Recipe

# Mean reward of PPO in a run of the demo, 32 updates.
REWARDS = [
    *(0.839, 0.862, 1.247, 1.177, 1.621, 1.505, 1.874, 1.473, 1.508, 1.885, 1.968, 2.093, 1.985, 2.127, 2.31, 2.262),
    *(2.151, 2.145, 2.373, 2.291, 2.222, 2.32, 2.365, 2.384, 2.354, 2.446, 2.538, 2.631, 2.617, 2.5, 2.618, 2.447),
]
ALIKE = {"temperature": 1.0}
RL = {
    **STAGES,
    **GOLD,
    "grpo": {**STAGES["grpo"], "args": {"beta": 0.05, "max_completion_length": 64, **ALIKE}},
    "ppo": {**STAGES["ppo"], "args": {"kl_coef": 0.05, "response_length": 64, "stop_token": "eos", **ALIKE}},
}


def noise(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=rows)


def describe(values: Any, better: Any = "higher") -> dict[str, Any]:
    return describe_curve(range(1, len(values) + 1), values, better)


# --- one curve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "smoothed"),
    [
        ([9, 1, 5, 2, 8, 3, 7], [9, 5, 5, 3, 5, 7, 7]),
        ([4, 9, 1, 2], [4, 4, 2, 2]),
        ([5, 1], [5, 1]),
        ([1, 2, 4, 1000, 16, 32, 64], [1, 2, 4, 16, 32, 32, 64]),
    ],
)
def test_smooth_takes_narrower_windows_at_the_ends(values, smoothed):
    assert smooth(values).tolist() == smoothed


@pytest.mark.parametrize("values", [[], [1, math.nan], [math.inf]])
def test_what_is_no_curve_is_refused(values):
    with pytest.raises(ValueError, match="finite"):
        describe(values)


def test_stability_of_a_curve_by_hand():
    found = describe([0, 2, 4, 1, 5, 1, -3, 0])
    assert smooth([0, 2, 4, 1, 5, 1, -3, 0]).tolist() == [0, 2, 2, 2, 1, 1, 0, 0]
    assert found["variance"] == pytest.approx(np.var([0, 2, 4, 1, 5, 1, -3, 0], ddof=1))
    assert found["noise_variance"] == pytest.approx(np.var([0, 2, -1, 4, 0, -3], ddof=1))
    # Of the six inner rows all but the second and the sixth (a fall goes on) turn.
    assert found["oscillation"] == pytest.approx(4 / 6)
    assert (found["drawdown"], found["final_minus_best"]) == (2, -2)
    assert json.loads(json.dumps(found)) == found
    one = describe([2])
    assert [one[name] for name in ("variance", "noise_variance", "oscillation", "drawdown")] == [None, None, None, 0]
    assert describe(noise(40, 0), "lower") == describe(-noise(40, 0))


def test_noise_variance_does_not_see_the_trend():
    """1 + v - 2 / 5 with v = 0.2868, the variance of the median of 5 normal numbers (Teichroew, 1956)."""
    for trend in (0, np.linspace(0, 500, 20_000)):
        assert describe(noise(20_000, 2) + trend)["noise_variance"] == pytest.approx(0.887, abs=0.02)
    # Of three values the middle one is an extreme in 4 of 6 orders (Bienayme, 1874).
    assert describe(noise(20_000, 1))["oscillation"] == pytest.approx(2 / 3, abs=0.01)


def test_noise_has_no_spikes_and_a_spike_is_found():
    assert np.mean([bool(describe(noise(50, seed))["spikes"]) for seed in range(500)]) < 0.015
    hits = []
    for seed in range(200):
        values, at = noise(50, seed), int(np.random.default_rng(seed).integers(2, 48))
        values[at] += 8 * (-1) ** seed
        hits.append(at + 1 in describe(values)["spikes"])
    assert np.mean(hits) > 0.9
    values = noise(60, 3)
    values[[7, 30, 31]] += 12
    assert describe(values)["spikes"] == [8, 31, 32]


def test_smooth_curves_and_new_levels_have_no_spikes():
    time, level = np.linspace(0, 4, 40), noise(60, 4) / 10
    level[30:] += 8
    digit = np.full(40, 0.3)
    digit[20] = np.nextafter(0.3, 1)
    for values in (np.zeros(40), digit, np.exp(-time), np.sin(time), time**3, level):
        assert describe(values)["spikes"] == []


@pytest.mark.parametrize("rows", [6, 20, 100])
def test_noise_and_improving_runs_do_not_diverge(rows):
    for curve in (np.zeros(rows), 3 * np.linspace(0, 1, rows)):
        assert np.mean([describe(curve + noise(rows, seed))["diverging"] for seed in range(500)]) < 0.015


def test_a_run_that_breaks_diverges():
    time = np.linspace(0, 1, 30)
    for curve in (np.where(time < 0.7, 0, -9), -10 * time, np.where(time < 0.7, 14 * time, -1)):
        assert np.mean([describe(curve + noise(30, seed))["diverging"] for seed in range(100)]) > 0.9
    assert describe([0.7, 0.65, 0.66, 0.6, 2, 9, 80, 1e3, 1e5], "lower")["diverging"]
    assert not describe([9, 9, 9, 0, 0])["diverging"]  # too few rows
    assert not describe(np.where(time < 0.7, 20 * time, 5))["diverging"]  # it ends above its start
    assert not describe(REWARDS)["diverging"] and describe(REWARDS)["spikes"] == []


COSTS = {"steps": [10, 20, 30, 40, 50, 60], "seconds": [1.5, 3.0, 4.5, 6.0, 7.5, 9.0], "tokens": None}


@pytest.mark.parametrize(
    ("values", "threshold", "hold", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], 3, 2, (True, 30, 4.5)),
        # Smoothed: 0, 4, 2, 2, 2, 2.
        ([0, 4, 5, 1, 2, 2], 3, 1, (True, 20, 3.0)),
        ([0, 4, 5, 1, 2, 2], 3, 2, (False, 50, 7.5)),
        ([0, 4, 5, 1, 2, 2], 2, 5, (True, 20, 3.0)),
        ([0, 0, 0, 1, 1, 2], 2, 2, (False, 50, 7.5)),  # reached too late to be held
        ([0, 0, 0, 1, 1, 2], 2, 7, (False, 0, 0)),
    ],
)
def test_a_threshold_must_be_held(values, threshold, hold, expected):
    found = reach(COSTS, values, threshold, hold)
    assert (found["reached"], found["steps"], found["seconds"]) == expected
    assert (found["tokens"], found["final"]) == (None, values[-1])


def test_a_real_run_converges():
    assert reach({"steps": range(1, 33)}, REWARDS, 2.0, 3)["steps"] == 13


# --- runs beside each other ------------------------------------------------------------------------------------------


def stats_of(recipe: Recipe, steps: int = 60) -> dict[str, Any]:
    return {
        name: training_stats(name, stage.trainer, steps, random.Random(name)) for name, stage in recipe.stages.items()
    }


def measured(recipe: Recipe, stats: dict[str, Any], names: list[str] | None = None) -> dict[str, Any]:
    return compare_stages(recipe, stats, {"policies": {}, "checkpoints": {}}, {}, names or recipe.policies)


@pytest.fixture
def rl() -> tuple[Recipe, dict[str, Any]]:
    recipe = recipe_of(RL)
    return recipe, stats_of(recipe)


def of_rows(**columns: Any) -> Any:
    """Overwrite what the rows of a run logged, by functions of the step and the value."""
    return lambda run: [
        row.update({key: of(row["step"], row[key]) for key, of in columns.items() if key in row})
        for row in run["history"]
    ]


@pytest.mark.parametrize(
    ("stage", "change", "found"),
    [
        ("dpo", lambda run: None, []),
        ("dpo", of_rows(loss=lambda step, value: value + 5 * (step == 30)), ["its loss leaps at step 30"]),
        ("dpo", of_rows(loss=lambda step, _: 0.69 + 0.02 * step), ["its loss ends worse than it began"]),
        ("ppo", of_rows(reward=lambda step, _: 1.0 - 0.05 * step), ["its reward ends worse than it began"]),
        ("grpo", of_rows(loss=lambda step, _: 0.002 * step), []),  # a surrogate whose level says nothing
        ("ppo", lambda run: run["summary"].update(stopped="max_kl was passed"), ["it was stopped: max_kl was passed"]),
    ],
)
def test_what_stands_out_is_said(rl, stage, change, found):
    recipe, stats = rl
    change(stats[stage])
    assert measured(recipe, stats)["stages"][stage]["findings"] == found


def classes(results: dict[str, Any]) -> dict[str, list[list[str]]]:
    return {quantity: [of["stages"] for of in alike] for quantity, alike in results["comparable"].items()}


def test_losses_and_kls_of_different_trainers_never_share_a_table(rl):
    assert classes(measured(*rl)) == {
        "loss": [["dpo"], ["grpo"], ["ppo"]],
        "kl": [["grpo"], ["ppo"]],
        "reward": [["grpo", "ppo"]],
        "convergence": [["grpo", "ppo"]],
        "device": [["dpo", "grpo", "ppo"]],
    }


def test_rewards_of_answers_that_are_sampled_differently_do_not_mean_the_same():
    recipe = recipe_of(STAGES)  # the libraries' own defaults: temperature 1.0 and 0.7, 256 and 53 tokens
    results = measured(recipe, stats_of(recipe))
    assert classes(results)["reward"] == [["grpo"], ["ppo"]]
    meaning = results["comparable"]["reward"][1]["meaning"]
    assert "temperature 0.7, up to 53 tokens, not ended by their end token" in meaning


def test_a_loss_scaled_by_beta_is_another_loss_and_a_learning_rate_is_not():
    sweep = {"beta": [0.1, 0.3], "learning_rate": [1e-6, 5e-6]}
    recipe = recipe_of({"sft": STAGES["sft"], "dpo": {**STAGES["dpo"], "sweep": sweep}})
    found = classes(measured(recipe, stats_of(recipe)))["loss"]
    assert [{name.split("-")[1] for name in names} for names in found] == [{"beta=0.1"}, {"beta=0.3"}]


def test_times_on_other_devices_or_threads_are_not_compared(rl):
    recipe, stats = rl
    stats["ppo"]["summary"]["cpu_threads"] = 1
    results = measured(recipe, stats)
    assert classes(results)["device"] == [["dpo", "grpo"], ["ppo"]]
    results["groups"] = {name: summarise(results["stages"], [name]) for name in ("dpo", "grpo", "ppo")}
    assert weigh(results, "dpo", "ppo")["ratio"] is None
    assert "different devices" in weigh(results, "dpo", "ppo")["why_not"]


def test_a_threshold_that_was_not_reached_is_said_with_what_is_known():
    recipe = recipe_of(RL, comparison={"threshold": 0.45, "hold": 4})
    stats = stats_of(recipe, 20)
    for name, top in (("grpo", 0.44), ("ppo", 1.0)):
        for row in stats[name]["history"]:
            row["reward"] = top * row["step"] / 20
    results = measured(recipe, stats)
    missed, reached = (results["stages"][name]["convergence"] for name in ("grpo", "ppo"))
    # From step 17 on there were four values; from step 18 on nobody knows.
    assert (missed["reached"], missed["steps"], missed["tokens"]) == (False, 17, 17 * 64 * 60)
    assert missed["seconds"] == pytest.approx(17 * 1.9)
    assert (reached["reached"], reached["steps"], reached["tokens"]) == (True, 9, 9 * 64 * 60)  # 9/20 = .45
    text = render("a-run", {**results, "groups": {}, "pairs": [], "verdict": None, "definitions": {}})
    assert "grpo (not reached: more than)" in text


def test_a_method_that_samples_nothing_has_no_reward_to_reach(rl):
    recipe, stats = rl
    stats["grpo"]["history"] = []
    stages = measured(recipe, stats)["stages"]
    assert "no checkpoint was evaluated" in stages["dpo"]["convergence"]["why_not"]
    assert stages["dpo"]["efficiency"]["generated_tokens"] is None
    assert stages["grpo"]["convergence"]["meaning"] is stages["grpo"]["efficiency"]["tokens_per_second"] is None


def test_evaluated_checkpoints_let_every_method_be_compared(rl):
    recipe, stats = rl
    curve = [{"step": step, "reward": {"mean": step / 60}} for step in (15, 30, 45, 60)]
    unscored = [{"step": 30, "kl": {"mean": 1.0}}]
    for checkpoints, found in ((curve, [["dpo", "grpo", "ppo"]]), (unscored, [["grpo", "ppo"]])):
        reference = {"reference": {"reward": {"mean": -0.25}}}
        metrics = {"policies": reference, "checkpoints": dict.fromkeys(recipe.policies, checkpoints)}
        results = compare_stages(recipe, stats, metrics, {}, recipe.policies)
        assert classes(results)["convergence"] == found
        silent = {**stats, "dpo": {**stats["dpo"], "history": []}}
        again = compare_stages(recipe, silent, metrics, {}, recipe.policies)
        assert again["stages"]["dpo"]["convergence"].get("rate") is None
        dpo = results["stages"]["dpo"]["convergence"]
        if checkpoints is curve:
            assert (dpo["start"], dpo["final"], dpo["tokens"]) == (-0.25, pytest.approx(1.0), None)
            assert dpo["rate"] == pytest.approx(1.25 / (60 * 1.9))
    fallen = {name: [{"step": step, "reward": {"mean": -0.5 if name == "dpo" else -1.0}} for step in (15, 30, 45, 60)]
              for name in recipe.policies}  # fmt: skip
    found = compare_stages(recipe, stats, {"policies": reference, "checkpoints": fallen}, {}, recipe.policies)
    assert not any(of["convergence"]["reached"] for of in found["stages"].values()), "below what they started from"


def test_sampled_tokens_are_counted_between_logs_after_the_last_and_once_a_batch():
    stages = {**RL, "grpo": {**RL["grpo"], "args": {**RL["grpo"]["args"], "num_iterations": 2}}}
    once, twice = recipe_of(RL), recipe_of(stages)
    stats = stats_of(once, 26)["grpo"]
    stats["history"] = [{**row, "answer_tokens": 4 * row["step"]} for row in stats["history"] if row["step"] % 10 == 0]
    stats["history"].insert(1, {"step": 15, "seconds": 28.5, "log": {}, "validation_loss": 0.5})
    for recipe, serves in ((once, 1), (twice, 2)):
        counted = sampled_tokens(recipe, "grpo", stats)
        assert (counted[0], counted[1][-1]) == ([0, 10, 20, 26], 64 * (10 * 40 + 16 * 80) / serves)


def test_compute_holds_every_stage_that_is_needed_once():
    recipe = recipe_of(RL)
    assert needed(recipe, "ppo") == ["sft", "rm", "ppo"]
    stats = stats_of(recipe)
    for name, seconds in {"sft": 100.0, "rm": 40.0, "dpo": 30.0, "ppo": 7.0}.items():
        stats[name]["summary"]["seconds"] = seconds
    stats["rm"]["summary"]["processes"] = 2
    stages = measured(recipe, stats)["stages"]
    assert stages["ppo"]["efficiency"]["device_seconds_with_inputs"] == 100 + 2 * 40 + 7
    assert stages["dpo"]["efficiency"]["device_seconds_with_inputs"] == 130


def test_seeds_have_a_spread_and_enough_of_them_an_interquartile_mean():
    def seeds(*values: float) -> dict[str, Any]:
        quality = [{"quality": {"kl": {"mean": value}}} for value in values]
        rest = {"convergence": {}}
        efficiency = {"efficiency": {"seconds_per_step": 1.0, "device_seconds_with_inputs": 1.0}}
        stages = {str(place): {**of, **rest, **efficiency} for place, of in enumerate(quality)}
        return summarise(stages, [*stages])["seeds"]["kl"]

    assert seeds(0.5) == {"points": {"0": 0.5}, "mean": 0.5, "std": None, "iqm": None}
    four = seeds(1.0, 2.0, 3.0, 6.0)
    assert (four["mean"], four["std"], four["iqm"]) == (3, pytest.approx(math.sqrt(14 / 3)), None)
    assert seeds(100.0, 1.0, 2.0, 3.0, -50.0)["iqm"] == 2
