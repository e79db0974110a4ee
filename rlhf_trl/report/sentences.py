"""What the numbers say, in the words of the report: each verdict follows from 95 % intervals, never from a mean alone.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def judge_gain(policy: Mapping[str, Any], gain: str = "reward_gain") -> str:
    """Say what a paired gain shows: `better`, `worse`, `same` (its interval holds 0), or `unscored`."""
    if gain not in policy:
        return "unscored"
    found = policy[gain]
    return "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "same"


def group_by_verdict(verdicts: Mapping[str, str]) -> dict[str, list[str]]:
    """Gather the policies of each verdict."""
    return {
        word: [name for name, verdict in verdicts.items() if verdict == word] for word in ("better", "worse", "same")
    }


def order_alarms(
    alarms: Sequence[Mapping[str, Any]], policies: Sequence[str]
) -> tuple[list[int], dict[str, list[int]]]:
    """Put the raised alarms before the others, each in the order of the policies.

    Returns:
        The places of all alarms in the list, and for each policy the places of those that it raised.
    """
    places = {name: place for place, name in enumerate(policies)}
    order = sorted(
        range(len(alarms)), key=lambda index: (not alarms[index]["raised"], places[alarms[index]["policy"]], index)
    )
    raised = {
        name: [index for index in order if alarms[index]["raised"] and alarms[index]["policy"] == name]
        for name in policies
    }
    return order, {name: found for name, found in raised.items() if found}
