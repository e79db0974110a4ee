"""The numbers of the evaluation as `evaluate.Metric` classes that work without a network, for use in other programs.

    PairAccuracy().compute(chosen=[1.5, 0.2], rejected=[0.5, 0.4])

Each takes lists, calls the functions that the step `errors` calls, and returns numbers and estimates (`mean`, `low`,
`high`, `n`; 95 %). Nothing is written: the rows stay in memory. Empty input is a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partialmethod
from typing import Any

import datasets
import evaluate
import numpy as np

from rlhf_trl.errors import calibration
from rlhf_trl.errors.pair_statistics import length_bias
from rlhf_trl.stats.pairs import average, correct, gap, share

SEED = 0
FLOAT = datasets.Value("float64")
SCORES = {"chosen": FLOAT, "rejected": FLOAT}
LENGTHS = dict.fromkeys(("chosen_length", "rejected_length"), datasets.Value("int64"))
TOKENS = dict.fromkeys(("policy", "reference"), datasets.Sequence(FLOAT))

_in_memory = partialmethod(evaluate.Metric.__init__, keep_in_memory=True)


def _info(features: dict[str, Any]) -> Callable[[evaluate.Metric], evaluate.MetricInfo]:
    """Build a metric's `_info` from its inputs; the docstring of its class describes them."""

    def info(metric: evaluate.Metric) -> evaluate.MetricInfo:
        words = str(metric.__doc__)
        return evaluate.MetricInfo(words, citation="", inputs_description=words, features=datasets.Features(features))

    return info


def _columns(*values: Sequence[float]) -> np.ndarray:
    """Lay lists side by side, shape (N, columns).

    Raises:
        ValueError: there are no rows, or a value is not finite.
    """
    array = np.array(values, dtype=float).T
    if array.size == 0:
        raise ValueError("the metric needs at least one row")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).any(axis=1).sum())} rows hold a value that is not finite")
    return array


class PairAccuracy(evaluate.Metric):
    """How often the chosen answer has the higher score, ties half, with Wilson's interval; `chosen` and `rejected` are
    the scores of each pair's answers.

    >>> found = PairAccuracy().compute(chosen=[2.0, 0.5, 1.0, 3.0], rejected=[1.0, 0.5, 2.0, 0.0])
    >>> found["accuracy"]["mean"], found["strict"]["mean"], found["ties"]
    (0.625, 0.5, 1)
    """

    __init__ = _in_memory
    _info = _info(SCORES)

    def _compute(self, chosen: list[float], rejected: list[float]) -> dict[str, Any]:
        margin = gap(_columns(chosen, rejected))
        pairs = np.arange(len(margin))
        accuracy, strict = (share(right, pairs).as_dict() for right in (correct(margin), margin > 0))
        return {"accuracy": accuracy, "strict": strict, "ties": int(np.sum(margin == 0))}


class PairCalibration(evaluate.Metric):
    """How far sigma(chosen - rejected) can be believed as the probability that the chosen answer wins.

    Each pair counts in both orders, so that the errors do not depend on which answer comes first; `bins` hold the same
    number of pairs.

    >>> found = PairCalibration().compute(chosen=[0.0, 1.0, 2.0], rejected=[1.0, 0.0, 0.0], bins=1)
    >>> round(found["nll"]["mean"], 4), round(found["brier"]["mean"], 4), round(found["ece"], 4)
    (0.5845, 0.207, 0.1143)
    """

    __init__ = _in_memory
    _info = _info(SCORES)

    def _compute(self, chosen: list[float], rejected: list[float], bins: int = 10) -> dict[str, Any]:
        margin = gap(_columns(chosen, rejected))
        confidence, right = calibration.confidence(margin), correct(margin)
        edges = calibration.equal_mass(confidence, bins)
        means = {
            "brier": calibration.brier(margin),
            "nll": calibration.nll(margin),
            "expected_accuracy": confidence,
            "over_confidence": confidence - right,
        }
        return {
            **calibration.calibration_errors(confidence, right, edges),
            "ece_if_calibrated": calibration.ece_if_calibrated(confidence, edges, SEED).as_dict(),
            **{name: average(values, np.arange(len(values))).as_dict() for name, values in means.items()},
        }


class LengthBias(evaluate.Metric):
    """What the lengths of the answers, in any one unit, have to do with their scores.

    >>> found = LengthBias().compute(
    ...     chosen=[1.0, 0.0], rejected=[0.0, 1.0], chosen_length=[9, 5], rejected_length=[4, 7]
    ... )
    >>> found["prefers_longer"]["model"]["mean"], found["prefers_longer"]["humans"]["mean"]
    (1.0, 0.5)
    """

    __init__ = _in_memory
    _info = _info(SCORES | LENGTHS)

    def _compute(
        self, chosen: list[float], rejected: list[float], chosen_length: list[int], rejected_length: list[int]
    ) -> dict[str, Any]:
        scores, lengths = _columns(chosen, rejected), _columns(chosen_length, rejected_length)
        return length_bias(scores, lengths, np.arange(len(scores)))


class SampledKL(evaluate.Metric):
    """The KL of a policy to a reference, estimated from the log-probabilities of answers sampled from the policy.

    k1 and k3 (Schulman 2020), summed over an answer's tokens (end token included), nats per answer; mean over answers.

    >>> found = SampledKL().compute(policy=[[-1.0, -2.0], [-0.5]], reference=[[-1.5, -2.0], [-0.25]])
    >>> found["k1"]["mean"], round(found["k3"]["mean"], 4)
    (0.125, 0.0703)
    """

    __init__ = _in_memory
    _info = _info(TOKENS)

    def _compute(self, policy: list[list[float]], reference: list[list[float]]) -> dict[str, Any]:
        if not policy:
            raise ValueError("the metric needs at least one row")
        sums = []
        for ours, theirs in zip(policy, reference, strict=True):
            if len(ours) != len(theirs):
                raise ValueError(f"an answer has {len(ours)} tokens in `policy` and {len(theirs)} in `reference`")
            log_ratio = -gap(_columns(ours, theirs))
            sums.append([-log_ratio.sum(), (np.expm1(log_ratio) - log_ratio).sum()])
        k1, k3 = (average(column, np.arange(len(sums))).as_dict() for column in np.array(sums).T)
        return {"k1": k1, "k3": k3}
