"""The numbers behind a verdict: two groups of policies on the same prompts, at equal KL and as trained.

Reads the answers of `evaluate` and the scores of `judge`. A method is a group of stages that differ in their seed
alone. A gain is a score minus the reference's on the same prompt; KL is in nats per answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_trl.compare.seeds import probability_of_improvement
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json, read_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.stats.frontier import read_path
from rlhf_trl.stats.intervals import Difference, compare_runs, estimate_mean, p_of_mean
from rlhf_trl.stats.trust import weigh_trust

Row = dict[str, Any]
# Level at which a run has fallen below its peak; every run is looked at.
COLLAPSE = 0.01
# Below this no interval is known to hold (`make simulate`).
FEWEST = 20
NO_SCORES = {"gold": "there is no gold model", "reward": "there is no reward model"}
# Of a share; a difference of win rates that is smaller does not matter.
SMALLEST_WIN_RATE = 0.02
# Of the standard deviation of the reference's scores, where the recipe names no smallest difference that matters.
SMALLEST = 0.1


@dataclass(frozen=True)
class Judged:
    """What a judge said of the answers of a run's policies."""

    scores: Mapping[str, Mapping[str, float]]
    """Stage -> prompt -> score against the reference: 1 won, 0.5 tied, 0 lost."""
    win_rates: Mapping[str, Row]
    """Stage -> estimate over the prompts."""
    who: str | None
    """The judge's id; None where there is none."""
    why_not: str | None = None
    """Why its scores are no measure of their own."""
    doubt: str | None = None
    """Why its scores may mean little."""


@dataclass(frozen=True)
class Trajectory:
    """A policy's answers at its evaluated checkpoints in the order of training, the final policy last."""

    steps: Sequence[int | None]
    """None for the final policy."""
    records: Sequence[Sequence[Row]]
    """For each point one record a prompt: `id`, `kl`, scores."""


@dataclass(frozen=True)
class Curve:
    """KL and gain at each point of a trajectory on each prompt, (K, P) both."""

    stage: str
    steps: Sequence[int | None]
    kls: np.ndarray
    gains: np.ndarray

    def thin(self, points: int) -> Curve:
        """Keep this many points, evenly spaced, the final policy among them."""
        last = len(self.steps) - 1
        kept = [last] if points == 1 else np.linspace(0, last, points).round().astype(int).tolist()
        return Curve(self.stage, [self.steps[k] for k in kept], self.kls[kept], self.gains[kept])


def read_judge(recipe: Recipe, run: RunDir) -> Judged:
    """Read the judge's win rates against the reference and the scores behind them, if it judged these answers."""
    nothing = Judged({}, {}, None, "there is no judge, or it has not judged")
    if "judge" not in recipe.plan or not run.winrate.exists():
        return nothing
    found = read_json(run.winrate)
    if found["status"] == "not run" or found["evaluation"] != recipe.fingerprint("evaluate"):
        return nothing
    rates = {row["a"]: row["win_rate"] for row in found["win_rates"] if row["b"] == REFERENCE}
    kind, trust = found["judge"]["kind"], weigh_trust(found)
    doubt = None if trust == "informed" else "the judge has not shown that it can tell better answers"
    return Judged(
        read_json(run.prompt_scores),
        rates,
        found["judge"]["id"],
        "the judge is the gold model, whose scores stand beside this" if kind == "reward" else None,
        "the judge is a rule for tests, which says nothing about answers" if kind == "offline" else doubt,
    )


def read_points(run: RunDir, metrics: Mapping[str, Any], policy: str) -> Trajectory:
    """Read a policy's answers at each evaluated point; `metrics` is the content of `metrics.json`."""
    steps = [*(entry["step"] for entry in metrics["checkpoints"].get(policy, [])[:-1]), None]
    return Trajectory(steps, [read_jsonl(run.completions(policy, step)) for step in steps])


def smallest_that_matters(recipe: Recipe, run: RunDir) -> dict[str, float]:
    """Give for each measure the smallest difference that matters, in the measure's own unit."""
    rows, asked = read_jsonl(run.completions(REFERENCE)), recipe.comparison.smallest
    found = {"win_rate": SMALLEST_WIN_RATE}
    for key in ("gold", "reward"):
        if key in rows[0]:
            found[key] = SMALLEST * float(np.std([row[key] for row in rows])) if asked is None else asked
    return found


def read_curve(stage: str, trajectory: Trajectory, measure: str, judged: Judged, prompts: Sequence[str]) -> Curve:
    """Read one measure off a trajectory; a win rate, less the reference's half, is known of the final policy alone."""
    if measure == "win_rate":
        kl, scores = {row["id"]: row["kl"] for row in trajectory.records[-1]}, judged.scores.get(stage, {})
        kls, gains = ([[values[name] for name in prompts]] for values in (kl, scores))
        return Curve(stage, [None], np.array(kls), np.array(gains) - 0.5)
    rows, key = trajectory.records, f"{measure}_gain"
    kls = [[row["kl"] for row in records] for records in rows]
    gains = [[row[key] for row in records if key in row] for records in rows]
    return Curve(stage, trajectory.steps, np.array(kls), np.array(gains))


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
        questions `equal_kl` and `as_trained`: `kl`, the means `a` and `b`, `difference`, `p`, `identical`; or
        `why_not`. `as_trained` has `improvement`, the probability that a run of the first ends above one of
        the second.
    """
    if measure == "win_rate" and judged.why_not:
        return {"why_not": judged.why_not}
    stages = [stage for group in groups for stage in group]
    # The prompts on which every stage of both groups was judged, in the same order for all.
    prompts = sorted(set.intersection(*(set(judged.scores.get(stage, {})) for stage in stages)))
    curves = {stage: read_curve(stage, trajectories[stage], measure, judged, prompts) for stage in stages}
    count = min(curve.gains.shape[-1] for curve in curves.values())
    if count == 0 and measure != "win_rate":
        return {"why_not": NO_SCORES[measure]}
    if count < FEWEST:
        return {"why_not": f"only {count} prompts have a score for all of their runs; {FEWEST} are needed"}
    points = min(len(curve.steps) for curve in curves.values())
    runs = [[curves[stage] for stage in group] for group in groups]
    finals = [np.stack([curve.gains[-1] for curve in of]) for of in runs]
    trained = _question(finals) | {
        "kl": None,
        "improvement": probability_of_improvement(*(of.mean(axis=1)[:, None] for of in finals)),
    }
    return {
        "why_not": None,
        "seeds": [len(of) for of in runs],
        "unit": "methods" if min(map(len, runs)) > 1 else "adapters",
        "smallest": smallest,
        "points": points,
        "equal_kl": _read_at_equal_kl([[curve.thin(points) for curve in of] for of in runs], measure != "win_rate"),
        "as_trained": trained,
        "collapsed": [peak for of in runs for curve in of if (peak := find_collapse(curve, smallest))],
    }


def _read_at_equal_kl(runs: Sequence[Sequence[Curve]], checkpoints: bool) -> Row:
    """Compare at the largest mean KL that every run has reached, each run read along its own path; `checkpoints`
    could be measured, too."""
    kls = [curve.kls.mean(axis=1) for of in runs for curve in of]
    budget = min(float(kl.max()) for kl in kls)
    if budget <= 0:
        return {"why_not": "a policy has not moved from the reference", "kl": budget}
    read = [[read_path(curve.kls, curve.gains, budget) for curve in of] for of in runs]
    missing = [curve.stage for of, row in zip(runs, read, strict=True)
               for curve, values in zip(of, row, strict=True) if values is None]  # fmt: skip
    if missing:
        why = (
            "the final policies alone are known, and differ in KL"
            if all(len(curve.steps) == 1 for of in runs for curve in of)
            else f"{', '.join(missing)} was not measured near this KL"
        )
        return {"why_not": f"{why} (evaluation.checkpoints)" if checkpoints else why, "kl": budget}
    return {"kl": budget, **_question([np.stack([values for values in row if values is not None]) for row in read])}


def _question(runs: Sequence[np.ndarray]) -> Row:
    """Compare two methods by one number for each run and prompt, (seeds, P) each."""
    a, b = runs
    one, other = (of[np.lexsort(of.T[::-1])] for of in runs)
    found: Difference = compare_runs(a, b)
    return {
        "why_not": None,
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": found.estimate.as_dict(),
        "p": found.p,
        "identical": np.array_equal(one, other) or not (a.mean(axis=0) - b.mean(axis=0)).any(),
    }


def find_collapse(curve: Curve, smallest: float) -> Row | None:
    """Find the peak that a run has fallen from: beyond chance for any of its points, and by more than `smallest`."""
    means = curve.gains.mean(axis=1)
    peak = int(means.argmax())
    fall = curve.gains[peak] - curve.gains[-1]
    if fall.mean() <= smallest or p_of_mean(fall) * (len(means) - 1) >= COLLAPSE:
        return None
    kls = curve.kls.mean(axis=1)
    return {"stage": curve.stage, "step": curve.steps[peak], "kl": float(kls[peak]), "gain": float(means[peak]),
            "final": float(means[-1])}  # fmt: skip


def measure_gains(
    trajectories: Mapping[str, Trajectory], judged: Judged, smallest: Mapping[str, float]
) -> dict[str, dict[str, Row]]:
    """Measure each final policy against the reference on every score that there is."""
    found: dict[str, dict[str, Row]] = {}
    for stage, trajectory in trajectories.items():
        values = {key: np.array([row[f"{key}_gain"] for row in trajectory.records[-1] if f"{key}_gain" in row])
                  for key in ("reward", "gold")}  # fmt: skip
        if not judged.why_not:
            values["win_rate"] = np.array(list(judged.scores.get(stage, {}).values())) - 0.5
        found[stage] = {
            key: {
                "difference": estimate_mean(gains).as_dict(),
                "p": p_of_mean(gains),
                "identical": not gains.any(),
                "smallest": smallest[key],
            }
            for key, gains in values.items()
            if gains.size >= FEWEST and key in smallest
        }
    return found
