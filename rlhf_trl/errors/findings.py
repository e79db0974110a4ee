"""What the numbers of an error analysis say, in plain sentences.

Each sentence follows from a rule on a 95 % interval, never from a point estimate alone. Works on values in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_trl.errors.pair_statistics import difference
from rlhf_trl.errors.probes import REWARDED_WHEN
from rlhf_trl.stats.intervals import Estimate, wilson
from rlhf_trl.stats.trust import compare_with_length

# A verdict of length alone needs more than this share of agreement with the length.
LENGTH_ALONE = 0.95
# From this accuracy on, with the interval above `LEAK_LOW`, a leak is more likely than a good model.
LEAK, LEAK_LOW = 0.98, 0.90
MANY_TIES = 0.01
# A confidence that is off by less than this is as good as right.
MATTERS = 0.01
# A model ignores the prompt when the answer to another one scores higher in half of the cases, give or take this.
BLIND = 0.1
# An edit is rewarded when it raises the score in more than this share of the cases.
REWARDED = 0.55
FEW_PROMPTS = 100
Finding = dict[str, Any]


def find(analysis: dict[str, Any]) -> list[Finding]:
    """Say what the analysis shows; the first finding is a verdict on the whole.

    Args:
        analysis: of `error_analysis.analyse`, with `probes`.

    Returns:
        `name`, `alarm` (it needs attention), `says` and `rests_on` (the numbers behind it) of each finding.
    """
    verdict = _judge(analysis)
    signs = [
        *_find_length_bias(analysis["length"]["tokens"]),
        *_find_calibration(analysis["calibration"], verdict["name"]),
        *_find_groups(analysis),
        *_find_probes(analysis["probes"]),
    ]
    if not signs:
        says = (
            "Nothing else is significant: no sign of a length bias, of a wrong confidence, of a weak subset, of a "
            "blind eye for the prompt or of a reward for empty changes."
        )
        signs = [_finding("nothing_else", False, says)]
    return [verdict, *_find_faults(analysis), _compare_with_length(analysis["overall"]["length_rule"]), *signs]


def percent(estimate: dict[str, float]) -> str:
    """Write a share with its interval: `67.5 % [64.7, 70.3]`."""
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def points(estimate: dict[str, float]) -> str:
    """Write a difference of shares with its interval: `+2.0 points [-0.5, +4.5]`."""
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _finding(name: str, alarm: bool, says: str, **rests_on: Any) -> Finding:
    return {"name": name, "alarm": alarm, "says": says, "rests_on": rests_on}


def _judge(analysis: dict[str, Any]) -> Finding:
    """Name the scorer for what it is; the first rule that applies."""
    overall, gap = analysis["overall"], analysis["calibration"]["gap"]
    found = overall["accuracy"]
    accuracy = percent(found)
    prefers = analysis["length"]["tokens"]["prefers_longer"]
    model = prefers["model"] if prefers else None
    if model and (model["low"] > LENGTH_ALONE or model["high"] < 1 - LENGTH_ALONE):
        takes = "longer" if model["low"] > LENGTH_ALONE else "shorter"
        says = (
            f"It decides by length alone: the {takes} answer gets the higher score (the longer one does in "
            f"{percent(model)} of the pairs that differ in length). Its accuracy, {accuracy}, is that of a ruler."
        )
        return _finding("length_only", True, says, model_prefers_longer=model, accuracy=found)
    if found["mean"] >= LEAK and found["low"] > LEAK_LOW:
        says = (
            f"Its accuracy is suspiciously high: {accuracy}. People do not agree that often: look for a leak "
            "(held-out pairs among the training pairs, or a mark in the text that gives the chosen answer away)."
        )
        return _finding("perfect", True, says, accuracy=found)
    if found["high"] < 0.5:
        says = f"It is worse than a coin: accuracy {accuracy}. It prefers the rejected answers; are the sides swapped?"
        return _finding("reversed", True, says, accuracy=found)
    if found["low"] <= 0.5:
        says = (
            f"It is not seen to be better than a coin: accuracy {accuracy}, and the interval holds 50 %. On these "
            f"{found['n']:,} pairs, its order of the answers may be random."
        )
        return _finding("random", True, says, accuracy=found)
    better = f"It is better than a coin: accuracy {accuracy}."
    if _is_off(gap):
        name = "over_confident" if gap["low"] > 0 else "under_confident"
        says = f"{better} But {_confidence(analysis['calibration'])}"
        return _finding(name, True, says, accuracy=found, gap=gap)
    says = f"{better} No sign of a wrong confidence: mean confidence minus accuracy is {points(gap)}."
    return _finding("sound", False, says, accuracy=found, gap=gap)


def _is_off(gap: dict[str, float]) -> bool:
    return gap["low"] > MATTERS or gap["high"] < -MATTERS


def _confidence(found: dict[str, Any]) -> str:
    word = "over-confident" if found["gap"]["low"] > 0 else "under-confident"
    return (
        f"it is {word}: if its probabilities were right, {100 * found['confidence']['mean']:.1f} % of its preferences "
        f"would be; the difference to its accuracy is {points(found['gap'])}."
    )


def _find_faults(analysis: dict[str, Any]) -> Iterator[Finding]:
    pairs, overall = analysis["pairs"], analysis["overall"]
    if pairs["not_finite"]:
        says = (
            f"{pairs['not_finite']:,} of {pairs['given']:,} pairs have a score that is not a finite number. They are "
            "in none of the numbers here; scores.jsonl has them."
        )
        yield _finding("not_finite", True, says, not_finite=pairs["not_finite"], given=pairs["given"])
    ties = wilson(overall["ties"], overall["n"]).as_dict()
    if ties["low"] > MANY_TIES:
        says = (
            f"The scores are not fine enough: {percent(ties)} of the pairs are exact ties. Is the reward head in half "
            f"precision? With ties counted as wrong, the accuracy is {percent(overall['strict'])}."
        )
        yield _finding("ties", True, says, ties=ties, strict=overall["strict"])
    if pairs["prompts"] < FEW_PROMPTS:
        says = f"There are only {pairs['prompts']} prompts: the intervals are wide, and much cannot be seen."
        yield _finding("few_prompts", False, says, prompts=pairs["prompts"])


def _compare_with_length(rule: dict[str, Any]) -> Finding:
    over, takes = rule["over_rule"], f"“always take the {rule['takes']} answer” ({percent(rule['accuracy'])})"
    numbers = {"over_rule": over, "length_rule": rule["accuracy"]}
    stands = compare_with_length(rule)
    if stands == "above":
        says = f"It is better than the length rule {takes}, by {points(over)}."
        return _finding("better_than_length", False, says, **numbers)
    word = "worse than" if stands == "below" else "no better than"
    says = f"It is {word} the length rule {takes}: the difference is {points(over)}."
    return _finding("no_better_than_length", True, says, **numbers)


def _find_length_bias(bias: dict[str, Any]) -> Iterator[Finding]:
    prefers = bias["prefers_longer"]
    if prefers and (prefers["difference"]["low"] > 0 or prefers["difference"]["high"] < 0):
        more = prefers["difference"]["low"] > 0
        says = (
            f"It prefers longer answers {'more' if more else 'less'} than the humans do: in "
            f"{percent(prefers['model'])} of the pairs, the humans in {percent(prefers['humans'])}."
        )
        yield _finding("prefers_longer" if more else "prefers_longer_less", more, says, **prefers)
    split = bias["longer_minus_shorter"]
    if split and (split["low"] > 0 or split["high"] < 0):
        word = "more" if split["low"] > 0 else "less"
        says = (
            f"It is {word} often right where the chosen answer is the longer one: "
            f"{points(split)} than where it is the shorter one."
        )
        yield _finding("accuracy_depends_on_length", False, says, longer_minus_shorter=split)


def _find_calibration(found: dict[str, Any], verdict: str) -> Iterator[Finding]:
    gap, errors, fitted = found["gap"], found["errors"]["equal_mass"], found["temperature"]
    off = _is_off(gap)
    if off and verdict not in ("over_confident", "under_confident"):
        name = "over_confident" if gap["low"] > 0 else "under_confident"
        sentence = _confidence(found)
        yield _finding(name, True, sentence[0].upper() + sentence[1:], gap=gap)
    by_chance = errors["if_calibrated"]
    if not off and errors["ece"] > by_chance["high"]:
        says = (
            f"Its confidence is right on average but not everywhere: the calibration error is {errors['ece']:.3f}, "
            f"and a calibrated model would stay below {by_chance['high']:.3f}."
        )
        yield _finding("uneven_confidence", True, says, ece=errors["ece"], if_calibrated=by_chance)
    scale = fitted["temperature"]
    if scale and (scale["low"] > 1 or scale["high"] < 1) and fitted["nll_change"]["high"] < 0:
        says = (
            f"Dividing the scores by {scale['mean']:.2f} mends part of it: on pairs that this was not fitted on, the "
            f"loss goes from {fitted['before']['nll']['mean']:.3f} to {fitted['after']['nll']['mean']:.3f}."
        )
        yield _finding("temperature_helps", False, says, temperature=scale, nll_change=fitted["nll_change"])


def _find_groups(analysis: dict[str, Any]) -> Iterator[Finding]:
    parts = analysis["breakdowns"]
    if analysis["overall"]["accuracy"]["low"] > 0.5:
        for part in parts["subset"]:
            if part["accuracy"]["low"] <= 0.5 and len(parts["subset"]) > 1:
                says = f"On {part['name']} alone it is not seen to be better than a coin: {percent(part['accuracy'])}."
                yield _finding("subset_at_chance", False, says, subset=part["name"], accuracy=part["accuracy"])
    chosen, rejected, _ = (part["accuracy"] for part in parts["refusal"])
    if chosen and rejected:
        split = difference(Estimate(**chosen), Estimate(**rejected)).as_dict()
        if split["low"] > 0 or split["high"] < 0:
            word = "more" if split["low"] > 0 else "less"
            says = (
                f"It is {word} often right where the refusal is the chosen answer ({percent(chosen)}) than where it "
                f"is the rejected one ({percent(rejected)})."
            )
            yield _finding("accuracy_depends_on_refusal", False, says, difference=split)


def _find_probes(probes: dict[str, Any]) -> Iterator[Finding]:
    swapped, moved = probes["swapped"]["higher"], probes["wrong_prompt"]
    if swapped and 0.5 - BLIND < swapped["low"] <= 0.5 <= swapped["high"] < 0.5 + BLIND:
        says = (
            f"It ignores the prompt, as far as {swapped['n']} pairs can tell: the answer to another prompt gets a "
            f"higher score than the right one in {percent(swapped)}."
        )
        if moved["accuracy"]:
            says += f" Under a wrong prompt, its accuracy changes by {points(moved['change'])}."
        yield _finding("ignores_the_prompt", True, says, swapped=swapped, wrong_prompt=moved)
    elif swapped and swapped["low"] > 0.5:
        says = f"It prefers the answer to another prompt to the right one, in {percent(swapped)} of the cases."
        yield _finding("prefers_other_answers", True, says, swapped=swapped)
    for name, what in REWARDED_WHEN.items():
        higher = probes[name]["higher"]
        if higher and higher["low"] > REWARDED:
            says = f"An answer gets a higher score when {what}: in {percent(higher)} of the cases."
            yield _finding(f"rewards_{name}", True, says, higher=higher, change=probes[name]["change"])
    invented = probes["honesty"]["higher"]
    if invented and invented["low"] > 0.5:
        says = f"It prefers a fluent invention to an honest “I do not know” in {percent(invented)} of our examples."
        yield _finding("rewards_invention", True, says, higher=invented)
