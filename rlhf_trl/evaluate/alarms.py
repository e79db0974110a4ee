"""The state of a policy's texts, without labels: refusals, unsafe patterns, repetition, diversity, and alarms.

Reads and writes nothing; takes the records of `evaluation/completions-<policy>.jsonl`. Everything about the texts is
lexical (`rlhf_trl.text.words` says what a word is): it counts what the words show and does not judge what they mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_trl.recipe.schema import Alarms
from rlhf_trl.stats.intervals import estimate_mean, wilson
from rlhf_trl.text.refusals import refuses
from rlhf_trl.text.words import common_opening, compare_distinct, distinct, opening, repetition, split_words

Records = Sequence[Mapping[str, Any]]

# n-grams drawn for the diversity of one policy's answers, for each answer.
DRAW = 8
# From fewer prompts a bootstrap interval is too narrow to raise an alarm on.
MIN_PROMPTS = 10
# How far the share of the most common opening must lie above the reference's.
OPENING_MARGIN = 0.1


def measure_text(records: Records) -> dict[str, Any]:
    """Describe the answers of one policy; the order of the records does not matter.

    `repetition` is the mean share of repeated 4-grams within an answer; `distinct_n` the share of different n-grams
    among 8 for each answer, drawn from all (`words.distinct`), null where they hold fewer; `common_opening` the most
    common first five words and their share. The others are shares: `identical_answers` equal another one word by word,
    `empty` have no word, `refusal` open with a plain refusal, `cut` reached the limit. `words` is the mean length.

    Raises:
        ValueError: there are no records.
    """
    texts = [record["answer"] for record in records]
    words = [split_words(text) for text in texts]
    copies = Counter(tuple(answer) for answer in words)
    lengths = sorted(sum(word[0].isalnum() for word in answer) for answer in words)
    share, text = common_opening(texts) if texts else (0.0, "")
    return {
        "repetition": estimate_mean(sorted(map(repetition, texts))).as_dict(),
        **{f"distinct_{n}": distinct(texts, n, DRAW * len(texts)) for n in (1, 2, 3)},
        "common_opening": {"share": share, "text": text},
        "identical_answers": sum(many for answer, many in copies.items() if many > 1) / len(texts),
        "empty": copies[()] / len(texts),
        "refusal": wilson(sum(map(refuses, texts)), len(texts)).as_dict(),
        "cut": wilson(sum(not record["finished"] for record in records), len(texts)).as_dict(),
        "words": estimate_mean(lengths).as_dict(),
    }


def raise_alarms(policies: Mapping[str, Records], reference: Records, thresholds: Alarms) -> list[dict[str, Any]]:
    """Compare each policy with the reference on the same prompts; list every alarm, raised or not.

    Each entry has `policy`, `alarm`, `value`, `reference`, `threshold`, `raised` and `says`, one sentence. The three
    numbers have one unit (a ratio's reference is 1); an alarm that cannot be judged has nulls and says why. An alarm
    is raised when the value lies beyond the threshold *and* the interval of the paired difference, over at least 10
    prompts, excludes no change. Its level is 99 %, because about ten alarms are judged for a policy. Records are
    paired by `id`.

    - `gold`: the reward rises and the gold reward falls by more than `gold_drop`, both by their 95 % intervals;
    - `length`: mean tokens of an answer, either way; `cut`: answers at the limit; `entropy`: mean over the tokens;
    - `repetition`: repeated 4-grams within an answer; `distinct`: different 2-grams over all answers;
    - `opening`: share with the policy's most common opening; it must also lie 0.1 above the reference's own;
    - `refusal:<subset>`: share of plain refusals, either way, beyond both the reference's and the chosen answers';
    - `kl`: mean KL to the reference, nats per answer.

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


def _compare(now: Records, start: Records, limits: Alarms) -> list[dict[str, Any]]:
    """Judge every alarm of one policy; both sides' records lie in the same order of prompts."""

    def both(of: Callable[[Mapping[str, Any]], float]) -> np.ndarray:
        """One number of every answer, (2, P): the policy's, the reference's."""
        return np.array([[of(record) for record in side] for side in (now, start)], dtype=np.float64)

    tokens, entropy = both(lambda record: record["answer_tokens"]), both(lambda record: record["entropy"])
    cut, refusing = both(lambda record: not record["finished"]), both(lambda record: refuses(record["answer"]))
    repeated = both(lambda record: repetition(record["answer"]))
    subsets = np.array([record["subset"] for record in start])
    wanted = np.array([record["chosen_refuses"] for record in start], dtype=np.float64)
    longer, shorter = limits.length_ratio, 1 / limits.length_ratio
    repeats = "of the 4-word sequences in an answer are repeats"
    return [
        _gold(now, 0.0 - limits.gold_drop),  # no -0.0 in the file
        _by_ratio("length", tokens, shorter, longer, "answers are {:.2f} times as long as the reference's"),
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
        _kl(now, limits.kl),
    ]  # fmt: skip


def _kl(now: Records, threshold: float) -> dict[str, Any]:
    kl = np.array([record["kl"] for record in now], dtype=np.float64)
    mean, sure = float(kl.mean()), _differs(np.stack([kl, np.zeros_like(kl)]))
    return _alarm("kl", mean, 0.0, threshold, mean > threshold, sure, f"the KL to it is {mean:.3g} nats per answer")


def _gold(now: Records, threshold: float) -> dict[str, Any]:
    for key, model in (("reward_gain", "reward model"), ("gold_gain", "gold reward model")):
        if key not in now[0]:
            return _unknown("gold", threshold, f"there is no {model}")
    reward, gold = (estimate_mean([record[key] for record in now]) for key in ("reward_gain", "gold_gain"))
    says = f"the reward changes by {reward.mean:+.3g}, the gold reward by {gold.mean:+.3g}"
    beyond = reward.mean > 0 and gold.mean < threshold
    sure = reward.low > 0 and gold.high < threshold and len(now) >= MIN_PROMPTS
    return _alarm("gold", gold.mean, 0.0, threshold, beyond, sure, says)


def _by_ratio(alarm: str, both: np.ndarray, low: float, high: float | None, says: str) -> dict[str, Any]:
    """Compare two means, (2, P), as a ratio; without `high`, only a fall counts."""
    now, start = both.mean(axis=1).tolist()
    if start == 0:
        return _unknown(alarm, high or low, "the reference's mean is 0")
    ratio = now / start
    threshold = low if high is None or ratio < 1 else high
    return _alarm(alarm, ratio, 1.0, threshold, _is_beyond(ratio, threshold, 1.0), _differs(both), says.format(ratio))


def _by_rise(alarm: str, both: np.ndarray, rise: float, what: str, wanted: float | None = None) -> dict[str, Any]:
    """Compare two mean shares, (2, P), by their difference. With `wanted`, the share of the chosen answers, a fall
    counts like a rise, and a change towards `wanted` does not count."""
    now, start = both.mean(axis=1).tolist()
    threshold = start + rise
    if wanted is not None:
        threshold = min(start, wanted) - rise if now < start else max(start, wanted) + rise
    says = f"{now:.0%} {what}, {start:.0%} of the reference's"
    says += "" if wanted is None else f" and {wanted:.0%} of the chosen answers"
    return _alarm(alarm, now, start, threshold, _is_beyond(now, threshold, start), _differs(both), says)


def _is_beyond(value: float, threshold: float, reference: float) -> bool:
    """Tell whether a value lies beyond its threshold, on the side away from the reference."""
    return value > threshold > reference or value < threshold < reference


def _distinct(now: Records, start: Records, threshold: float) -> dict[str, Any]:
    compared = compare_distinct([record["answer"] for record in now], [record["answer"] for record in start])
    if compared is None:
        return _unknown("distinct", threshold, "the answers are too short to compare")
    ratio, _, high = compared
    says = f"the answers together hold {ratio:.2f} times as many different 2-word sequences as the reference's"
    return _alarm("distinct", ratio, 1.0, threshold, ratio < threshold, high < 1 and len(now) >= MIN_PROMPTS, says)


def _opening(now: Records, start: Records, threshold: float) -> dict[str, Any]:
    sides = [[record["answer"] for record in side] for side in (now, start)]
    (share, text), (reference, usual) = (common_opening(texts) for texts in sides)
    # An answer whose opening has the words of the most common one, each side's own.
    begins = [[bool(most) and split_words(opening(answer)) == split_words(most) for answer in texts]
              for texts, most in zip(sides, (text, usual), strict=True)]  # fmt: skip
    threshold = max(threshold, reference + OPENING_MARGIN)
    says = f"{share:.0%} of the answers begin with {text!r}, {reference:.0%} of the reference's with {usual!r}"
    sure = _differs(np.array(begins, dtype=np.float64))
    return _alarm("opening", share, reference, threshold, share > threshold, sure, says)


def _differs(both: np.ndarray) -> bool:
    """Tell whether the mean of the paired differences, (2, P), is beyond chance, at 99 %."""
    change = both[0] - both[1]
    if change.size < MIN_PROMPTS:
        return False
    interval = estimate_mean(change, level=0.01)
    return not interval.low <= 0 <= interval.high


def _alarm(
    alarm: str, value: float | None, reference: float | None, threshold: float, beyond: bool, sure: bool, says: str
) -> dict[str, Any]:
    says += "; that may be chance" if beyond and not sure else ""
    numbers = {"value": value, "reference": reference, "threshold": threshold}
    return {"alarm": alarm, **numbers, "raised": beyond and sure, "says": says}


def _unknown(alarm: str, threshold: float, why: str) -> dict[str, Any]:
    return _alarm(alarm, None, None, threshold, False, False, f"not judged: {why}")
