"""Logistic regression on many resamples of the same rows at once: a library's 2,000 fits would take seconds."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

ITERATIONS, HALVINGS = 100, 30
# Added to the information, so that a direction that the rows say nothing about stays where it is.
DAMPING = 1e-9


def fit_logistic(design: np.ndarray, successes: np.ndarray, totals: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """Fit log-odds = design @ coefficients to each of R sets of counts with Newton's method.

    Args:
        design: the same N rows for every set, (N, k).
        successes, totals: counts, which may be fractions, (R, N) each.
        ridge: precision of a normal prior around 0 on each coefficient, 0 for none, (k,).

    Returns:
        The coefficients, (R, k). Where no finite ones fit best, large ones that fit about as well as any.

    Raises:
        ArithmeticError: a fit does not settle.
    """
    k = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).reshape(-1, k * k)
    tolerance = 1e-8 * np.maximum(totals.sum(axis=1, keepdims=True), 1.0)
    found = np.zeros((len(successes), k))

    def loss(coefficients: np.ndarray) -> np.ndarray:
        """Negative log-likelihood and prior of each set, (R, k) -> (R,)."""
        odds = coefficients @ design.T
        fit = (totals * np.logaddexp(0.0, odds) - successes * odds).sum(axis=1)
        return fit + (ridge * coefficients**2).sum(axis=1) / 2

    for _ in range(ITERATIONS):
        chance = expit(found @ design.T)
        gradient = (successes - totals * chance) @ design - ridge * found
        if (np.abs(gradient) <= tolerance).all():
            return found
        information = ((totals * chance * (1 - chance)) @ products).reshape(-1, k, k) + np.diag(ridge + DAMPING)
        step = np.linalg.solve(information, gradient[:, :, None])[:, :, 0]
        before = loss(found)
        for _ in range(HALVINGS):
            worse = loss(found + step) > before + 1e-12 * np.abs(before)
            if not worse.any():
                break
            step[worse] /= 2
        found += step
    raise ArithmeticError(f"a logistic fit does not settle in {ITERATIONS} steps")
