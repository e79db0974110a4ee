"""Accuracy and calibration as `evaluate.Metric` classes that work without a network, for use in other programs.

    PairAccuracy().compute(chosen=[1.5, 0.2], rejected=[0.5, 0.4])

Both take the scores of each pair's answers, call the functions that the step `errors` calls, and return numbers and
estimates (`mean`, `low`, `high`, `n`; 95 %). Nothing is written: the rows stay in memory.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from rlhf_trl.errors import calibration
from rlhf_trl.stats.pairs import average, correct, share


class PairMetric(evaluate.Metric):
    """A metric of the scores `chosen` and `rejected`."""

    def __init__(self, **options: Any):
        super().__init__(**options, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(dict.fromkeys(("chosen", "rejected"), datasets.Value("float64")))
        words = str(type(self).__doc__)
        return evaluate.MetricInfo(words, citation="", inputs_description=words, features=features)


def _margins(chosen: list[float], rejected: list[float]) -> np.ndarray:
    """Subtract the scores, (N,) each; ValueError without rows, or where a score is not finite."""
    margin = np.array(chosen, dtype=float) - np.array(rejected, dtype=float)
    if margin.size == 0:
        raise ValueError("the metric needs at least one row")
    if not np.isfinite(margin).all():
        raise ValueError(f"{int((~np.isfinite(margin)).sum())} rows hold a score that is not finite")
    return margin


class PairAccuracy(PairMetric):
    """How often the chosen answer has the higher score, ties half, with Wilson's interval.

    >>> found = PairAccuracy().compute(chosen=[2.0, 0.5, 1.0, 3.0], rejected=[1.0, 0.5, 2.0, 0.0])
    >>> found["accuracy"]["mean"], found["strict"]["mean"], found["ties"]
    (0.625, 0.5, 1)
    """

    def _compute(self, chosen: list[float], rejected: list[float]) -> dict[str, Any]:
        margin = _margins(chosen, rejected)
        pairs = np.arange(len(margin))
        accuracy, strict = (share(right, pairs).as_dict() for right in (correct(margin), margin > 0))
        return {"accuracy": accuracy, "strict": strict, "ties": int(np.sum(margin == 0))}


class PairCalibration(PairMetric):
    """How far sigma(chosen - rejected) can be believed as the probability that the chosen answer wins.

    Each pair counts in both orders, so that the errors do not depend on which answer comes first; `bins` hold the same
    number of pairs.

    >>> found = PairCalibration().compute(chosen=[0.0, 1.0, 2.0], rejected=[1.0, 0.0, 0.0], bins=1)
    >>> round(found["nll"]["mean"], 4), round(found["brier"]["mean"], 4), round(found["ece"], 4)
    (0.5845, 0.207, 0.1143)
    """

    def _compute(self, chosen: list[float], rejected: list[float], bins: int = 10) -> dict[str, Any]:
        margin = _margins(chosen, rejected)
        sure, right = calibration.confidence(margin), correct(margin)
        means = {"brier": calibration.brier(margin), "nll": calibration.nll(margin), "over_confidence": sure - right}
        return {
            "ece": calibration.ece(sure, right, calibration.equal_mass(sure, bins)),
            **{name: average(values, np.arange(len(values))).as_dict() for name, values in means.items()},
        }
