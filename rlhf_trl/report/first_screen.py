"""What a reader needs first: the verdict, one row for each policy, and what to beware of.

Works on the documents that `step.read_documents` has read. Numbers and texts stay nodes: the page prints them with
their addresses, `rlhf-trl report --json` their plain values.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.report.values import raw
from rlhf_trl.run.layout import REFERENCE
from rlhf_trl.stats.intervals import FEWEST, estimate_mean
from rlhf_trl.stats.pairs import trust_in, weigh_trust

Documents = Mapping[str, Any]
Row = dict[str, Any]
SCORES = ("gold", "reward")
UNPROVEN = "has not shown that it can tell better answers"
LEFT_OUT = 0.2  # share of the prompts without a verdict, from which on a reader is told
# What `stats.pairs` found -> what the first screen warns of.
DOUBTS = {
    "none": "nothing here compares it with human labels",
    "unknown": "it was held against too few pairs that people labelled",
    "chance": "it is not clear of a coin",
    "length": "it is not clear of what length alone can do",
}
# Habit of a judge -> the level of its number, the side of it that is a fault, and what is said of it.
HABITS = {
    "consistency": (0.8, "worse", "it changes verdicts when the answers change places"),
    "prefers_longer": (0.5, "better", "the longer answer wins more often: read the win rate at equal length"),
    "difference": (0.0, "better", "a note to the judge sways it: a policy could learn to write such notes"),
}
KINDS = {
    "reward": "its win rates are a reward model's: no person's opinion, and no language model's",
    "offline": "it is a rule for tests, which says nothing about how good an answer is",
}


def build(recipe: Recipe, documents: Documents) -> Row:
    """Gather the first screen: `run`; the `verdict` and the `winner`, or None; `methods`, a row for each policy and
    the reference; `judge`, or None; `warnings`, each with `about` and `says`."""
    verdict = documents["comparison"]["verdict"]
    names = [*recipe.policies, REFERENCE] if recipe.policies else []
    return {
        "run": recipe.name,
        "verdict": verdict["sentence"] if verdict else None,
        "winner": verdict["winner"] if verdict else None,
        "methods": {name: describe_policy(name, documents) for name in names},
        "judge": describe_judge(documents),
        "warnings": [dict(zip(("about", "says", "why"), warning, strict=False))
                     for warning in list_warnings(recipe, documents)],
    }  # fmt: skip


def judge_share(share: Mapping[str, Any], level: float = 0.5) -> str:
    """Say what a share shows: `better` or `worse` where its interval is clear of `level`, `same`, or `unknown`."""
    if share["mean"] is None:
        return "unknown"
    return "better" if share["low"] > level else "worse" if share["high"] < level else "same"


def describe_policy(name: str, documents: Documents) -> Row:
    """Describe one policy; a key is left out where its number does not exist.

    `significant` has `better` or `worse` for a gain that is significant after correction and large enough to matter,
    and for a win rate clear of half by a judge that has shown its worth; `longer` or `shorter` for the length.
    """
    measured = documents["metrics"]["policies"][name]
    winrate, over = documents["winrate"], documents["over_optimisation"]
    row: Row = {"kl": measured["kl"], "length": measured["answer_tokens"], "significant": {}}
    if name == REFERENCE:
        return row
    claims = raw(documents["comparison"]["against_reference"]).get(name, {})
    outcomes = {key: claims.get(key.removesuffix("_gain"), {}).get("outcome")
                for key in ("gold_gain", "reward_gain", "win_rate")}  # fmt: skip
    row |= {key: measured[key] for key in outcomes if key in measured}
    row["seconds"] = documents["stats"][name]["summary"]["seconds"]
    for entry in winrate["win_rates"] if winrate and "win_rates" in winrate else ():
        if (entry["a"], entry["b"]) == (name, REFERENCE):
            row["win_rate"] = entry["win_rate"]
            outcomes["win_rate"] = outcomes["win_rate"] or judge_share(raw(entry["win_rate"]))
            if weigh_trust(raw(winrate)) != "informed" or raw(entry["win_rate"]["n"]) < FEWEST:
                outcomes["win_rate"] = None
    outcomes["length"] = compare_lengths(*(raw(documents["completions"][side]) for side in (name, REFERENCE)))
    telling = ("better", "worse", "longer", "shorter")
    row["significant"] = {key: outcome for key, outcome in outcomes.items() if key in row and outcome in telling}
    row["alarms"] = [alarm["alarm"] for alarm in (over["alarms"] if over else ())
                     if alarm["policy"] == name and alarm["raised"]]  # fmt: skip
    return row


def compare_lengths(ours: Sequence[Row], theirs: Sequence[Row]) -> str | None:
    """Say whether answers are `longer` or `shorter` than the reference's to the same prompts, or neither (95 %)."""
    tokens = {row["id"]: row["answer_tokens"] for row in theirs}
    differences = estimate_mean(np.array([row["answer_tokens"] - tokens[row["id"]] for row in ours], float))
    said = {"better": "longer", "worse": "shorter"}.get(judge_share(differences.as_dict(), 0.0))
    return said if differences.n >= FEWEST else None


def describe_judge(documents: Documents) -> Row | None:
    """Describe the judge in one row: who it is, its trust (`stats.pairs`), agreement, habits, price and time."""
    result = documents["winrate"]
    if result is None:
        return None
    row = {key: result["judge"][key] for key in ("name", "kind")} | {"status": result["status"], "trust": "none"}
    if result["status"] == "not run":
        return row
    row |= {"trust": weigh_trust(raw(result)), "prompts": result["prompts"]}
    if result["calibration"]:
        scorer = result["calibration"]["reward_model" if raw(row["kind"]) == "reward" else "all"]
        row |= {"agreement": scorer} if scorer else {}
    # A judge that scores each answer by itself knows no order, and always has a verdict.
    ordered = ("consistency", "first_share", "invalid_rate") if result["judge"]["kind"] == "openai" else ()
    row |= {key: result["habits"][key] for key in (*ordered, "tie_rate", "prefers_longer")}
    row |= {"note": result["canaries"]["difference"]} if result["canaries"] else {}
    row |= {"usd": result["cost"]["usd"]} if result["cost"] and result["cost"]["usage"]["prompt_tokens"] else {}
    row |= {"seconds": documents["done"]["judge"]["seconds"]} if "judge" in documents["done"] else {}
    return row


def list_warnings(recipe: Recipe, documents: Documents) -> Iterator[tuple[Any, ...]]:
    """List what to beware of, the most general first: about what, what is said, and why."""
    verdict, metrics, over = (documents[key] for key in ("comparison", "metrics", "over_optimisation"))
    verdict = verdict["verdict"]
    yield from (("the comparison", says) for says in (verdict["warnings"] if verdict else ()))
    yield from ((alarm["policy"], alarm["says"]) for alarm in (over["alarms"] if over else ()) if alarm["raised"])
    for score in SCORES:
        who, model = metrics[f"{score}_stage"], metrics[f"{score}_model"]
        trust = trust_in(raw(model)) if model else "informed"
        if trust != "informed":
            yield who, f"the {score} model {UNPROVEN}: {DOUBTS[trust]}"
        said = verdict and verdict["measure"] == score  # by the verdict's own warnings
        if who and not said and raw(who) in [recipe.stages[name].reward for name in recipe.policies]:
            yield (
                who,
                f"policies were trained to raise this {score} score: a gain by it shows first that training worked",
            )
    for stage, stats in documents["stats"].items():
        if "health" in stats:
            yield from ((stage, found["says"]) for found in stats["health"])
    for stage, analysis in documents["analyses"].items():
        alarms = [finding["name"] for finding in raw(analysis["findings"]) if finding["alarm"]]
        names = [name.replace("_", " ").replace("certainly", "“Certainly!”") for name in alarms]
        if names:
            yield stage, f"its errors show: {', '.join(names)}"
    if recipe.policies:
        yield from _warn_of_judge(documents["winrate"])


def _warn_of_judge(result: Any) -> Iterator[tuple[Any, ...]]:
    if result is None:
        yield "win rate", "this run has no judge; a reward is a model's score, not an opinion"
        return
    name, kind = "the judge", raw(result["judge"]["kind"])
    if result["status"] != "complete":
        yield name, f"it was {'not run' if result['status'] == 'not run' else 'stopped'}:", result["reason"]
    if result["status"] == "not run":
        return
    trust = weigh_trust(raw(result))
    if trust != "informed":
        yield name, f"it {UNPROVEN}: {DOUBTS[trust]}"
    if kind in KINDS:
        yield name, KINDS[kind]
    numbers = {**raw(result["habits"]), **(raw(result["canaries"]) or {})}
    for key, (level, fault, says) in HABITS.items():
        if key in numbers and judge_share(numbers[key], level) == fault and (kind == "openai" or key != "consistency"):
            yield name, says
    for entry in result["win_rates"]:
        if raw(entry["missing"]["comparisons"]) > LEFT_OUT * raw(result["prompts"]):
            yield entry["a"], "many prompts have no verdict, and a win rate on the others may not hold for them"
        for says in entry["length_controlled"]["warnings"]:
            yield entry["a"], "win rate at equal length:", says
