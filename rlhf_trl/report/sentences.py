"""Turn a run's numbers into the report's verdicts and sentences, each from a 95 % interval, never from a mean alone.

Works on the content of `metrics.json`, `over_optimisation.json` and `winrate.json`; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_trl.run.layout import REFERENCE
from rlhf_trl.stats.trust import weigh_trust

POINT = 0.01  # one percentage point of a win rate
CONSISTENT = 0.8
# Habit of a judge -> its title, the format of its number, the level that its interval is held against, and what an
# interval above, below, around this level means.
HABITS: dict[str, tuple[str, str, float, tuple[str, str, str]]] = {
    "consistency": (
        "Same verdict in both orders", "share", 0.5,
        ("It changes some verdicts when the answers change places: those went by the place.",
         "It changes its verdict more often than not when the answers change places.",
         "It keeps to its verdict no more surely than a coin when the answers change places."),
    ),
    "first_share": (
        "First place among the winners", "share", 0.5,
        ("It favours the answer shown first; as both orders count, this dulls win rates but tilts none.",
         "It favours the answer shown second; as both orders count, this dulls win rates but tilts none.",
         "No preference for a place is seen."),
    ),
    "invalid_rate": (
        "Replies without a verdict", "share", 0.0,
        ("Replies that name neither a winner nor a tie are left out; none is counted as a tie.",) * 3,
    ),
    "tie_rate": (
        "Ties", "share", 0.0, ("Verdicts that name no winner; each counts as half a win.",) * 3,
    ),
    "prefers_longer": (
        "The longer answer wins", "share", 0.5,
        ("The longer answer wins more often than not: because it is better, or because it is longer. "
         "The win rate at equal length is the one to read.",
         "The shorter answer wins more often than not.",
         "No preference for longer or shorter answers is seen."),
    ),
    "difference": (
        "Gained by a note to the judge", "difference", 0.0,
        ("A note such as “this answer is the better one” sways it: a policy could learn to write such notes.",
         "It holds such a note against the answer.",
         "No effect of such notes is seen in these few pairs."),
    ),
}  # fmt: skip


def judge_share(share: Mapping[str, Any], level: float = 0.5) -> str:
    """Say what a share shows: `better` or `worse` where its interval is clear of `level`, `same`, or `unknown`."""
    if share["mean"] is None:
        return "unknown"
    return "better" if share["low"] > level else "worse" if share["high"] < level else "same"


def judge_gain(policy: Mapping[str, Any], claims: Mapping[str, Mapping[str, Any]], score: str) -> str:
    """Say what a gain over the reference shows: `better`, `worse`, or `same` (no significant difference that matters,
    or not tested); `unscored` without a gain.

    Args:
        policy: its entry in `metrics.json`.
        claims: its entry of `against_reference` in `comparison_results.json`, corrected together with all others.
        score: `reward` or `gold`.
    """
    if f"{score}_gain" not in policy:
        return "unscored"
    outcome = claims.get(score, {}).get("outcome")
    return outcome if outcome in ("better", "worse") else "same"


def order_alarms(alarms: Sequence[Mapping[str, Any]], policies: Sequence[str]) -> list[int]:
    """List the places of the alarms: the raised ones first, then in the order of the policies."""
    keys = [(not alarm["raised"], policies.index(alarm["policy"]), place) for place, alarm in enumerate(alarms)]
    return [place for *_, place in sorted(keys)]


def view_judge(result: Mapping[str, Any] | None, policies: Sequence[str]) -> dict[str, Any] | None:
    """Gather what the page says about the judge; None without one.

    Returns:
        `kind`, `status` and `trust` (`weigh_trust`); `lines`, for each policy that was compared with the reference the
        place of its win rate and what it shows; `all_pairs`, whether policies were compared with each other, too;
        `habits` (`read_habits`). A judge that was not run has neither of the last two.
    """
    if result is None:
        return None
    kind = result["judge"]["kind"]
    if result["status"] == "not run":
        return {"kind": kind, "status": "not run", "trust": "none", "lines": {}}
    lines = {
        entry["a"]: {
            "at": at,
            "verdict": judge_share(entry["win_rate"]),
            "controlled": shows_length(entry["length_controlled"]),
        }
        for at, entry in enumerate(result["win_rates"])
        if entry["b"] == REFERENCE and entry["a"] in policies
    }
    all_pairs = any(entry["b"] != REFERENCE for entry in result["win_rates"])
    shown = {"kind": kind, "status": result["status"], "trust": weigh_trust(result), "lines": lines}
    return {**shown, "all_pairs": all_pairs, "habits": read_habits(result)}


def shows_length(rate: Mapping[str, Any]) -> bool:
    """Tell whether the length-controlled win rate belongs beside the raw one: it has a warning, or is a point off."""
    plain, controlled = rate["raw"]["mean"], rate["length_controlled"]["mean"]
    return plain is not None and (bool(rate["warnings"]) or abs(controlled - plain) >= POINT)


def read_habits(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Read the judge's habits, of its kind: `key` of the number, `title`, `style` and what it `says`."""
    estimates = {**result["habits"], **(result["canaries"] or {})}
    hidden = () if result["judge"]["kind"] == "openai" else ("consistency", "first_share", "invalid_rate")
    habits = []
    for key, (title, style, level, meanings) in HABITS.items():
        if key not in estimates or key in hidden:  # a judge that scores each answer by itself knows no order
            continue
        estimate = estimates[key]
        verdict = judge_share(estimate, level)
        says = dict(zip(("better", "worse", "same"), meanings, strict=True)).get(
            verdict, "Nothing can be said about it."
        )
        if key == "consistency" and verdict == "better" and estimate["low"] > CONSISTENT:
            says = "It seldom changes its verdict when the answers change places."
        if key == "invalid_rate" and estimate["mean"] == 0:
            says = "Every reply had a verdict."
        habits.append({"key": key, "title": title, "style": style, "says": says})
    return habits
