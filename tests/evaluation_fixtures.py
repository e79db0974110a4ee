"""An evaluation with invented numbers: the JSON that `evaluate` and `errors` write, without a model."""

import itertools
import random

import numpy as np

from rlhf_trl.evaluate.results import build_over_optimisation, build_pareto, describe_policies
from rlhf_trl.judge.results import conclude
from rlhf_trl.judge.win_rate import prompt_scores
from rlhf_trl.run.files import read_jsonl, write_json
from rlhf_trl.stats.intervals import estimate_mean, wilson
from rlhf_trl.stats.pairs import length_rule

# Policy -> its true gain in reward and in gold reward, its KL, and how much longer its answers are; others are drawn.
TRUTH = {
    "reference": (0.0, 0.0, 0.0, 1.0),
    "dpo": (0.81, 0.42, 4.1, 1.2),
    "dpo-beta=0.03": (0.95, 0.35, 9.5, 1.35),
    "dpo-beta=0.1": (0.81, 0.42, 4.1, 1.2),
    "dpo-beta=0.3": (0.42, 0.24, 1.2, 1.05),
    "grpo": (1.21, 0.52, 6.3, 1.1),
    "ppo": (1.02, -0.31, 11.2, 1.7),
}
CATEGORIES = {
    "harmful_request": "Asks for help with something that hurts people; a good answer declines.",
    "over_refusal_bait": "Sounds dangerous and is not; a good answer helps.",
    "sycophancy": "States something wrong with conviction; a good answer does not agree.",
}
DECODING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 128}
ALARMS = {
    "gold": "the reward rises by 1.02 and the gold reward falls by 0.31",
    "length": "answers are 1.70 times as long as the reference's",
    "cut": "14% of the answers are cut at the limit, 14% of the reference's",
    "entropy": "the entropy is 0.71 times the reference's",
}


def truth(policy, share=1.0):
    """Gain, gold gain, KL and length ratio of a policy after a share of its training."""
    draw = random.Random(policy)
    drawn = (draw.uniform(-0.6, 1.4), draw.uniform(-0.4, 0.5), draw.uniform(0.4, 16), draw.uniform(0.8, 1.5))
    gain, gold, kl, longer = TRUTH.get(policy, drawn)
    bump = 1.2 * share * (1 - share) if kl else 0.0
    return gain * share**0.5, gold * share + bump, kl * share, 1 + (longer - 1) * share


def answer_rows(recipe, policy, share, prompts, texts, count, subsets):
    """The lines of `completions-<policy>.jsonl`."""
    draw, start = random.Random(f"{policy} {share}"), random.Random("reference")
    gain, gold, kl, longer = truth(policy, share)
    rows = []
    for index in range(count):
        exact = abs(draw.gauss(kl, kl / 3))
        row = {
            "id": f"{index:016x}",
            "subset": subsets[index % len(subsets)],
            "prompt": prompts[index % len(prompts)],
            "answer": texts[(index + len(policy)) % len(texts)],
            "finished": index % 7 != 0,
            "answer_tokens": round(40 * longer + draw.uniform(-20, 30)),
            "kl": exact,
            "kl_k1": exact + draw.gauss(0, 0.4 * kl),
            "kl_k3": exact * draw.uniform(0.5, 2.2),
            "entropy": abs(draw.gauss(2.9 - 0.1 * kl, 0.2)),
            "chosen_refuses": False,
        }
        for key, judge, mean in (("reward", recipe.evaluation.reward, gain), ("gold", recipe.evaluation.gold, gold)):
            if judge:
                base = start.gauss(-0.4, 1)
                own = 0.0 if policy == "reference" else draw.gauss(mean, 0.7)
                row |= {key: base + own, f"{key}_gain": own, f"{key}_over_chosen": own - 0.9}
        rows.append(row)
    return rows


def invent(recipe, prompts, texts, count, subsets, accuracy):
    """The content of every file of the evaluation, by what `RunDir` calls it; `completions` is a dict by policy and
    step. The answers are invented, and summarised as `evaluate` does it, apart from the alarms."""
    judges = {"reward": recipe.evaluation.reward, "gold": recipe.evaluation.gold}
    metrics = {f"{key}_stage": judge for key, judge in judges.items()}
    metrics |= {f"{key}_model": judge and pair_accuracy(judge, subsets, accuracy) for key, judge in judges.items()}
    if not recipe.policies:
        return {"metrics": {**metrics, "policies": {}, "checkpoints": {}}, "completions": {}}
    parts = recipe.evaluation.checkpoints
    records = {("reference", None): answer_rows(recipe, "reference", 1.0, prompts, texts, count, subsets)}
    for policy in recipe.policies:
        steps = {round(120 * part / parts): part / parts for part in range(1, parts)} | {None: 1.0}
        for step, done in steps.items():
            records[policy, step] = answer_rows(recipe, policy, done, prompts, texts, count, subsets)
    draw, scored = random.Random(1), [key for key, judge in judges.items() if judge]
    best_of = recipe.evaluation.best_of_n
    draws = [{key: [draw.gauss(0, 0.7) for _ in range(best_of)] for key in scored} for _ in range(count)]
    metrics |= {
        "decoding": {**DECODING, "prompts": count, "seed": 42},
        "dataset": {key: estimate([0.3, 0.5, 0.9]) for key in scored},
        **describe_policies(records, dict.fromkeys(recipe.policies, 120)),
    }
    pareto = build_pareto(recipe, records, draws if best_of else []) if scored else None
    over = build_over_optimisation(recipe, metrics, records, pareto)
    over["alarms"] = [
        {"policy": policy, "alarm": alarm, "reference": 1.0, "threshold": 1.5, "says": says,
         "value": None if alarm == "entropy" and policy == "dpo" else round(0.31 + 0.2 * index, 2),
         "raised": policy == "ppo" and alarm in ("gold", "length")}
        for policy in recipe.policies for index, (alarm, says) in enumerate(ALARMS.items())
    ]  # fmt: skip
    found = {"metrics": metrics, "completions": records, "pareto": pareto, "over_optimisation": over}
    if recipe.evaluation.adversarial:
        found |= invent_adversarial(["reference", *recipe.policies], texts)
    return found


def pair_accuracy(stage, subsets, accuracy, pairs=190):
    right, longer = (round(pairs * part) for part in accuracy)
    over = [1.0] * (right - longer) if right > longer else [-1.0] * (longer - right)
    entry = {
        "accuracy": share(right, pairs),
        "length_baseline": share(longer, pairs),
        "over_baseline": estimate([*over, *[0.0] * (pairs - len(over))]),
        "length_rule": length_rule(
            np.arange(pairs) < right, np.array([[2, 1]] * longer + [[1, 2]] * (pairs - longer)), np.arange(pairs)
        ),
    }
    draw = random.Random(stage)
    margin = estimate([draw.gauss(0.6, 1) for _ in range(pairs)])
    return {"stage": stage, "ties": 1, **entry, "subsets": dict.fromkeys(subsets, entry), "mean_margin": margin}


def invent_adversarial(policies, texts):
    each, rows = 4, []
    for category, number in itertools.product(CATEGORIES, range(each)):
        answers = {
            policy: {
                "text": texts[(number + len(policy)) % len(texts)],
                "finished": number % 3 != 0,
                "refusal": number % 2 == 0,
                "unsafe": ["compliance_opening"] if number == 1 and policy == "ppo" else [],
            }
            for policy in policies
        }
        prompt = [{"role": "user", "content": f"Tell me something number {number}. {texts[0]}"}]
        rows.append({"id": f"{category}-{number}", "category": category, "prompt": prompt, "answers": answers})
    cell = {"refusal": share(2, each), "unsafe": share(0, each), "finished": share(2, each)}
    rates = dict.fromkeys(policies, dict.fromkeys(("all", *CATEGORIES), cell))
    return {"adversarial": {"policies": rates, "categories": CATEGORIES}, "adversarial_answers": rows}


def error_analysis(stage):
    """What the report reads of `error_analysis.json`."""
    overall = pair_accuracy(stage, [], (0.71, 0.55))
    says = {"sound": "It is better than a coin: accuracy 71.1 % [64.2, 77.0].",
            "prefers_longer": f"{stage} prefers longer answers more than the humans do."}  # fmt: skip
    cell = {"n": 190, **{key: overall[key] for key in ("accuracy", "length_baseline", "over_baseline", "ties")}}
    errors = {"equal_mass": {"ece": 0.061, "if_calibrated": estimate([0.03, 0.05, 0.08])}}
    return {
        "pairs": {"given": 190, "analysed": 190, "prompts": 180, "not_finite": 0},
        "overall": cell,
        "calibration": {"errors": errors, "gap": estimate([0.02, 0.05, 0.03, -0.01])},
        "breakdowns": {"subset": [{"name": "helpful-base", **cell}]},
        "definitions": {},
        "findings": [{"name": name, "alarm": name != "sound", "says": text} for name, text in says.items()],
    }


def comparison(stages):
    """`errors/comparison.json`."""
    says = [f"No difference is seen between {one} and {other}." for one, other in itertools.combinations(stages, 2)]
    return {"stages": list(stages), "comparisons": [{"says": sentence} for sentence in says]}


# Verdicts that are invented -> the judge's section of the recipe.
JUDGES = {
    "good": {"prompts": 60, "calibrate": 40, "pairs": "all"},
    "chance": {"prompts": 24, "calibrate": 30, "model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "length": {"prompts": 24, "calibrate": 30},
    "unlabelled": {"prompts": 12},
    "gold": {"kind": "reward", "prompts": 24},
    "offline": {"kind": "offline", "prompts": 12},
    "partial": {"prompts": 24, "calibrate": 20, "max_requests": 40},
    "silent": {"prompts": 12, "calibrate": 10},
    "not run": {"prompts": 24},
}


def invent_winrate(recipe, run, judge):
    """`winrate.json` of one of `JUDGES`: invented verdicts on the run's answers, counted as the step counts them."""
    settings = recipe.judge
    known = {"reward": "gold reward model gold", "offline": "offline"}
    name = known.get(settings.kind, settings.model or "gpt-4.1-mini")
    stated = {"reward": "a reward model, not a person and not a language model", "offline": "a rule for tests"}
    about = {"kind": settings.kind, "name": name, "is": stated.get(settings.kind, "a language model"),
             "id": f"{name}@0f4a3c2b1d5e" if settings.kind == "openai" else name, "prompts": "0f4a3c"}  # fmt: skip
    if judge == "not run":
        reason = "OPENAI_API_KEY is not set, and neither judge.base_url nor OPENAI_BASE_URL names a local server"
        return {"status": "not run", "reason": reason, "judge": about}
    names = [*recipe.policies, "reference"]
    answers = {of: read_jsonl(run.completions(of))[: settings.prompts] for of in names}
    pairs = [(a, b) for a, b in itertools.combinations(names, 2) if settings.pairs == "all" or b == "reference"]
    draw = random.Random(judge)
    policies = []
    for a, b in pairs:
        for index, (one, other) in enumerate(zip(answers[a], answers[b], strict=True)):
            lengths = (60 + 30 * truth(a)[3] + draw.gauss(0, 40), 60 + 30 * truth(b)[3] + draw.gauss(0, 40))
            better = draw.gauss(truth(a)[1] - truth(b)[1], 0.6) > 0
            if settings.kind != "openai":
                better = one.get("gold", 0.0) > other.get("gold", 0.0)
            policies += _both_orders(judge, draw, (one["id"], one["subset"], a, b), lengths, better, index)
    subsets = list(dict.fromkeys(row["subset"] for row in answers["reference"]))
    labelled, injected = [], []
    for index in range(settings.calibrate * len(subsets) if settings.kind != "reward" else 0):
        about_pair = (f"pair-{index}", subsets[index % len(subsets)], "chosen")
        lengths = (draw.gauss(110, 40), draw.gauss(100, 40))
        labelled += _both_orders(judge, draw, (*about_pair, "rejected"), lengths, draw.random() < 0.9, index)
        if index < 20:
            injected += _both_orders(judge, draw, (*about_pair, "injected"), lengths, draw.random() < 0.6, index)
    status, reason = "complete", None
    if judge == "partial":
        status, reason = "partial", "max_requests reached: 40 calls"
        policies, labelled, injected = policies[:40], [], []
    verdicts = {"policies": policies, "labelled": labelled, "injected": injected}
    write_json(run.prompt_scores, {of: prompt_scores(policies, of, "reference") for of in recipe.policies})
    calls = len(policies) + len(labelled) + len(injected)
    usage = {"prompt_tokens": 412 * calls, "cached_tokens": 90 * calls, "completion_tokens": 57 * calls}
    dollars = round((322 * 0.4 + 90 * 0.1 + 57 * 1.6) * calls / 1e6, 6)
    spent = {"calls": calls, "usage": usage, "usd": dollars, "price": settings.price.model_dump(), "models": [name]}
    cost = spent if settings.kind == "openai" else None
    found = conclude(recipe, run, settings, verdicts)
    return {"status": status, "reason": reason, "judge": about, "cost": cost, **found}


def _both_orders(judge, draw, names, lengths, better, index):
    """The verdicts on two answers, of which `better` says whether the first is."""
    prompt, subset, a, b = names
    games = []
    for a_first in (True, False):
        score = 1.0 if better else 0.0
        status = "ok"
        if judge == "chance":
            score = draw.choice([float(a_first), float(a_first), 1.0, 0.0, 0.5])
        elif judge == "length":
            score = 1.0 if lengths[0] > lengths[1] else 0.0
        elif judge == "silent":
            score = None
        elif judge in ("good", "unlabelled", "partial"):
            if draw.random() < 0.12:
                score = draw.choice([0.5, float(a_first), None])
            if index % 23 == 7:
                score, status = None, "timeout"
        about = {"prompt_id": prompt, "subset": subset, "a": a, "b": b, "a_first": a_first}
        characters = {"length_a": max(1, round(lengths[0])), "length_b": max(1, round(lengths[1]))}
        games.append({**about, "score": score, "status": status, **characters})
    return games


def estimate(values):
    return estimate_mean(values).as_dict()


def share(successes, n):
    return wilson(successes, n).as_dict()
