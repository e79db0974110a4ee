"""The numbers of the evaluation as `evaluate.Metric` classes that work without a network, for use in other programs.

    PairAccuracy().compute(chosen=[1.5, 0.2], rejected=[0.5, 0.4])

Each takes lists, calls the functions that the step `errors` calls, and returns numbers and estimates (`mean`, `low`,
`high`, `n`; 95 %). Nothing is written: the rows stay in memory. Empty input is a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from rlhf_trl.errors import calibration
from rlhf_trl.errors.pair_statistics import average, correct, gap, length_bias, share

SEED = 0
FLOAT = datasets.Value("float64")
INTEGER = datasets.Value("int64")
SCORES = {"chosen": FLOAT, "rejected": FLOAT}


def _info(description: str, inputs: str, features: dict[str, Any]) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=datasets.Features(features)
    )


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
    """How often the chosen answer has the higher score.

    >>> found = PairAccuracy().compute(chosen=[2.0, 0.5, 1.0, 3.0], rejected=[1.0, 0.5, 2.0, 0.0])
    >>> found["accuracy"]["mean"], found["strict"]["mean"], found["ties"]
    (0.625, 0.5, 1)
    """

    def __init__(self, keep_in_memory: bool = True, **options: Any):
        super().__init__(keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        inputs = "chosen, rejected: scores of the two answers of each pair."
        return _info("Accuracy on labelled pairs, ties half, with Wilson's interval.", inputs, SCORES)

    def _compute(self, chosen: list[float], rejected: list[float]) -> dict[str, Any]:
        margin = gap(_columns(chosen, rejected))
        pairs = np.arange(len(margin))
        return {
            "accuracy": share(correct(margin), pairs).as_dict(),
            "strict": share(margin > 0, pairs).as_dict(),
            "ties": int(np.sum(margin == 0)),
        }


class PairCalibration(evaluate.Metric):
    """How far sigma(chosen - rejected) can be believed as the probability that the chosen answer wins.

    Each pair counts in both orders, so that the errors do not depend on which answer comes first.

    >>> found = PairCalibration().compute(chosen=[0.0, 1.0, 2.0], rejected=[1.0, 0.0, 0.0], bins=1)
    >>> round(found["nll"]["mean"], 4), round(found["brier"]["mean"], 4), round(found["ece"], 4)
    (0.5845, 0.207, 0.1143)
    """

    def __init__(self, keep_in_memory: bool = True, **options: Any):
        super().__init__(keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        inputs = "chosen, rejected: scores of the two answers of each pair; bins: of the same number of pairs."
        return _info("Calibration errors, loss and Brier score of a reward model.", inputs, SCORES)

    def _compute(self, chosen: list[float], rejected: list[float], bins: int = 10) -> dict[str, Any]:
        margin = gap(_columns(chosen, rejected))
        pairs, confidence, right = np.arange(len(margin)), calibration.confidence(margin), correct(margin)
        edges = calibration.equal_mass(confidence, bins)
        return {
            **calibration.calibration_errors(confidence, right, edges),
            "ece_if_calibrated": calibration.ece_if_calibrated(confidence, edges, SEED).as_dict(),
            "brier": average(calibration.brier(margin), pairs, SEED).as_dict(),
            "nll": average(calibration.nll(margin), pairs, SEED).as_dict(),
            "expected_accuracy": average(confidence, pairs, SEED).as_dict(),
            "over_confidence": average(confidence - right, pairs, SEED).as_dict(),
        }


class LengthBias(evaluate.Metric):
    """What the lengths of the answers have to do with their scores.

    >>> found = LengthBias().compute(
    ...     chosen=[1.0, 0.0], rejected=[0.0, 1.0], chosen_length=[9, 5], rejected_length=[4, 7]
    ... )
    >>> found["prefers_longer"]["model"]["mean"], found["prefers_longer"]["humans"]["mean"]
    (1.0, 0.5)
    """

    def __init__(self, keep_in_memory: bool = True, **options: Any):
        super().__init__(keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        inputs = "chosen, rejected: scores; chosen_length, rejected_length: in any one unit."
        lengths = {"chosen_length": INTEGER, "rejected_length": INTEGER}
        return _info("Length bias of a reward model on labelled pairs.", inputs, SCORES | lengths)

    def _compute(
        self, chosen: list[float], rejected: list[float], chosen_length: list[int], rejected_length: list[int]
    ) -> dict[str, Any]:
        scores, lengths = _columns(chosen, rejected), _columns(chosen_length, rejected_length)
        return length_bias(scores, lengths, np.arange(len(scores)), SEED)


class SampledKL(evaluate.Metric):
    """The KL of a policy to a reference, estimated from answers that were sampled from the policy.

    >>> found = SampledKL().compute(policy=[[-1.0, -2.0], [-0.5]], reference=[[-1.5, -2.0], [-0.25]])
    >>> found["k1"]["mean"], round(found["k3"]["mean"], 4)
    (0.125, 0.0703)
    """

    def __init__(self, keep_in_memory: bool = True, **options: Any):
        super().__init__(keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        inputs = "policy, reference: log-probabilities of each answer's tokens, end token included, nats."
        tokens = datasets.Sequence(FLOAT)
        description = "k1 and k3 (Schulman 2020), summed over an answer's tokens, nats per answer; mean over answers."
        return _info(description, inputs, {"policy": tokens, "reference": tokens})

    def _compute(self, policy: list[list[float]], reference: list[list[float]]) -> dict[str, Any]:
        if not policy:
            raise ValueError("the metric needs at least one row")
        k1, k3 = [], []
        for ours, theirs in zip(policy, reference, strict=True):
            if len(ours) != len(theirs):
                raise ValueError(f"an answer has {len(ours)} tokens in `policy` and {len(theirs)} in `reference`")
            log_ratio = -gap(_columns(ours, theirs))
            k1.append(float(-log_ratio.sum()))
            k3.append(float((np.expm1(log_ratio) - log_ratio).sum()))
        answers = np.arange(len(k1))
        estimates = {"k1": average(np.array(k1), answers, SEED), "k3": average(np.array(k3), answers, SEED)}
        return {name: estimate.as_dict() for name, estimate in estimates.items()}
