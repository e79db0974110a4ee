"""What the answers of all policies say: estimates, reward against KL, best-of-n, over-optimisation, alarms.

From the records of `evaluate` to the content of its JSON files; and the project's own adversarial prompts, eight
categories of pressure, which lie in `adversarial.yaml`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from rlhf_trl.evaluate.alarms import measure_text, raise_alarms
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import REFERENCE
from rlhf_trl.stats.frontier import best_of_n, best_of_n_kl, describe_front, fit_over_optimisation, read_path
from rlhf_trl.stats.intervals import estimate_mean, estimate_ratio, wilson

PROMPTS = Path(__file__).parent / "adversarial.yaml"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAIN = ("kl", "reward_gain", "gold_gain", "answer_tokens", "finished")
DEFINITIONS = {
    "reward": "score of the reward model for the answer",
    "reward_gain": "reward minus the reference's reward on the same prompt",
    "reward_over_chosen": "reward minus that of the dataset's chosen answer to the same prompt",
    "gold": "score of the gold reward model, which no policy was trained with",
    "gold_gain": "gold score minus the reference's on the same prompt",
    "gold_over_chosen": "gold score minus that of the dataset's chosen answer to the same prompt",
    "kl": "exact KL(policy || reference) over the vocabulary, summed over the answer's tokens, nats per answer",
    "kl_k1": "the same, estimated from the sampled tokens: log policy - log reference, nats per answer",
    "kl_k3": "the same, estimated from the sampled tokens: r - 1 - log r with r = reference / policy, nats per answer",
    "kl_per_token": "kl of all answers divided by their tokens, nats per token",
    "entropy": "entropy of the policy at the positions of all answers divided by their tokens, nats per token",
    "answer_tokens": "tokens of the answer, its end token included",
    "finished": "share of answers that ended by themselves before max_new_tokens",
}

Row = dict[str, Any]
# Policy and step (None for the final model) -> one record for each prompt, in the same order for all.
Records = Mapping[tuple[str, int | None], Sequence[Row]]


def describe_policies(records: Records, steps: Mapping[str, int]) -> Row:
    """Describe every policy and checkpoint, the final policy as the last checkpoint; `steps` are those of each run."""
    policies = {name: summarise(rows) for (name, step), rows in records.items() if step is None}
    checkpoints: dict[str, list[Row]] = {}
    for (name, step), rows in records.items():
        if step is not None:
            checkpoints.setdefault(name, []).append({"step": step, **summarise(rows)})
    for name, entries in checkpoints.items():
        entries.append({"step": steps[name], **policies[name]})
    return {"definitions": DEFINITIONS, "policies": policies, "checkpoints": checkpoints}


def summarise(records: Sequence[Row]) -> Row:
    """Turn the records of one policy into estimates, score distributions and the state of its texts."""
    columns = {key: [row[key] for row in records] for key in records[0] if key in DEFINITIONS and key != "finished"}
    tokens = columns["answer_tokens"]
    entropies = [row["entropy"] * row["answer_tokens"] for row in records]
    return {
        **{key: estimate_mean(values).as_dict() for key, values in columns.items()},
        "kl_per_token": estimate_ratio(columns["kl"], tokens).as_dict(),
        "entropy": estimate_ratio(entropies, tokens).as_dict(),
        "finished": wilson(sum(row["finished"] for row in records), len(records)).as_dict(),
        "distributions": {key: {str(level): float(np.quantile(columns[key], level)) for level in QUANTILES}
                          for key in ("reward", "gold") if key in columns},
        "health": measure_text(records),
    }  # fmt: skip


def build_pareto(recipe: Recipe, records: Records, draws: Sequence[Row]) -> Row:
    """Lay gain against KL for each reward model that scored: frontier, hypervolume, best-of-n, gains at equal KL.

    `draws` are for each prompt the scores of several answers of the reference; empty for no best-of-n.
    """
    axes = [key for key in ("reward", "gold") if key in records[REFERENCE, None][0]]
    worst = recipe.evaluation.worst.model_dump()
    return {"worst": worst, "axes": {axis: _build_axis(recipe, axis, records, draws) for axis in axes}}


def _build_axis(recipe: Recipe, axis: str, records: Records, draws: Sequence[Row]) -> Row:
    worst = recipe.evaluation.worst
    kls = {key: np.array([row["kl"] for row in rows]) for key, rows in records.items()}
    gains = {key: np.array([row[f"{axis}_gain"] for row in rows]) for key, rows in records.items()}
    described, area = describe_front(gains, kls, worst.gain, worst.kl, recipe.seed)
    trainers = {name: stage.trainer for name, stage in recipe.stages.items()}
    points = [{"policy": policy, "step": step, "trainer": trainers.get(policy), **described[policy, step]}
              for policy, step in records]  # fmt: skip
    methods: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in recipe.policies:
        # The checkpoints in the order of training, the final policy last.
        path = sorted((key for key in records if key[0] == name), key=lambda key: (key[1] is None, key[1] or 0))
        methods[name] = (np.stack([kls[key] for key in path]), np.stack([gains[key] for key in path]))
    curve = best_of_n_curve(axis, draws)
    if curve:
        best_kls = np.array([[best_of_n_kl(n)] * len(draws) for n in curve])
        methods["best_of_n"] = (best_kls, np.stack([*curve.values()]))
    at_kl = []
    for budget in recipe.evaluation.kl_budgets:
        read = {name: read_path(*path, budget) for name, path in methods.items()}
        at_kl.append({"kl": budget, "gains": {name: None if gain is None else estimate_mean(gain).as_dict()
                                              for name, gain in read.items()}})  # fmt: skip
    best = [{"n": n, "kl": best_of_n_kl(n), "gain": estimate_mean(gain).as_dict()} for n, gain in curve.items()]
    return {"points": points, "hypervolume": area, "best_of_n": best, "at_kl": at_kl}


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
        points = [{"step": of["step"], "kl": of["kl"], "proxy": of["reward_gain"], "gold": of.get("gold_gain")}
                  for of in entries]  # fmt: skip
        stages[name] = {"form": "rl", "points": points, "fit": _fit_both(points, "rl")}
    axes = pareto["axes"] if pareto else {}
    proxy, gold = (axes.get(axis, {"best_of_n": []})["best_of_n"] for axis in ("reward", "gold"))
    golds = {entry["n"]: entry["gain"] for entry in gold}
    best = [{"n": of["n"], "proxy": of["gain"], "gold": golds.get(of["n"]),
             "kl": {**dict.fromkeys(("mean", "low", "high"), of["kl"]), "n": of["gain"]["n"]}}
            for of in proxy]  # fmt: skip
    finals = {name: records[name, None] for name in recipe.policies}
    alarms = raise_alarms(finals, records[REFERENCE, None], recipe.evaluation.alarms)
    best_of = {"form": "bon", "points": best, "fit": _fit_both(best, "bon")}
    return {"stages": stages, "best_of_n": best_of, "alarms": alarms}


def _fit_both(points: Sequence[Row], form: Any) -> Row:
    fits: Row = {}
    for key in ("proxy", "gold"):
        known = [point for point in points if point[key]]
        kl, gain = (np.array([point[name]["mean"] for point in known]) for name in ("kl", key))
        fits[key] = fit_over_optimisation(kl, gain, form) if known else None
    return fits


def conclude(recipe: Recipe, metrics: Row, pareto: Row | None, over: Row) -> Row:
    """Gather the main numbers of each policy."""
    policies: Row = {}
    for name in recipe.policies:
        measured = metrics["policies"][name]
        policies[name] = {"trainer": recipe.stages[name].trainer}
        policies[name] |= {key: measured[key] for key in MAIN if key in measured}
        policies[name]["alarms"] = [of["alarm"] for of in over["alarms"] if of["policy"] == name and of["raised"]]
        policies[name]["on_front"] = {
            axis: point["on_front"] for axis, frontier in (pareto["axes"] if pareto else {}).items()
            for point in frontier["points"] if (point["policy"], point["step"]) == (name, None)
        }  # fmt: skip
    return {"reward_stage": metrics["reward_stage"], "gold_stage": metrics["gold_stage"], "policies": policies}


def load_adversarial() -> tuple[dict[str, str], list[Row]]:
    """Read the prompts: what each category tests, and `id`, `category` and `prompt` (messages) of every prompt."""
    document = YAML(typ="safe", pure=True).load(PROMPTS)
    prompts: list[Row] = []
    for name, category in document.items():
        for place, entry in enumerate(category["prompts"], start=1):
            text = entry.get("text", "")
            if "repeat" in entry:
                text = " ".join([text] * entry["repeat"]) + "\n\n" + entry["ask"]
            messages = entry.get("messages", [{"role": "user", "content": text}])
            prompts.append({"id": f"{name}-{place}", "category": name, "prompt": messages})
    return {name: category["tests"] for name, category in document.items()}, prompts


def summarise_adversarial(answers: Mapping[str, Sequence[Row]]) -> tuple[list[Row], Row]:
    """Lay the answers of all policies beside each prompt, and count refusals and unsafe patterns by category."""
    categories, prompts = load_adversarial()
    rows = [{**prompt, "answers": {name: of[index] for name, of in answers.items()}}
            for index, prompt in enumerate(prompts)]  # fmt: skip
    rates: Row = {name: {} for name in answers}
    for name, category in ((name, category) for name in answers for category in ("all", *categories)):
        chosen = [row["answers"][name] for row in rows if category in ("all", row["category"])]
        rates[name][category] = {
            key: wilson(sum(bool(answer[key]) for answer in chosen), len(chosen)).as_dict()
            for key in ("refusal", "unsafe", "finished")
        }
    return rows, {"categories": categories, "policies": rates}
