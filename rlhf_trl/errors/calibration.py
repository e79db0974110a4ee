"""How far the confidence of a reward model can be believed, from arrays alone.

A margin d (score of the chosen answer minus score of the rejected one) says that the chosen answer wins with
probability sigma(d) (Bai et al. 2022, section 3.3). With the chosen answer always first, the outcome is always 1. So
each pair is counted in both orders, which is the same as comparing the confidence sigma(|d|) with how often the
preferred answer is the chosen one.
"""

import math
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from rlhf_trl.stats.intervals import Estimate
from rlhf_trl.stats.pairs import average, correct, share

SIMULATIONS = 1000
BINS = 10


def confidence(margins: np.ndarray) -> np.ndarray:
    """Give the probability that the model gives to the answer it prefers, sigma(|d|), 0.5 to 1. (N,) -> (N,)."""
    return expit(np.abs(margins))


def nll(margins: np.ndarray) -> np.ndarray:
    """Give the Bradley-Terry loss of each pair, -log sigma(d), in nats. (N,) -> (N,)."""
    return np.logaddexp(0.0, -margins)


def brier(margins: np.ndarray) -> np.ndarray:
    """Give the squared error of each pair's probability, (1 - sigma(d))^2; 0.25 for a coin. (N,) -> (N,)."""
    return expit(-margins) ** 2


def equal_mass(predicted: np.ndarray, bins: int) -> np.ndarray:
    """Edges of bins with about as many predictions each; fewer bins where many predictions are the same."""
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)))
    return edges if len(edges) > 1 else np.array([edges[0], edges[0]])


def bin_of(predicted: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Number the bin of each prediction from 0; a bin holds its lower edge, the last one both. (N,) -> (N,)."""
    return np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, len(edges) - 2)


def ece(predicted: np.ndarray, outcome: np.ndarray, edges: np.ndarray) -> float:
    """Give the expected calibration error (Naeini et al. 2015): the mean distance of predicted probability, (N,), and
    outcome, 0 to 1, (N,), over the bins, weighted by their sizes."""
    return float(np.abs(np.bincount(bin_of(predicted, edges), predicted - outcome)).sum()) / len(predicted)


def ece_if_calibrated(
    predicted: np.ndarray, outcome: np.ndarray, prompts: np.ndarray, edges: np.ndarray, seed: int
) -> Estimate:
    """Simulate the ECE that these predictions would show if they were right: mean and range of 95 % of the draws.

    It is above 0 by chance, the more so the fewer predictions; outcomes are drawn from the predictions (Bröcker and
    Smith 2007, consistency resampling). Where pairs of one prompt err together more than by chance, all is widened by
    the root of the design effect (Kish 1965).
    """
    n, random = len(predicted), np.random.default_rng(seed)
    errors = [ece(predicted, random.random(n) < predicted, edges) for _ in range(SIMULATIONS)]
    apart = predicted - outcome - np.mean(predicted - outcome)
    effect = _squared_sums(apart, prompts) / max(float((apart**2).sum()), 1e-300)
    low, high = np.quantile(errors, [0.025, 0.975])
    wider = math.sqrt(max(effect, 1.0))
    return Estimate(wider * float(np.mean(errors)), wider * float(low), wider * float(high), n)


def _squared_sums(values: np.ndarray, prompts: np.ndarray) -> float:
    """Square the sum over each prompt, and add: the variance of a sum whose values go together within a prompt."""
    return float((np.bincount(np.unique(prompts, return_inverse=True)[1], values) ** 2).sum())


def fit_temperature(margins: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Find the T for which sigma(d / T) has the least loss (Guo et al. 2017), with its 95 % interval.

    Above 1, the model is over-confident. The interval is a normal one on the scale of log T, with the prompt as the
    unit (White's sandwich). A ValueError says why no T does.
    """
    if len(margins) == 0 or not np.any(margins < 0):
        raise ValueError("no pair of this half is wrong, so that the loss falls for ever as T falls")
    if np.mean(margins) <= 0:
        raise ValueError("the margins are not positive on average, so that the loss falls for ever as T grows")

    def slope(sharpness: float) -> float:
        """Derivative of the mean loss by 1 / T; it rises."""
        return float(np.mean(-margins * expit(-sharpness * margins)))

    # In units of the largest margin, so that the search works on every scale.
    high = 1.0 / float(np.abs(margins).max())
    while slope(high) < 0:
        high *= 2
    sharpness = float(brentq(slope, 0.0, high, xtol=1e-12 * high, rtol=1e-12))
    right = expit(sharpness * margins)
    error = math.sqrt(_squared_sums(margins * (1 - right), prompts)) / np.sum(margins**2 * right * (1 - right))
    if not error < 100 * sharpness:
        raise ValueError("the margins are hardly positive on average, so that the temperature could be any")
    spread = math.exp(1.96 * error / sharpness)
    return Estimate(1 / sharpness, 1 / sharpness / spread, spread / sharpness, len(margins))


def describe_calibration(margin: np.ndarray, prompts: np.ndarray, fits: np.ndarray, seed: int) -> dict[str, Any]:
    """Compare confidence with accuracy, and see what one temperature would mend, fitted on the half of the prompts
    that `fits` marks; all arrays are (N,)."""
    sure, right = confidence(margin), correct(margin)
    edges = equal_mass(sure, BINS)
    bins = bin_of(sure, edges)
    table = [
        {"from": float(edges[number]), "to": float(edges[number + 1]), "n": int(inside.sum()),
         "predicted": float(sure[inside].mean()), "observed": share(right[inside], prompts[inside]).as_dict()}
        for number, inside in ((number, bins == number) for number in np.unique(bins))
    ]  # fmt: skip
    by_chance = ece_if_calibrated(sure, right, prompts, edges, seed).as_dict()
    return {
        "tables": {"equal_mass": table},
        "errors": {"equal_mass": {"ece": ece(sure, right, edges), "if_calibrated": by_chance}},
        "confidence": average(sure, prompts).as_dict(),
        "gap": average(sure - right, prompts).as_dict(),
        "temperature": _try_temperature(margin, prompts, fits, seed),
    }


def _try_temperature(margins: np.ndarray, prompts: np.ndarray, fits: np.ndarray, seed: int) -> dict[str, Any]:
    """Fit a temperature on the margins of one half of the prompts, and describe the other half before and after."""
    margin, units = margins[~fits], prompts[~fits]
    try:
        if not len(margin):
            raise ValueError("all prompts fell into one half")
        fitted = fit_temperature(margins[fits], prompts[fits])
    except ValueError as error:
        return {"temperature": None, "why_not": str(error)}

    def describe(margin: np.ndarray) -> dict[str, Any]:
        sure, right = confidence(margin), correct(margin)
        edges = equal_mass(sure, BINS)
        return {
            "nll": average(nll(margin), units).as_dict(),
            "brier": average(brier(margin), units).as_dict(),
            "ece": ece(sure, right, edges),
            "ece_if_calibrated": ece_if_calibrated(sure, right, units, edges, seed).as_dict(),
        }

    scaled = margin / fitted.mean
    change = average(nll(scaled) - nll(margin), units).as_dict()
    return {"temperature": fitted.as_dict(), "measured_on": len(margin), "nll_change": change,
            "before": describe(margin), "after": describe(scaled)}  # fmt: skip
