"""Step `compare`: what is named, what stands beside what, and who is said to have won."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fixtures import GOLD, STAGES, training_stats, write_run
from syrupy.assertion import SnapshotAssertion

from rlhf_trl.compare.evidence import Judged, Trajectory, read_judge
from rlhf_trl.compare.step import build, compare, compare_stages, summarise, weigh
from rlhf_trl.compare.text_report import render
from rlhf_trl.compare.training import find, generated_tokens, needed
from rlhf_trl.compare.verdict import compare_groups, name_winner
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.recipe import Recipe, expand_sweeps
from rlhf_trl.report.figures import draw_comparison
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl

ALIKE = {"temperature": 1.0}
RL = {
    **STAGES,
    **GOLD,
    "grpo": {**STAGES["grpo"], "args": {"beta": 0.05, "max_completion_length": 64, **ALIKE}},
    "ppo": {**STAGES["ppo"], "args": {"kl_coef": 0.05, "response_length": 64, "stop_token": "eos", **ALIKE}},
}


def recipe_of(stages: dict[str, Any], **rest: Any) -> Recipe:
    content = {"name": "a-run", "model": {"model_name_or_path": "openai-community/gpt2"}, "stages": stages, **rest}
    return expand_sweeps(Recipe.model_validate(content))


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


def words(results: dict[str, Any], stage: str) -> dict[str, str]:
    return {found["finding"]: found["quantity"] for found in results["stages"][stage]["findings"]}


# --- what stands out -------------------------------------------------------------------------------------------------

SEEDS = {**STAGES, "dpo": {**STAGES["dpo"], "sweep": {"seed": [1, 2, 3, 4]}}}


def test_healthy_runs_are_named_for_nothing() -> None:
    recipe = recipe_of(SEEDS)
    results = measured(recipe, stats_of(recipe), [name for name in recipe.policies if name.startswith("dpo")])
    assert {stage: words(results, stage) for stage in results["stages"]} == {
        f"dpo-seed={seed}": {} for seed in (1, 2, 3, 4)
    }


def test_a_spike_a_divergence_and_slowness_are_each_named_for_what_they_are() -> None:
    recipe = recipe_of(SEEDS)
    stats = stats_of(recipe)
    stats["dpo-seed=1"]["history"][30]["loss"] += 5.0
    for row in stats["dpo-seed=2"]["history"]:
        if "loss" in row:
            row["loss"] = 0.69 + 0.02 * row["step"]
    for row in stats["dpo-seed=3"]["history"]:
        row["seconds"] *= 3
    stats["dpo-seed=3"]["summary"]["seconds"] *= 3
    results = measured(recipe, stats, [name for name in recipe.policies if name.startswith("dpo")])
    assert words(results, "dpo-seed=1") == {"spike": "loss"}
    assert results["stages"]["dpo-seed=1"]["findings"][0]["steps"] == [30]
    assert words(results, "dpo-seed=2") == {"diverging": "loss"}
    assert words(results, "dpo-seed=3") == {"slow": "samples_per_second"}
    assert words(results, "dpo-seed=4") == {}


def of_rows(**columns: Any) -> Any:
    """Overwrite what the rows of a run logged, by functions of the step."""
    return lambda run: [row.update({key: of(row["step"]) for key, of in columns.items()}) for row in run["history"]]


@pytest.mark.parametrize(
    ("stage", "change", "found"),
    [
        ("ppo", of_rows(reward=lambda step: 1.0 - 0.05 * step), ("diverging", "reward", "ends worse")),
        ("ppo", of_rows(grad_norm=lambda step: 1.4 if step < 50 else 90.0), ("diverging", "grad_norm", "10 times")),
        ("ppo", of_rows(kl=lambda step: 0.8 * step), ("diverging", "kl", "evaluation.worst.kl")),
        # A surrogate whose level says nothing.
        ("grpo", of_rows(loss=lambda step: -0.05 + 0.002 * step), None),
        (
            "ppo",
            lambda run: run["summary"].update(stopped="max_kl of 6 nats was passed"),
            ("stopped", "kl", "of 6 nats"),
        ),
    ],
)
def test_what_stands_out_is_named_with_its_quantity(rl: Any, stage: str, change: Any, found: Any) -> None:
    recipe, stats = rl
    change(stats[stage])
    named = [
        of for of in measured(recipe, stats)["stages"][stage]["findings"] if of["finding"] in ("diverging", "stopped")
    ]
    assert [(of["finding"], of["quantity"]) for of in named] == ([found[:2]] if found else [])
    assert not found or found[2] in named[0]["says"]


def test_the_same_training_twice_is_called_identical() -> None:
    recipe = recipe_of({**STAGES, "again": STAGES["ppo"]})
    stats = stats_of(recipe)
    stats["again"]["history"] = copy.deepcopy(stats["ppo"]["history"])
    stats["again"]["history"][3]["seconds"] += 0.7  # the same training takes its own time
    results = measured(recipe, stats)
    assert words(results, "again")["identical"] == words(results, "ppo")["identical"] == "history"
    assert "identical" not in words(results, "grpo")


# --- what means the same ---------------------------------------------------------------------------------------------


def test_losses_and_kls_of_different_trainers_never_share_a_table(rl: Any) -> None:
    comparable = measured(*rl)["comparable"]
    assert [of["stages"] for of in comparable["loss"]] == [["dpo"], ["grpo"], ["ppo"]]
    assert [of["stages"] for of in comparable["kl"]] == [["grpo"], ["ppo"]]
    assert [of["stages"] for of in comparable["reward"]] == [["grpo", "ppo"]]
    assert [of["stages"] for of in comparable["seconds"]] == [["dpo", "grpo", "ppo"]]


def test_rewards_of_answers_that_are_sampled_differently_do_not_mean_the_same() -> None:
    recipe = recipe_of(STAGES)  # the libraries' own defaults: temperature 1.0 and 0.7, 256 and 53 tokens
    comparable = measured(recipe, stats_of(recipe))["comparable"]
    assert [of["stages"] for of in comparable["reward"]] == [["grpo"], ["ppo"]]
    assert "temperature 0.7, up to 53 tokens, not ended by their end token" in comparable["reward"][1]["meaning"]


def test_a_loss_scaled_by_beta_is_another_loss_and_a_learning_rate_is_not() -> None:
    stages = {**STAGES, "dpo": {**STAGES["dpo"], "sweep": {"beta": [0.1, 0.3], "learning_rate": [1e-6, 5e-6]}}}
    recipe = recipe_of(stages)
    names = [name for name in recipe.policies if name.startswith("dpo")]
    classes = measured(recipe, stats_of(recipe), names)["comparable"]["loss"]
    assert [[name.partition("-")[2][:8] for name in of["stages"]] for of in classes] == [
        ["beta=0.1"] * 2,
        ["beta=0.3"] * 2,
    ]


def test_times_on_other_devices_or_threads_are_not_compared(rl: Any) -> None:
    recipe, stats = rl
    stats["ppo"]["summary"]["cpu_threads"] = 1
    stats["ppo"]["summary"]["seconds"] *= 100
    results = measured(recipe, stats)
    assert [of["stages"] for of in results["comparable"]["seconds"]] == [["dpo", "grpo"], ["ppo"]]
    assert "slow" not in words(results, "ppo")
    results["groups"] = {name: summarise(results["stages"], [name]) for name in ("dpo", "grpo", "ppo")}
    assert weigh(results, "dpo", "ppo")["ratio"] is None
    assert [of["stages"] for of in results["comparable"]["pace"]] == [["dpo"], ["grpo"], ["ppo"]]
    assert "different devices" in weigh(results, "dpo", "ppo")["why_not"]


# --- convergence and compute -----------------------------------------------------------------------------------------


def test_a_threshold_that_was_not_reached_is_censored() -> None:
    recipe = recipe_of(RL, comparison={"threshold": 0.45, "hold": 4})
    stats = stats_of(recipe, 20)
    for name, top in (("grpo", 0.44), ("ppo", 1.0)):
        for row in stats[name]["history"]:
            row["reward"] = top * row["step"] / 20
    stages = measured(recipe, stats)["stages"]
    missed, reached = stages["grpo"]["convergence"], stages["ppo"]["convergence"]
    assert not missed["reached"]
    assert missed["steps"] is missed["seconds"] is missed["tokens"] is None
    # From step 17 on there were four values; from step 18 on nobody knows.
    assert missed["censored_at"] == {"steps": 17, "seconds": pytest.approx(17 * 1.9), "tokens": 17 * 64 * 60}
    assert (reached["reached"], reached["steps"]) == (True, 9)  # 9/20 = .45
    assert reached["tokens"] == 9 * 64 * 60
    assert reached["seconds"] == pytest.approx(9 * 1.9)
    text = render("a-run", {**measured(recipe, stats), "groups": {}, "pairs": [], "verdict": None, "definitions": {}})
    assert "> 17" in text


def test_a_method_that_samples_nothing_has_no_reward_to_reach(rl: Any) -> None:
    found = measured(*rl)["stages"]["dpo"]
    assert found["convergence"]["meaning"] is None
    assert "no checkpoint was evaluated" in found["convergence"]["why_not"]
    assert found["efficiency"]["generated_tokens"] is None


def test_evaluated_checkpoints_let_every_method_be_compared(rl: Any) -> None:
    recipe, stats = rl
    curve = [{"step": step, "reward": {"mean": step / 60}} for step in (15, 30, 45, 60)]
    reference = {"reference": {"reward": {"mean": -0.25}}}
    metrics = {"policies": reference, "checkpoints": dict.fromkeys(recipe.policies, curve)}
    results = compare_stages(recipe, stats, metrics, {}, recipe.policies)
    assert [of["stages"] for of in results["comparable"]["convergence"]] == [["dpo", "grpo", "ppo"]]
    found = results["stages"]["dpo"]["convergence"]
    assert (found["start"], found["final"], found["tokens"]) == (-0.25, pytest.approx(1.0), None)
    assert found["rate"] == pytest.approx(1.25 / (60 * 1.9))


def test_checkpoints_that_no_reward_model_scored_are_no_rewards() -> None:
    recipe = recipe_of(RL)
    metrics = {"policies": {}, "checkpoints": {"dpo": [{"step": 30, "kl": {"mean": 1.0}}]}}
    results = compare_stages(recipe, stats_of(recipe), metrics, {}, ["dpo"])
    assert results["stages"]["dpo"]["convergence"]["meaning"] is None


def test_a_run_that_logged_nothing_stands_beside_others() -> None:
    recipe = recipe_of({**RL, "again": {**RL["grpo"]}})
    stats = stats_of(recipe)
    stats["again"]["history"] = []
    results = measured(recipe, stats, ["grpo", "again"])
    assert [of["stages"] for of in results["comparable"]["convergence"]] == [["grpo"]]
    assert results["stages"]["again"]["efficiency"]["tokens_per_second"] is None


def test_a_run_is_held_against_its_own_start(rl: Any) -> None:
    """A run that begins high and stays there has not risen, whatever the others began with."""
    recipe, stats = rl
    for row in stats["ppo"]["history"]:
        row["reward"] = 2.0
    found = measured(recipe, stats)["stages"]["ppo"]["convergence"]
    assert (found["start"], found["rate"], found["area"]) == (2.0, 0.0, 0.0)


def test_areas_are_over_the_time_that_all_of_them_trained(rl: Any) -> None:
    recipe, stats = rl
    for row in stats["ppo"]["history"]:
        row["seconds"] *= 2
    stages = measured(recipe, stats)["stages"]
    assert stages["ppo"]["convergence"]["area_seconds"] == stages["grpo"]["convergence"]["area_seconds"] == 60 * 1.9


def test_tokens_after_the_last_log_and_around_a_validation_are_counted() -> None:
    recipe = recipe_of(RL)
    stats = stats_of(recipe, 26)["grpo"]
    stats["history"] = [row for row in stats["history"] if row["step"] % 10 == 0]
    stats["history"].insert(1, {"step": 15, "seconds": 28.5, "log": {}, "validation_loss": 0.5})
    assert generated_tokens(recipe, "grpo", stats)["total"] == 26 * 64 * 60


def test_grpo_counts_a_batch_once_however_often_it_learns_from_it() -> None:
    stages = {**RL, "grpo": {**RL["grpo"], "args": {**RL["grpo"]["args"], "num_iterations": 2}}}
    once, twice = recipe_of(RL), recipe_of(stages)
    stats = stats_of(once)["grpo"]
    assert generated_tokens(once, "grpo", stats)["total"] == 60 * 64 * 60
    assert generated_tokens(twice, "grpo", stats)["total"] == 60 * 64 * 60 / 2


def test_compute_holds_every_stage_that_is_needed_once() -> None:
    recipe = recipe_of(RL)
    assert needed(recipe, "ppo") == ["sft", "rm", "ppo"]
    assert needed(recipe, "dpo") == ["sft", "dpo"]
    stats = stats_of(recipe)
    for name, seconds in {"sft": 100.0, "rm": 40.0, "dpo": 30.0, "ppo": 7.0}.items():
        stats[name]["summary"]["seconds"] = seconds
    stats["rm"]["summary"]["processes"] = 2
    stages = measured(recipe, stats)["stages"]
    assert stages["ppo"]["efficiency"]["device_seconds_with_inputs"] == 100 + 2 * 40 + 7
    assert stages["dpo"]["efficiency"]["device_seconds_with_inputs"] == 130
    assert stages["ppo"]["efficiency"]["inputs"] == ["sft", "rm"]


# --- which method won ------------------------------------------------------------------------------------------------


def answers(gains: Sequence[float], kls: Sequence[float], seed: int, prompts: int = 200) -> Trajectory:
    """A run's answers at each point: KL and gold gain about these, on the same prompts."""
    draw = np.random.default_rng(seed)
    drawn = [(kl * draw.uniform(0.5, 1.5, prompts), gain + draw.normal(size=prompts) / 2)
             for gain, kl in zip(gains, kls, strict=True)]  # fmt: skip
    numbers = dict(zip(("kl", "gold_gain"), np.array(drawn).swapaxes(0, 1), strict=True))
    return Trajectory([*range(1, len(gains)), None], [*map(str, range(prompts))], numbers)


def five(kl: float, gain: float, start: int) -> dict[int, Trajectory]:
    """Five seeds of a method whose gain grows with sqrt(KL)."""
    return {
        seed: answers([gain + 0.02 * (seed % 5 - 2)] * 2, [kl / 1.4, kl], seed) for seed in range(start, start + 5)
    }


NOBODY = Judged({}, {}, None, "there is no judge, or it has not judged")
SURE: dict[str, str | None] = {"gold": None, "reward": None, "win_rate": None}


def judge(methods: dict[str, dict[int, Trajectory]], smallest: float = 0.05) -> tuple[list[Any], Any]:
    groups = {name: [f"{name}-{seed}" for seed in runs] for name, runs in methods.items()}
    runs = {f"{name}-{seed}": run for name, of in methods.items() for seed, run in of.items()}
    pairs, _ = compare_groups(list(combinations(groups, 2)), groups, runs, NOBODY, {"gold": smallest})
    return pairs, name_winner(list(groups), pairs, SURE)


def outcomes(pair: Any) -> tuple[str, str]:
    found = pair["measures"]["gold"]
    return found["equal_kl"]["outcome"], found["as_trained"]["outcome"]


def test_the_better_method_is_named_and_by_how_much() -> None:
    pairs, verdict = judge({"dpo": five(4, 0.2, 0), "ppo": five(4, 0.6, 10), "grpo": five(4, 0.2, 20)})
    assert verdict["winner"] == "ppo"
    assert verdict["sentence"].startswith(
        "ppo is better than dpo and grpo by the gold model at equal KL, and no worse"
    )
    assert verdict["warnings"] == []
    assert [outcomes(pair)[0] for pair in pairs] == ["worse", "same", "better"]
    assert "ppo is better than dpo: +0.4" in pairs[0]["sentence"]  # told from the better one's side
    assert "p < 0.001" in pairs[0]["sentence"]
    assert pairs[0]["measures"]["win_rate"]["why_not"] == "there is no judge, or it has not judged"


def test_without_a_difference_nobody_wins_and_close_ones_are_equivalent() -> None:
    _, verdict = judge({"dpo": five(4, 0.3, 0), "ppo": five(4, 0.3, 10)})
    assert verdict["winner"] is None
    assert "there is no significant difference between dpo and ppo" in verdict["sentence"]
    pairs, _ = judge({"dpo": five(4, 0.3, 0), "ppo": five(4, 0.3, 10)}, smallest=0.3)
    assert outcomes(pairs[0]) == ("equivalent", "equivalent")


def test_a_difference_too_small_to_matter_makes_no_winner() -> None:
    """Even of 1e-9 on every prompt."""
    runs, shifted = (answers([gain], [4], 0) for gain in (0.3, 0.3 + 1e-9))
    pairs, verdict = judge({"dpo": {0: runs}, "ppo": {1: shifted}})
    assert (outcomes(pairs[0]), verdict["winner"]) == (("equivalent", "equivalent"), None)
    pairs, verdict = judge({"dpo": five(4, 0.2, 0), "ppo": five(4, 0.6, 10)}, smallest=0.42)
    assert (outcomes(pairs[0])[1], verdict["winner"]) == ("trivial", None)
    assert "there is no difference that matters between dpo and ppo" in pairs[0]["sentence"]


def test_the_same_runs_are_said_to_be_the_same() -> None:
    runs = five(4, 0.3, 0)
    pairs, verdict = judge({"dpo": runs, "again": dict(reversed(runs.items()))})
    assert outcomes(pairs[0]) == ("indistinguishable", "indistinguishable")
    assert "dpo and again have the same score on every prompt" in verdict["sentence"]


def test_more_kl_on_the_same_curve_is_no_better_method() -> None:
    """Gain grows with sqrt(KL): the run that went further has more as trained, and is the same at equal KL."""
    near = {seed: answers([0.3, 0.35, 0.4], [0.5625, 0.77, 1], seed) for seed in range(5)}
    far = {seed: answers([0.36, 0.44, 0.8], [0.81, 1.21, 4], seed) for seed in range(10, 15)}
    pairs, verdict = judge({"near": near, "far": far})
    assert outcomes(pairs[0]) in [("same", "worse"), ("equivalent", "worse")]
    assert verdict["winner"] is None


def test_where_the_two_answers_differ_none_is_named() -> None:
    """a is better up to KL 4, b goes on to more."""
    runs = {"a": {0: answers([0.6, 0.8, 0.9], [2, 3, 4], 0)}, "b": {1: answers([0.1, 0.3, 1.5], [2, 4, 9], 1)}}
    pairs, verdict = judge(runs)
    assert outcomes(pairs[0]) == ("better", "worse")
    assert verdict["winner"] is None
    assert "The two answers differ" in pairs[0]["sentence"]
    assert "At equal KL, a scores higher than b. As trained, b scores higher than a." in verdict["sentence"]


def test_a_run_that_collapsed_is_told_so_with_the_step_and_the_kl_of_its_peak() -> None:
    a, b = answers([0.3, 0.6, 0.0, -1.0], [1, 2, 5, 10], 0), answers([0.1, 0.15, 0.2, 0.3], [1, 2, 5, 10], 1)
    pairs, verdict = judge({"a": {0: a}, "b": {1: b}})
    assert verdict["winner"] == "b"
    [peak] = pairs[0]["measures"]["gold"]["collapsed"]
    assert (peak["stage"], peak["step"], peak["kl"]) == ("a-0", 2, pytest.approx(2, rel=0.1))
    assert any(warning.startswith("a-0 fell after a peak at step 2 (KL ") for warning in verdict["warnings"])


def test_what_was_not_measured_at_the_same_kl_is_not_read_off_a_line() -> None:
    """b saturates further out; a line from the reference would lie below its curve."""
    pairs, verdict = judge({"a": {0: answers([0.30], [1], 0)}, "b": {1: answers([0.33], [1.45], 1)}})
    assert outcomes(pairs[0])[0] == "unknown"
    assert "evaluation.checkpoints" in pairs[0]["sentence"]
    assert verdict["winner"] is None
    assert "At equal KL, nothing can be said about a and b" in verdict["sentence"]


def test_every_run_is_read_at_as_many_points() -> None:
    many = answers([0.1] * 9 + [0.5], [0.4 * k for k in range(1, 11)], 0)
    pairs, _ = judge({"a": {0: many}, "b": {1: answers([0.5], [4], 1)}})
    assert pairs[0]["measures"]["gold"]["points"] == 1
    found = pairs[0]["measures"]["gold"]
    assert found["equal_kl"]["a"] == found["as_trained"]["a"]


def test_large_differences_survive_the_correction_for_dozens_of_pairs() -> None:
    methods = {f"dpo-{index}": five(4, 10.0 * index, 10 * index) for index in range(12)}
    pairs, verdict = judge(methods)
    assert len(pairs) == 66
    assert verdict["winner"] == "dpo-11"
    assert verdict["sentence"].startswith("dpo-11 is better than 11 others by the gold model at equal KL")


def test_an_order_that_is_not_complete_has_no_winner_and_says_what_is_known() -> None:
    _, verdict = judge({"dpo": five(4, 0.2, 0), "ppo": five(4, 0.6, 10), "grpo": five(4, 0.61, 20)})
    assert verdict["winner"] is None
    assert "ppo is better than dpo; grpo is better than dpo" in verdict["sentence"]
    assert "ppo and grpo" in verdict["sentence"]


def test_one_seed_is_about_these_adapters_and_never_about_methods() -> None:
    pairs, verdict = judge({"dpo": {0: answers([0.2], [4], 0)}, "ppo": {1: answers([0.6], [4.1], 1)}})
    assert verdict["winner"] == "ppo"
    assert verdict["sentence"].startswith("The adapter ppo scores higher than the adapter dpo by the gold model")
    assert "the adapter ppo scores higher than the adapter dpo" in pairs[0]["sentence"]
    assert [warning[:8] for warning in verdict["warnings"]] == ["one seed"]
    mixed, _ = judge({"dpo": five(4, 0.2, 0), "ppo": {1: answers([0.6, 0.6], [2.9, 4.1], 11)}})
    assert "the adapter ppo scores higher than the 5 adapters of dpo" in mixed[0]["sentence"]
    _, verdict = judge(
        {"dpo": five(4, 0.2, 0), "grpo": five(4, 0.9, 20), "ppo": {1: answers([0.5, 0.5], [2.9, 4.1], 11)}}
    )
    assert verdict["sentence"].startswith(
        "The 5 adapters of grpo score higher than the 5 adapters of dpo and the adapter"
    )


def test_a_policy_that_never_moved_is_compared_as_trained_alone() -> None:
    pairs, verdict = judge({"dpo": five(0, 0.0, 0), "ppo": five(4, 0.6, 10)})
    assert outcomes(pairs[0]) == ("unknown", "worse")
    assert "not moved" in pairs[0]["sentence"]
    assert verdict["winner"] is None


def judged_runs(dpo: dict[str, float], ppo: dict[str, float], **about: Any) -> tuple[list[Any], Any]:
    one = Trajectory([None], [*map(str, range(200))], {"kl": np.full((1, 200), 4.0)})
    judged = Judged({"dpo-0": dpo, "ppo-0": ppo}, {}, "gpt", **about)
    groups = {"dpo": ["dpo-0"], "ppo": ["ppo-0"]}
    pairs, _ = compare_groups([("dpo", "ppo")], groups, {"dpo-0": one, "ppo-0": one}, judged, {"win_rate": 0.02})
    return pairs, name_winner(["dpo", "ppo"], pairs, {**SURE, "win_rate": judged.doubt})


def test_without_scores_the_judge_decides_on_the_prompts_that_all_were_judged_on() -> None:
    draw = random.Random(0)
    dpo = {str(i): draw.choice([0.0, 0.5, 1.0]) for i in range(150)}
    ppo = {str(i): draw.choice([0.5, 1.0, 1.0]) for i in range(50, 200)}
    pairs, verdict = judged_runs(dpo, ppo, doubt="it may know nothing")
    assert (verdict["measure"], verdict["winner"]) == ("win_rate", "ppo")
    assert verdict["warnings"][0] == "it may know nothing"
    result = pairs[0]["measures"]["win_rate"]["as_trained"]
    both = [str(i) for i in range(50, 150)]
    true = np.mean([dpo[i] for i in both]) - np.mean([ppo[i] for i in both])
    assert result["difference"]["mean"] == pytest.approx(true)
    assert (result["difference"]["n"], result["improvement"]) == (100, 0.0)


def test_a_handful_of_verdicts_makes_no_winner() -> None:
    pairs, verdict = judged_runs({str(i): 1.0 for i in range(19)}, {str(i): 0.0 for i in range(19)})
    assert pairs[0]["measures"]["win_rate"]["why_not"].startswith("only 19 prompts")
    assert "20 are needed" in pairs[0]["sentence"]
    assert verdict is None


def test_a_pair_without_any_measure_says_why() -> None:
    dpo = {str(i): 1.0 for i in range(200)}
    pairs, verdict = judged_runs(dpo, dpo, why_not="the judge is the gold model, whose scores stand beside this")
    assert pairs[0]["sentence"].startswith(
        "Nothing can be said about dpo and ppo: there is no reward model; the judge"
    )
    assert verdict is None


def test_equal_policies_are_not_called_better_than_the_reference() -> None:
    """The gains of six equal policies are corrected together."""
    false = 0
    for start in range(0, 600, 6):
        runs = {f"p{seed}": answers([0.0], [4], seed, 50) for seed in range(start, start + 6)}
        _, gains = compare_groups([], {}, runs, NOBODY, {"gold": 0.0})
        false += any(of["gold"]["outcome"] in ("better", "worse") for of in gains.values())
    assert false <= 11


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_stages_that_differ_in_their_seed_alone_are_one_group() -> None:
    stages = {
        **STAGES,
        "dpo": {**STAGES["dpo"], "sweep": {"beta": [0.1, 0.3], "seed": [1, 2]}},
        "again": STAGES["ppo"],
    }
    assert recipe_of(stages).groups == {
        "sft": ["sft"],
        "rm": ["rm"],
        "dpo-beta=0.1": ["dpo-beta=0.1-seed=1", "dpo-beta=0.1-seed=2"],
        "dpo-beta=0.3": ["dpo-beta=0.3-seed=1", "dpo-beta=0.3-seed=2"],
        "grpo": ["grpo"],
        "ppo": ["ppo"],
        "again": ["again"],  # the same seed twice is not two seeds
    }


def test_hand_written_seeds_are_a_group_under_the_first_name() -> None:
    dpo = STAGES["dpo"]
    stages = {
        "sft": STAGES["sft"],
        **{f"dpo_{seed}": {**dpo, "args": {**dpo["args"], "seed": seed}} for seed in (7, 8)},
    }
    assert recipe_of(stages).groups == {"sft": ["sft"], "dpo_7": ["dpo_7", "dpo_8"]}


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Any:
    return write_run(tmp_path / "a-run", stages=RL, evaluation={"gold": "gold"}, judge="good")


def test_the_step_writes_results_report_and_figure(finished: Any) -> None:
    recipe, run = finished
    compare(recipe, run)
    results = read_json(run.comparison)
    assert list(results["stages"]) == sorted(recipe.policies)
    assert {(pair["a"], pair["b"]) for pair in results["pairs"]} == {("dpo", "grpo"), ("dpo", "ppo"), ("grpo", "ppo")}
    text = run.comparison_report.read_text()
    assert results["verdict"]["sentence"] in " ".join(text.split())
    for title in ("Training stability", "Convergence", "Computational efficiency", "Sample quality"):
        assert title in text
    assert "nan" not in text.lower()
    assert run.comparison_figure.read_bytes().startswith(b"\x89PNG")
    assert read_json(run.prompt_scores).keys() == set(recipe.policies)


def test_the_same_files_give_the_same_results(finished: Any) -> None:
    recipe, run = finished
    assert build(recipe, run) == build(recipe, run)


def test_the_numbers_are_the_paired_differences_of_the_answers(finished: Any) -> None:
    recipe, run = finished
    pair = next(pair for pair in build(recipe, run)["pairs"] if (pair["a"], pair["b"]) == ("dpo", "grpo"))
    rows = {name: read_jsonl(run.completions(name)) for name in ("dpo", "grpo")}
    low, high = (np.mean([row["gold_gain"] for row in rows[name]]) for name in ("dpo", "grpo"))
    found = pair["measures"]["gold"]
    assert found["as_trained"]["difference"]["mean"] == pytest.approx(low - high)
    reference = np.std([row["gold"] for row in read_jsonl(run.completions("reference"))])
    assert found["smallest"] == pytest.approx(0.1 * reference)


def test_a_judge_of_other_answers_is_not_used(finished: Any) -> None:
    recipe, run = finished
    write_json(run.winrate, {**read_json(run.winrate), "evaluation": "another"})
    pair = build(recipe, run)["pairs"][0]
    assert pair["measures"]["win_rate"] == {"why_not": "there is no judge, or it has not judged"}


def test_stages_that_are_asked_for_are_compared(finished: Any) -> None:
    recipe, run = finished
    comparison = recipe.comparison
    asked = recipe.model_copy(update={"comparison": comparison.model_copy(update={"stages": ["rm", "gold"]})})
    results = build(asked, run)
    assert set(results["stages"]) == {"rm", "gold"}
    assert (results["pairs"], results["verdict"]) == ([], None)
    mixed = recipe.model_copy(update={"comparison": comparison.model_copy(update={"stages": ["sft", "dpo", "ppo"]})})
    compare(mixed, run)
    assert read_json(run.comparison)["verdict"]["warnings"][-1] == "not among the compared: grpo"
    assert draw_comparison(read_json(run.comparison))


def test_without_a_gold_model_the_verdict_says_who_was_trained_for_its_score(tmp_path: Path) -> None:
    stages = {name: RL[name] for name in ("sft", "rm", "dpo", "ppo", "grpo")}
    recipe, run = write_run(tmp_path / "a-run", stages=stages)
    warnings = build(recipe, run)["verdict"]["warnings"]
    assert warnings[0].startswith("ppo and grpo were trained to raise this very reward")


@pytest.mark.parametrize(("kind", "word"), [("chance", "has not shown"), ("offline", "a rule for tests")])
def test_a_judge_that_means_little_is_called_so(tmp_path: Path, kind: str, word: str) -> None:
    recipe, run = write_run(tmp_path / "a-run", stages=RL, evaluation={"gold": "gold"}, judge=kind)
    judged = read_judge(recipe, run)
    assert judged.doubt is not None
    assert word in judged.doubt


def test_a_diverged_dpo_is_seen_by_its_evaluated_kl(finished: Any) -> None:
    recipe, run = finished
    metrics = read_json(run.metrics)
    metrics["policies"]["dpo"]["kl"]["mean"] = 300.0
    write_json(run.metrics, metrics)
    found = build(recipe, run)["stages"]["dpo"]["findings"]
    assert ("diverging", "kl") in [(of["finding"], of["quantity"]) for of in found]


def test_reward_models_alone_can_be_compared(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "a-run", stages={"sft": STAGES["sft"], "rm": STAGES["rm"]})
    compare(recipe, run)
    assert set(read_json(run.comparison)["stages"]) == {"sft", "rm"}


def test_an_evaluation_that_is_missing_is_named(finished: Any) -> None:
    recipe, run = finished
    run.done("evaluate").unlink()
    with pytest.raises(UserError, match="evaluate"):
        compare(recipe, run)


def test_a_stage_to_compare_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"comparison.stages.1: there is no stage 'pp'"):
        load_recipe(Path(__file__).parents[2] / "recipes" / "demo.yaml", ["comparison.stages=[dpo, pp]"])


def test_a_swept_stage_stands_for_all_that_it_expands_to() -> None:
    recipe = load_recipe(
        Path(__file__).parents[2] / "recipes" / "demo.yaml",
        ["comparison.stages=[dpo, ppo]", "stages.dpo.sweep.seed=[1, 2]"],
    )
    assert recipe.compared == ["dpo-seed=1", "dpo-seed=2", "ppo"]


def test_findings_need_no_second_run() -> None:
    recipe = recipe_of({"sft": STAGES["sft"]})
    stats = stats_of(recipe)
    results = measured(recipe, stats, ["sft"])
    assert find(results["stages"], stats, 20.0) == {"sft": []}


def test_the_report_of_a_fixed_run_is_the_golden_one(tmp_path: Path, snapshot: SnapshotAssertion) -> None:
    """Every number and word of the report on fixed JSON inputs."""
    stages = {**RL, "dpo": {**RL["dpo"], "sweep": {"seed": [1, 2]}}}
    recipe, run = write_run(
        tmp_path / "golden", stages=stages, evaluation={"gold": "gold", "checkpoints": 3}, judge="good"
    )
    history = read_json(run.training_stats("ppo"))
    history["history"][50]["loss"] += 3.0
    write_json(run.training_stats("ppo"), history)
    rows = read_jsonl(run.completions("grpo"))
    write_jsonl(run.completions("grpo"), [{**row, "gold_gain": row["gold_gain"] + 1.0} for row in rows])
    compare(recipe, run)
    assert run.comparison_report.read_text() == snapshot
