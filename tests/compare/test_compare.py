"""Step `compare`: who is said to have won, and by what."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from report_fixtures import STAGES, recipe_of, write_run
from syrupy.assertion import SnapshotAssertion
from test_training import RL

from rlhf_trl.compare.evidence import Judged, Trajectory, read_judge
from rlhf_trl.compare.step import build, compare
from rlhf_trl.compare.verdict import compare_groups, name_winner
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl

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
SURE: dict[str, list[str]] = {"gold": [], "reward": [], "win_rate": []}


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
    return pairs, name_winner(["dpo", "ppo"], pairs, {**SURE, "win_rate": [judged.doubt] if judged.doubt else []})


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
    assert result["difference"]["n"] == 100


@pytest.mark.parametrize(
    ("prompts", "why_not", "says"),
    [(19, None, "only 19 prompts have a score"), (200, "it is the gold model", "it is")],
)
def test_a_pair_without_a_measure_says_why_and_has_no_winner(prompts: int, why_not: str | None, says: str) -> None:
    scores = ({str(i): score for i in range(prompts)} for score in (1.0, 0.0))
    pairs, verdict = judged_runs(*scores, why_not=why_not)
    start = "Nothing can be said about dpo and ppo: there is no reward model; "
    assert pairs[0]["sentence"].startswith(start + says)
    assert verdict is None


def test_equal_policies_are_not_called_better_than_the_reference() -> None:
    """The gains of six equal policies are corrected together."""
    false = 0
    for start in range(0, 600, 6):
        runs = {f"p{seed}": answers([0.0], [4], seed, 50) for seed in range(start, start + 6)}
        _, gains = compare_groups([], {}, runs, NOBODY, {"gold": 0.0})
        false += any(of["gold"]["outcome"] in ("better", "worse") for of in gains.values())
    assert false <= 11


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "groups"),
    [
        (
            {"dpo": {**STAGES["dpo"], "sweep": {"beta": [0.1, 0.3], "seed": [1, 2]}}, "again": STAGES["dpo"]},
            {
                "dpo-beta=0.1": ["dpo-beta=0.1-seed=1", "dpo-beta=0.1-seed=2"],
                "dpo-beta=0.3": ["dpo-beta=0.3-seed=1", "dpo-beta=0.3-seed=2"],
                "again": ["again"],
            },
        ),
        # The same seed twice is not two seeds; hand-written seeds are a group under the first name.
        ({"dpo": STAGES["dpo"], "again": STAGES["dpo"]}, {"dpo": ["dpo"], "again": ["again"]}),
        (
            {f"dpo_{seed}": {**STAGES["dpo"], "args": {"seed": seed}} for seed in (7, 8)},
            {"dpo_7": ["dpo_7", "dpo_8"]},
        ),
    ],
)
def test_stages_that_differ_in_their_seed_alone_are_one_group(stages: Any, groups: Any) -> None:
    assert recipe_of({"sft": STAGES["sft"], **stages}).groups == {"sft": ["sft"], **groups}


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "a-run", stages=RL, evaluation={"gold": "gold"}, judge="good")


def test_the_numbers_are_the_paired_differences_of_the_answers(judged_run: Any) -> None:
    recipe, run = judged_run
    compare(recipe, run)
    results = read_json(run.comparison)
    assert results == build(recipe, run)
    assert results["verdict"]["sentence"] in " ".join(run.comparison_report.read_text().split())
    assert run.comparison_figure.read_bytes().startswith(b"\x89PNG")
    assert set(results["stages"]) == read_json(run.prompt_scores).keys() == set(recipe.policies)
    pairs = {(pair["a"], pair["b"]): pair for pair in results["pairs"]}
    assert set(pairs) == {("dpo", "grpo"), ("dpo", "ppo"), ("grpo", "ppo")}
    low, high = (np.mean([row["gold_gain"] for row in read_jsonl(run.completions(name))]) for name in ("dpo", "grpo"))
    found = pairs["dpo", "grpo"]["measures"]["gold"]
    assert found["as_trained"]["difference"]["mean"] == pytest.approx(low - high)
    reference = np.std([row["gold"] for row in read_jsonl(run.completions("reference"))])
    assert found["smallest"] == pytest.approx(0.1 * reference)


def test_stages_that_are_asked_for_are_compared(judged_run: Any) -> None:
    recipe, run = judged_run

    def asked(*names: str) -> Any:
        settings = recipe.comparison.model_copy(update={"stages": list(names)})
        return build(recipe.model_copy(update={"comparison": settings}), run)

    results = asked("rm", "gold")
    assert (set(results["stages"]), results["pairs"], results["verdict"]) == ({"rm", "gold"}, [], None)
    assert asked("sft", "dpo", "ppo")["verdict"]["warnings"][-1] == "not among the compared: grpo"


def test_a_judge_of_other_answers_is_not_used_and_a_missing_evaluation_is_named(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "a-run", stages=RL, evaluation={"gold": "gold"}, judge="good")
    write_json(run.winrate, {**read_json(run.winrate), "evaluation": "another"})
    pair = build(recipe, run)["pairs"][0]
    assert pair["measures"]["win_rate"] == {"why_not": "there is no judge, or it has not judged"}
    run.winrate.write_text('{"status": "comp')
    with pytest.raises(UserError, match=r"winrate.json cannot be read"):
        build(recipe, run)
    run.done("evaluate").unlink()
    with pytest.raises(UserError, match="evaluate"):
        compare(recipe, run)


def test_without_a_gold_model_the_verdict_says_who_was_trained_for_its_score_and_what_the_model_is_worth(
    tmp_path: Path,
) -> None:
    stages = {name: RL[name] for name in ("sft", "rm", "dpo", "ppo")}
    warnings = build(*write_run(tmp_path / "a-run", stages=stages, accuracy=(0.5, 0.5)))["verdict"]["warnings"]
    assert warnings[0].startswith("ppo was trained to raise this very reward")
    assert warnings[1] == "the reward model has not shown that it can tell better answers"


@pytest.mark.parametrize(("kind", "word"), [("chance", "has not shown"), ("offline", "a rule for tests")])
def test_a_judge_that_means_little_is_called_so(tmp_path: Path, kind: str, word: str) -> None:
    recipe, run = write_run(tmp_path / "a-run", stages=RL, evaluation={"gold": "gold"}, judge=kind)
    assert word in (read_judge(recipe, run).doubt or "")


def test_reward_models_alone_can_be_compared(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "a-run", stages={"sft": STAGES["sft"], "rm": STAGES["rm"]})
    compare(recipe, run)
    assert set(read_json(run.comparison)["stages"]) == {"sft", "rm"}


def test_stages_to_compare_exist_and_a_swept_one_stands_for_all_that_it_expands_to() -> None:
    demo = ROOT / "recipes" / "demo.yaml"
    with pytest.raises(UserError, match=r"comparison.stages.1: there is no stage 'pp'"):
        load_recipe(demo, ["comparison.stages=[dpo, pp]"])
    recipe = load_recipe(demo, ["comparison.stages=[dpo, ppo]", "stages.dpo.sweep.seed=[1, 2]"])
    assert recipe.compared == ["dpo-seed=1", "dpo-seed=2", "ppo"]


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
