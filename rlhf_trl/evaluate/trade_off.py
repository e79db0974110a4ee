"""What the answers of all policies say about reward against KL: frontier, best-of-n, over-optimisation, alarms.

Pure functions from the records of `evaluate` to the content of `pareto.json` and `over_optimisation.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_trl.evaluate.alarms import raise_alarms
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import REFERENCE
from rlhf_trl.stats.frontier import best_of_n, best_of_n_kl, describe_front, fit_over_optimisation, read_path
from rlhf_trl.stats.intervals import estimate_mean

Row = dict[str, Any]
# Policy and step (None for the final model) -> one record for each prompt, in the same order for all.
Records = Mapping[tuple[str, int | None], Sequence[Row]]


def build_pareto(recipe: Recipe, records: Records, draws: Sequence[Row]) -> Row:
    """Lay gain against KL for each reward model that scored: frontier, hypervolume, best-of-n, gains at equal KL.

    `draws` are for each prompt the scores of several answers of the reference; empty for no best-of-n.
    """
    axes = [key for key in ("reward", "gold") if key in records[REFERENCE, None][0]]
    worst = recipe.evaluation.worst
    return {
        "worst": {"gain": worst.gain, "kl": worst.kl},
        "axes": {axis: _build_axis(recipe, axis, records, draws) for axis in axes},
    }


def _build_axis(recipe: Recipe, axis: str, records: Records, draws: Sequence[Row]) -> Row:
    worst = recipe.evaluation.worst
    kls = {key: np.array([row["kl"] for row in rows]) for key, rows in records.items()}
    gains = {key: np.array([row[f"{axis}_gain"] for row in rows]) for key, rows in records.items()}
    described, area = describe_front(gains, kls, worst.gain, worst.kl, recipe.seed)
    points = [
        {"policy": policy, "step": step, "trainer": None if policy == REFERENCE else recipe.stages[policy].trainer,
         **described[policy, step]}
        for policy, step in records
    ]  # fmt: skip
    methods: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in recipe.policies:
        # The checkpoints in the order of training, the final policy last.
        path = sorted((key for key in records if key[0] == name), key=lambda key: (key[1] is None, key[1] or 0))
        methods[name] = (np.stack([kls[key] for key in path]), np.stack([gains[key] for key in path]))
    curve = best_of_n_curve(axis, draws)
    if curve:
        best_kls = np.array([[best_of_n_kl(n)] * len(draws) for n in curve])
        methods["best_of_n"] = (best_kls, np.stack([*curve.values()]))
    return {
        "points": points,
        "hypervolume": area,
        "best_of_n": [
            {"n": n, "kl": best_of_n_kl(n), "gain": estimate_mean(gain).as_dict()} for n, gain in curve.items()
        ],
        "at_kl": [
            {"kl": budget, "gains": {name: None if (found := read_path(*points, budget)) is None
                                     else estimate_mean(found).as_dict() for name, points in methods.items()}}
            for budget in recipe.evaluation.kl_budgets
        ],
    }  # fmt: skip


def best_of_n_curve(axis: str, draws: Sequence[Row]) -> dict[int, np.ndarray]:
    """Estimate the gain of best-of-n, chosen by the reward, over best-of-1: n = 1, 2, 4, ... -> (P,)."""
    if not draws:
        return {}
    proxy, scores = (np.array([row[key] for row in draws]) for key in ("reward", axis))
    sizes = [2**power for power in range(proxy.shape[1].bit_length()) if 2**power <= proxy.shape[1]]
    return {n: best_of_n(proxy, scores, n) - scores.mean(axis=1) for n in sizes}


def build_over_optimisation(recipe: Recipe, metrics: Row, records: Records, pareto: Row | None) -> Row:
    """Follow proxy and gold over sqrt(KL) along each run, fit the curves of Gao et al. (2022), and raise alarms."""
    stages = {}
    for name in recipe.policies if pareto else ():
        entries = metrics["checkpoints"].get(name) or [{"step": None, **metrics["policies"][name]}]
        points = [
            {"step": of["step"], "kl": of["kl"], "proxy": of["reward_gain"], "gold": of.get("gold_gain")}
            for of in entries
        ]
        stages[name] = {"form": "rl", "points": points, "fit": _fit_both(points, "rl")}
    best: Row = {"form": "bon", "points": []}
    if pareto and pareto["axes"]["reward"]["best_of_n"]:
        gold = {entry["n"]: entry["gain"] for entry in pareto["axes"].get("gold", {"best_of_n": []})["best_of_n"]}
        best["points"] = [
            {"n": of["n"], "proxy": of["gain"], "gold": gold.get(of["n"]),
             "kl": {**dict.fromkeys(("mean", "low", "high"), of["kl"]), "n": of["gain"]["n"]}}
            for of in pareto["axes"]["reward"]["best_of_n"]
        ]  # fmt: skip
    best["fit"] = _fit_both(best["points"], "bon")
    finals = {name: records[name, None] for name in recipe.policies}
    alarms = raise_alarms(finals, records[REFERENCE, None], recipe.evaluation.alarms)
    return {"stages": stages, "best_of_n": best, "alarms": alarms}


def _fit_both(points: Sequence[Row], form: Any) -> Row:
    fits: Row = {}
    for key in ("proxy", "gold"):
        known = [point for point in points if point[key]]
        kl, gain = (np.array([point[name]["mean"] for point in known]) for name in ("kl", key))
        fit = fit_over_optimisation(kl, gain, form) if known else None
        fits[key] = fit and fit.as_dict()
    return fits
