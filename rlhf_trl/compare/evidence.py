"""The numbers behind a verdict: two groups of policies on the same prompts, at equal KL and as trained.

Reads the answers of `evaluate` and the scores of `judge`. A method is a group of stages that differ in their seed
alone. A gain is a score minus the reference's on the same prompt; KL is in nats per answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlhf_trl.recipe.errors import Exit, UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.documents import WinRate, read_document
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.stats.frontier import read_path
from rlhf_trl.stats.intervals import FEWEST, compare_runs, estimate_mean, p_of_mean
from rlhf_trl.stats.pairs import trust_in, weigh_trust
from rlhf_trl.text.format import join

Row = dict[str, Any]
Doubts = dict[str, list[str]]
# Significance level for calling a run collapsed; strict, because every run is tested.
COLLAPSE = 0.01
NO_SCORES = {"gold": "there is no gold model", "reward": "there is no reward model"}
# Smallest difference of win rates that matters: 2 points.
SMALLEST_WIN_RATE = 0.02
# Smallest difference of scores that matters, as a fraction of the standard deviation of the reference's scores.
SMALLEST = 0.1


@dataclass(frozen=True)
class Judged:
    """What a judge said of the answers of a run's policies."""

    scores: Mapping[str, Mapping[str, float]]  # stage -> prompt -> 1 won against the reference, 0.5 tied, 0 lost
    win_rates: Mapping[str, Row]  # stage -> estimate over the prompts
    who: str | None  # the judge's id; None where there is none
    why_not: str | None = None  # why its scores are no measure of their own
    doubt: str | None = None  # why its scores may mean little


@dataclass(frozen=True)
class Trajectory:
    """A policy's answers at its evaluated checkpoints in the order of training, the final policy last."""

    steps: Sequence[int | None]  # None for the final policy
    prompts: Sequence[str]
    numbers: Mapping[str, np.ndarray]  # `kl`, and `gold_gain`, `reward_gain` where there are, (points, prompts) each


class Curve(NamedTuple):
    """KL and gain at each point of a run on each prompt, (K, P) both."""

    stage: str
    steps: Sequence[int | None]
    kls: np.ndarray
    gains: np.ndarray


def read_winrate(run: RunDir) -> Any:
    """Read what a judge found, if it ran; UserError where it is damaged: no marker holds the hash of a part."""
    run.require_whole("judge", "judge RECIPE")
    result, fault = read_document(run.winrate, WinRate)
    if fault:
        raise UserError(str(run.winrate), fault, "run `rlhf-trl judge RECIPE` again", Exit.DAMAGED)
    return result and read_json(run.winrate)


def read_judge(recipe: Recipe, run: RunDir) -> Judged:
    """Read the judge's win rates against the reference and the scores behind them, if it judged these answers."""
    nothing = Judged({}, {}, None, "there is no judge, or it has not judged")
    found = read_winrate(run) if "judge" in recipe.plan else None
    if found is None or found["status"] == "not run" or found["evaluation"] != recipe.fingerprint("evaluate"):
        return nothing
    kind, why_not, doubt = found["judge"]["kind"], None, None
    if kind == "reward":
        why_not = "the judge is the gold model, whose scores stand beside this"
    if kind == "offline":
        doubt = "the judge is a rule for tests, which says nothing about answers"
    elif weigh_trust(found) != "informed":
        doubt = "the judge has not shown that it can tell better answers"
    rates = {row["a"]: row["win_rate"] for row in found["win_rates"] if row["b"] == REFERENCE}
    return Judged(read_json(run.prompt_scores), rates, found["judge"]["id"], why_not, doubt)


def find_doubts(recipe: Recipe, metrics: Mapping[str, Any], judged: Judged, policies: Sequence[str]) -> Doubts:
    """Find for each measure why it may mean little for these policies; `metrics` is the content of `metrics.json`."""
    doubts: Doubts = {"gold": [], "reward": [], "win_rate": [judged.doubt] if judged.doubt else []}
    # A reward that a policy was trained to raise is no independent measure of it.
    raised = [name for name in policies if recipe.stages[name].reward == recipe.evaluation.reward]
    if raised and recipe.evaluation.reward is not None:
        words = f"{join(raised)} {'was' if len(raised) == 1 else 'were'} trained to raise this very reward"
        doubts["reward"].append(f"{words}; a gold model or a judge would be independent")
    for key in ("gold", "reward") if policies else ():
        if metrics[f"{key}_model"] and trust_in(metrics[f"{key}_model"]) != "informed":
            doubts[key].append(f"the {key} model has not shown that it can tell better answers")
    return doubts


def read_points(run: RunDir, metrics: Mapping[str, Any], policy: str) -> Trajectory:
    """Read a policy's answers at each evaluated point; `metrics` is the content of `metrics.json`."""
    steps = [*(entry["step"] for entry in metrics["checkpoints"].get(policy, [])[:-1]), None]
    points = [read_jsonl(run.completions(policy, step)) for step in steps]
    known = [key for key in ("kl", "gold_gain", "reward_gain") if key in points[-1][0]]
    numbers = {key: np.array([[row[key] for row in rows] for rows in points], dtype=np.float64) for key in known}
    return Trajectory(steps, [row["id"] for row in points[-1]], numbers)


def smallest_that_matters(recipe: Recipe, run: RunDir) -> dict[str, float]:
    """Give for each measure the smallest difference that matters, in the measure's own unit."""
    rows, asked = read_jsonl(run.completions(REFERENCE)), recipe.comparison.smallest
    scores = {key: [row[key] for row in rows] for key in ("gold", "reward") if key in rows[0]}
    found = {key: SMALLEST * float(np.std(of)) if asked is None else asked for key, of in scores.items()}
    return {"win_rate": SMALLEST_WIN_RATE, **found}


def read_curve(stage: str, trajectory: Trajectory, measure: str, judged: Judged, prompts: Sequence[str]) -> Curve:
    """Read one measure off a trajectory. Win rates exist for the final policy alone; 0.5, a tie, is subtracted."""
    kls = trajectory.numbers["kl"]
    if measure == "win_rate":
        kl, scores = dict(zip(trajectory.prompts, kls[-1], strict=True)), judged.scores.get(stage, {})
        known, gains = (np.array([[values[name] for name in prompts]]) for values in (kl, scores))
        return Curve(stage, [None], known, gains - 0.5)
    return Curve(stage, trajectory.steps, kls, trajectory.numbers.get(f"{measure}_gain", np.empty((len(kls), 0))))


def measure_pair(
    groups: Sequence[Sequence[str]],
    measure: str,
    trajectories: Mapping[str, Trajectory],
    judged: Judged,
    smallest: float,
) -> Row:
    """Measure two groups by one measure, the first less the second.

    Returns:
        `why_not`, or None with `seeds` of each; `unit`, "methods" where both have several seeds, else "adapters";
        `smallest`; `points` that were read of each run; `collapsed`, the runs that ended below their peak; and the two
        questions `equal_kl` and `as_trained`: `kl`, the means `a` and `b`, `difference`, `p`, `identical`, `smallest`;
        or `why_not`.
    """
    if measure == "win_rate" and judged.why_not:
        return {"why_not": judged.why_not}
    # The prompts on which every stage of both groups was judged, in the same order for all.
    prompts = sorted(set.intersection(*(set(judged.scores.get(stage, {})) for group in groups for stage in group)))
    runs = [[read_curve(stage, trajectories[stage], measure, judged, prompts) for stage in group] for group in groups]
    curves = [curve for of in runs for curve in of]
    count = min(curve.gains.shape[-1] for curve in curves)
    if count == 0 and measure != "win_rate":
        return {"why_not": NO_SCORES[measure]}
    if count < FEWEST:
        return {"why_not": f"only {count} prompts have a score for all of their runs; {FEWEST} are needed"}
    finals = [np.stack([curve.gains[-1] for curve in of]) for of in runs]
    points = min(len(curve.steps) for curve in curves)
    return {
        "why_not": None,
        "seeds": [len(of) for of in runs],
        "unit": "methods" if min(map(len, runs)) > 1 else "adapters",
        "smallest": smallest,
        "points": points,
        "equal_kl": {"smallest": smallest, **_compare_at_equal_kl(runs, points, measure)},
        "as_trained": {"smallest": smallest, "kl": None, **_compare(*finals)},
        "collapsed": [peak for curve in curves if (peak := find_collapse(curve, smallest))],
    }  # fmt: skip


def _compare_at_equal_kl(runs: Sequence[Sequence[Curve]], points: int, measure: str) -> Row:
    """Compare at the largest mean KL that every run reached, each run read along its own path of `points` points,
    evenly spaced, the final policy the last."""
    read: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for curve in (curve for of in runs for curve in of):
        kept = np.linspace(len(curve.steps) - 1, 0, points).round().astype(int)[::-1]
        read[curve.stage] = curve.kls[kept], curve.gains[kept]
    budget = min(float(kls.mean(axis=1).max()) for kls, _ in read.values())
    if budget <= 0:
        return {"why_not": "a policy has not moved from the reference", "kl": budget}
    values = {stage: read_path(*path, budget) for stage, path in read.items()}
    missing = [stage for stage, of in values.items() if of is None]
    if missing:
        why = f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not measured near this KL"
        why = "only the final policies can be compared, and these differ in KL" if points == 1 else why
        why += "" if measure == "win_rate" else " (evaluation.checkpoints adds points)"
        return {"why_not": why, "kl": budget}
    return {"kl": budget, **_compare(*(np.array([values[curve.stage] for curve in of]) for of in runs))}


def _compare(a: np.ndarray, b: np.ndarray) -> Row:
    """Compare two methods by one number for each run and prompt, (seeds, P) each."""
    difference, p = compare_runs(a, b)
    one, other = (of[np.lexsort(of.T[::-1])] for of in (a, b))
    return {
        "why_not": None,
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": difference.as_dict(),
        "p": p,
        "identical": np.array_equal(one, other) or not (a.mean(axis=0) - b.mean(axis=0)).any(),
    }


def find_collapse(curve: Curve, smallest: float) -> Row | None:
    """Find the peak that a run has fallen from: significantly, over all its points, and by more than `smallest`."""
    means, kls = curve.gains.mean(axis=1), curve.kls.mean(axis=1)
    peak = int(means.argmax())
    fall = curve.gains[peak] - curve.gains[-1]
    if fall.mean() <= smallest or p_of_mean(fall) * (len(means) - 1) >= COLLAPSE:
        return None
    return {"stage": curve.stage, "step": curve.steps[peak], "kl": float(kls[peak]), "gain": float(means[peak]),
            "final": float(means[-1])}  # fmt: skip


def measure_gains(
    trajectories: Mapping[str, Trajectory], judged: Judged, smallest: Mapping[str, float]
) -> dict[str, dict[str, Row]]:
    """Measure each final policy against the reference on every score that there is, as `measure_pair` does two."""
    found: dict[str, dict[str, Row]] = {}
    for stage, trajectory in trajectories.items():
        values = {key: numbers[-1] for key in ("reward", "gold")
                  if (numbers := trajectory.numbers.get(f"{key}_gain")) is not None}  # fmt: skip
        if not judged.why_not:
            values["win_rate"] = np.array([*judged.scores.get(stage, {}).values()]) - 0.5
        found[stage] = {
            key: {"difference": estimate_mean(gains).as_dict(), "p": p_of_mean(gains), "identical": not gains.any(),
                  "smallest": smallest[key]}
            for key, gains in values.items() if len(gains) >= FEWEST and key in smallest
        }  # fmt: skip
    return found
