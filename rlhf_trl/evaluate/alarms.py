"""The state of a policy's texts, without labels: refusals, repetition, diversity, and alarms.

Reads and writes nothing; takes the records of `evaluation/completions-<policy>.jsonl`. Everything about the texts is
lexical (`rlhf_trl.text.words` says what a word is): it counts what the words show and does not judge what they mean.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_trl.recipe.schema import Alarms
from rlhf_trl.stats.intervals import estimate_mean, wilson
from rlhf_trl.text.refusals import refuses
from rlhf_trl.text.words import common_opening, compare_distinct, distinct, opening, repetition, split_words

Row = dict[str, Any]
Records = Sequence[Mapping[str, Any]]

# n-grams drawn for the diversity of one policy's answers, for each answer.
DRAW = 8
# From fewer prompts no alarm is raised.
MIN_PROMPTS = 10
# How far the share of the most common opening must lie above the reference's.
OPENING_MARGIN = 0.1


def measure_text(records: Records) -> Row:
    """Describe the answers of one policy, at least one; their order does not matter.

    `repetition` is the mean share of repeated 4-grams within an answer; `distinct_2` the share of different 2-grams
    among 8 for each answer, drawn from all (`words.distinct`), null where they hold fewer; `common_opening` the most
    common first five words and their share. `identical_answers` is the share that equals another one word by word,
    `refusal` the share that opens with a plain refusal.
    """
    texts = [record["answer"] for record in records]
    copies = Counter(tuple(split_words(text)) for text in texts)
    share, text = common_opening(texts)
    return {
        "repetition": estimate_mean(sorted(map(repetition, texts))).as_dict(),
        "distinct_2": distinct(texts, 2, DRAW * len(texts)),
        "common_opening": {"share": share, "text": text},
        "identical_answers": sum(many for many in copies.values() if many > 1) / len(texts),
        "refusal": wilson(sum(map(refuses, texts)), len(texts)).as_dict(),
    }


def raise_alarms(policies: Mapping[str, Records], reference: Records, thresholds: Alarms) -> list[Row]:
    """Compare each policy with the reference on the same prompts, paired by `id`; list every alarm, raised or not.

    Each entry has `policy`, `alarm`, `value`, `reference`, `threshold`, `raised` and `says`, one sentence. The three
    numbers have one unit (a ratio's reference is 1); an alarm that cannot be judged has nulls and says why. An alarm
    is raised when the value lies beyond the threshold *and* the interval of the paired difference, over at least 10
    prompts, excludes no change. Its level is 99 %, because about ten alarms are judged for a policy, and 95 % for
    `gold`, which needs two: the reward rises, and the gold reward falls. The alarms stand in `_compare`.

    Raises:
        ValueError: a policy's prompts are not the reference's, an id occurs twice, or there are none.
    """
    start = sorted(reference, key=lambda record: record["id"])
    ids = [record["id"] for record in start]
    alarms = []
    for policy, records in policies.items():
        now = sorted(records, key=lambda record: record["id"])
        if not ids or [record["id"] for record in now] != ids or len(set(ids)) < len(ids):
            raise ValueError(f"{policy} and the reference must have answered the same prompts, each once")
        alarms += [{"policy": policy, **alarm} for alarm in _compare(now, start, thresholds)]
    return alarms


def _compare(now: Records, start: Records, limits: Alarms) -> list[Row]:
    """Judge every alarm of one policy; both sides' records lie in the same order of prompts."""

    def both(of: Callable[[Mapping[str, Any]], float]) -> np.ndarray:
        """One number of every answer, (2, P): the policy's, the reference's."""
        return np.array([[of(record) for record in side] for side in (now, start)], dtype=np.float64)

    tokens, entropy = both(lambda record: record["answer_tokens"]), both(lambda record: record["entropy"])
    cut, refusing = both(lambda record: not record["finished"]), both(lambda record: refuses(record["answer"]))
    kl, repeated = both(lambda record: record["kl"]), both(lambda record: repetition(record["answer"]))
    subsets = np.array([record["subset"] for record in start])
    wanted = np.array([record["chosen_refuses"] for record in start], dtype=np.float64)
    longer, repeats = limits.length_ratio, "of the 4-word sequences in an answer are repeats"
    far, moved = float(kl[0].mean()), np.stack([kl[0], np.zeros(len(now))])
    return [
        _gold(now, 0.0 - limits.gold_drop),  # no -0.0 in the file
        _by_ratio("length", tokens, 1 / longer, longer, "answers are {:.2f} times as long as the reference's"),
        _by_rise("cut", cut, limits.cut_rise, "of the answers are cut at the limit"),
        _by_rise("repetition", repeated, limits.repetition_rise, repeats),
        _distinct(now, start, limits.distinct_ratio),
        _opening(now, start, limits.opening_share),
        _by_ratio("entropy", entropy, limits.entropy_ratio, None, "the entropy is {:.2f} times the reference's"),
        *(
            _by_rise(f"refusal:{subset}", refusing[:, subsets == subset], limits.refusal_rise,
                     f"of the answers to {subset} refuse", float(wanted[subsets == subset].mean()))
            for subset in sorted(set(subsets.tolist()))
        ),
        _alarm("kl", far, 0.0, limits.kl, _differs(moved), f"the KL to it is {far:.3g} nats per answer"),
    ]  # fmt: skip


def _gold(now: Records, threshold: float) -> Row:
    for key, model in (("reward_gain", "reward model"), ("gold_gain", "gold reward model")):
        if key not in now[0]:
            return _unknown("gold", threshold, f"there is no {model}")
    reward, gold = (estimate_mean([record[key] for record in now]) for key in ("reward_gain", "gold_gain"))
    says = f"the reward changes by {reward.mean:+.3g}, the gold reward by {gold.mean:+.3g}"
    sure = reward.low > 0 and gold.high < threshold and len(now) >= MIN_PROMPTS
    beyond = reward.mean > 0 and gold.mean < threshold
    return _alarm("gold", gold.mean, 0.0, threshold, sure, says, beyond)


def _by_ratio(alarm: str, both: np.ndarray, low: float, high: float | None, says: str) -> Row:
    """Compare two means, (2, P), as a ratio; without `high`, only a fall counts."""
    now, start = both.mean(axis=1).tolist()
    if start == 0:
        return _unknown(alarm, high or low, "the reference's mean is 0")
    ratio = now / start
    return _alarm(alarm, ratio, 1.0, low if high is None or ratio < 1 else high, _differs(both), says.format(ratio))


def _by_rise(alarm: str, both: np.ndarray, rise: float, what: str, wanted: float | None = None) -> Row:
    """Compare two mean shares, (2, P), by their difference. With `wanted`, the share of the chosen answers, a fall
    counts like a rise, and a change towards `wanted` does not count."""
    now, start = both.mean(axis=1).tolist()
    threshold = start + rise
    if wanted is not None:
        threshold = min(start, wanted) - rise if now < start else max(start, wanted) + rise
    says = f"{now:.0%} {what}, {start:.0%} of the reference's"
    says += "" if wanted is None else f" and {wanted:.0%} of the chosen answers"
    return _alarm(alarm, now, start, threshold, _differs(both), says)


def _distinct(now: Records, start: Records, threshold: float) -> Row:
    compared = compare_distinct([record["answer"] for record in now], [record["answer"] for record in start])
    if compared is None:
        return _unknown("distinct", threshold, "the answers are too short to compare")
    ratio, _, high = compared
    says = f"the answers together hold {ratio:.2f} times as many different 2-word sequences as the reference's"
    return _alarm("distinct", ratio, 1.0, threshold, high < 1 and len(now) >= MIN_PROMPTS, says)


def _opening(now: Records, start: Records, threshold: float) -> Row:
    sides = [[record["answer"] for record in side] for side in (now, start)]
    (share, text), (reference, usual) = (common_opening(texts) for texts in sides)
    # An answer whose opening has the words of the most common one, each side's own.
    begins = [[bool(most) and split_words(opening(answer)) == split_words(most) for answer in texts]
              for texts, most in zip(sides, (text, usual), strict=True)]  # fmt: skip
    threshold = max(threshold, reference + OPENING_MARGIN)
    says = f"{share:.0%} of the answers begin with {text!r}, {reference:.0%} of the reference's with {usual!r}"
    return _alarm("opening", share, reference, threshold, _differs(np.array(begins, dtype=np.float64)), says)


def _differs(both: np.ndarray) -> bool:
    """Tell whether the mean of the paired differences, (2, P), is beyond chance, at 99 %."""
    change = both[0] - both[1]
    interval = estimate_mean(change, level=0.01)
    return change.size >= MIN_PROMPTS and not interval.low <= 0 <= interval.high


def _alarm(
    alarm: str, value: float, start: float, threshold: float, sure: bool, says: str, beyond: bool | None = None
) -> Row:
    """`beyond`: by default, whether the value lies beyond the threshold, on the side away from the reference."""
    if beyond is None:
        beyond = value > threshold > start or value < threshold < start
    says += "; that may be chance" if beyond and not sure else ""
    numbers = {"value": value, "reference": start, "threshold": threshold}
    return {"alarm": alarm, **numbers, "raised": beyond and sure, "says": says}


def _unknown(alarm: str, threshold: float, why: str) -> Row:
    numbers = {"value": None, "reference": None, "threshold": threshold}
    return {"alarm": alarm, **numbers, "raised": False, "says": f"not judged: {why}"}
