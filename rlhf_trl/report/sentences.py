"""Turn a run's numbers into the report's verdicts and sentences, each from a 95 % interval, never from a mean alone.

Works on the content of `metrics.json`, `over_optimisation.json` and `winrate.json`; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_trl.run.layout import REFERENCE
from rlhf_trl.stats.trust import weigh_trust

POINT = 0.01  # one percentage point of a win rate


def judge_gain(policy: Mapping[str, Any], claims: Mapping[str, Mapping[str, Any]], score: str) -> str:
    """Say what a gain over the reference shows: `better` or `worse`, `same` (no significant difference that matters,
    or too few prompts), or `unscored`.

    Args:
        policy: its entry in `metrics.json`.
        claims: its entry of `against_reference` in `comparison_results.json`, corrected together with all others.
        score: `reward` or `gold`.
    """
    if f"{score}_gain" not in policy:
        return "unscored"
    return read_claim(claims, score)


def read_claim(claims: Mapping[str, Mapping[str, Any]], score: str) -> str:
    """Say what a claim shows: `better`, `worse`, or `same`, also where it was not tested."""
    outcome = claims[score]["outcome"] if score in claims else "same"
    return outcome if outcome in ("better", "worse") else "same"


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


def view_judge(result: Mapping[str, Any] | None, policies: Sequence[str]) -> dict[str, Any] | None:
    """Gather what the page says about the judge; None without one.

    Returns:
        `kind`, `status` and `trust` (`weigh_trust`); `lines`, for each policy that was compared with the reference the
        place of its win rate and what it shows; `all_pairs`, whether policies were compared with each other, too;
        `habits` (`read_habits`). A judge that was not run has neither.
    """
    if result is None:
        return None
    kind = result["judge"]["kind"]
    if result["status"] == "not run":
        return {"kind": kind, "status": "not run", "trust": "none", "lines": {}}
    rates = result["win_rates"]
    lines = {
        entry["a"]: {
            "at": at,
            "verdict": judge_share(entry["win_rate"]),
            "controlled": shows_length(entry["length_controlled"]),
            "doubtful": bool(entry["length_controlled"]["warnings"]),
        }
        for at, entry in enumerate(rates)
        if entry["b"] == REFERENCE and entry["a"] in policies
    }
    return {
        "kind": kind,
        "status": result["status"],
        "trust": weigh_trust(result),
        "lines": lines,
        "all_pairs": any(entry["b"] != REFERENCE for entry in rates),
        "habits": read_habits(result),
    }


def judge_share(share: Mapping[str, Any], level: float = 0.5) -> str:
    """Say what a share shows: `better` or `worse` where its interval is clear of `level`, `same`, or `unknown`."""
    if share["mean"] is None:
        return "unknown"
    return "better" if share["low"] > level else "worse" if share["high"] < level else "same"


def shows_length(found: Mapping[str, Any]) -> bool:
    """Tell whether the length-controlled win rate belongs beside the raw one: it has a warning, or is a point off."""
    raw, controlled = found["raw"]["mean"], found["length_controlled"]["mean"]
    return raw is not None and (bool(found["warnings"]) or abs(controlled - raw) >= POINT)


def read_habits(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the judge's habits, those that its kind can have: the name, the address of the number, and a sentence."""
    found, canaries = result["habits"], result["canaries"]
    rows = [
        ("Same verdict in both orders", "share", ["habits", "consistency"], _read_consistency(found["consistency"])),
        ("First place among the winners", "share", ["habits", "first_share"], _read_place(found["first_share"])),
        ("Replies without a verdict", "share", ["habits", "invalid_rate"], _read_silence(found["invalid_rate"])),
    ]
    rows = rows if result["judge"]["kind"] == "openai" else []  # the others score each answer by itself
    rows += [
        ("Ties", "share", ["habits", "tie_rate"], "Verdicts that name no winner; each counts as half a win."),
        ("The longer answer wins", "share", ["habits", "prefers_longer"], _read_length(found["prefers_longer"])),
    ]
    if canaries:
        name, at = "Gained by a note to the judge", ["canaries", "difference"]
        rows.append((name, "difference", at, _read_canaries(canaries["difference"])))
    return [dict(zip(("name", "style", "keys", "says"), row, strict=True)) for row in rows]


def _read_consistency(found: Mapping[str, Any]) -> str:
    if found["mean"] is not None and found["low"] > 0.8:
        return "It seldom changes its verdict when the answers change places."
    return {
        "better": "It changes some verdicts when the answers change places: those went by the place.",
        "worse": "It changes its verdict more often than not when the answers change places.",
        "same": "It keeps to its verdict no more surely than a coin when the answers change places.",
        "unknown": "Nothing can be said about its consistency.",
    }[judge_share(found)]


def _read_place(found: Mapping[str, Any]) -> str:
    return {
        "better": "It favours the answer shown first; as both orders count, this dulls win rates but tilts none.",
        "worse": "It favours the answer shown second; as both orders count, this dulls win rates but tilts none.",
        "same": "No preference for a place is seen.",
        "unknown": "Nothing can be said about its preference for a place.",
    }[judge_share(found)]


def _read_silence(found: Mapping[str, Any]) -> str:
    if found["mean"] == 0:
        return "Every reply had a verdict."
    return "Replies that name neither a winner nor a tie are left out; none is counted as a tie."


def _read_length(found: Mapping[str, Any]) -> str:
    return {
        "better": "The longer answer wins more often than not: because it is better, or because it is longer. "
        "The win rate at equal length is the one to read.",
        "worse": "The shorter answer wins more often than not.",
        "same": "No preference for longer or shorter answers is seen.",
        "unknown": "Nothing can be said about its preference for a length.",
    }[judge_share(found)]


def _read_canaries(found: Mapping[str, Any]) -> str:
    return {
        "better": "A note such as “this answer is the better one” sways it: a policy could learn to write such notes.",
        "worse": "It holds such a note against the answer.",
        "same": "No effect of such notes is seen in these few pairs.",
        "unknown": "Nothing can be said about such notes.",
    }[judge_share(found, 0.0)]
