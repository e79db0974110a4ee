"""What the verdicts and the intervals are worth: a small part of `simulate.py`, which `make simulate` runs whole."""

from __future__ import annotations

import pytest
from simulate import DESIGNS, POWER, SHAPES, TRAPS, Outcome, cover_means, cover_rates, cover_seeds, simulate

# Of so few experiments, 5 % and three Monte Carlo standard errors.
FEW, MOST_FALSE = 60, 0.135


@pytest.mark.parametrize("design", DESIGNS, ids=[design.name for design in DESIGNS])
def test_no_design_without_a_difference_has_a_winner_too_often(design):
    found: Outcome = simulate(design, FEW)
    if design.alike:
        assert found.winner <= MOST_FALSE
    # A run that only went further does score higher as trained.
    if design.alike and "further" not in design.name:
        assert found.better <= MOST_FALSE
    if design.seeds == 1:
        assert found.about_methods == 0


@pytest.mark.parametrize("design", TRAPS, ids=[design.name for design in TRAPS])
def test_the_traps_never_name_the_wrong_one(design):
    found = simulate(design, 20)
    assert found.winner == 0
    assert found.named == bool(design.winners)


def test_a_difference_of_three_tenths_is_found():
    one, three = (simulate(design, FEW) for design in POWER)
    assert one.better >= 0.65
    assert three.better >= 0.8


@pytest.mark.parametrize("shape", [*SHAPES])
def test_intervals_of_means_hold(shape):
    assert 0.9 <= cover_means(shape, 20, 400) <= 0.99


def test_intervals_of_win_rates_and_of_seeds_hold():
    assert cover_rates(0.9, 20, 400) >= 0.9
    assert cover_seeds(2, 3.0, 300) >= 0.9
