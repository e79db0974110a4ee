"""The text report of a comparison, to be read from top to bottom.

Works on values in memory. Numbers that mean different things never share a table.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
WIDTH = 110
# Whether there are pairs -> what is said without a verdict.
NO_VERDICT = {
    True: "Nothing can be said about any two methods; the reasons are below.",
    False: "There are no two methods to compare.",
}
CLOCKS = ("steps", "seconds", "tokens")


def render(name: str, results: Mapping[str, Any]) -> str:
    """Write the report from the content of `comparison_results.json`."""
    title = f"Comparison of {name}"
    parts = (
        _conclude(results),
        _stability(results["stages"], results["comparable"]),
        _convergence(results["stages"], results["comparable"]["convergence"]),
        _efficiency(results["stages"], results["comparable"]),
        _quality(results["stages"]),
        _seeds(results["groups"]),
        _define(results["definitions"]),
    )
    return "\n".join([title, "=" * len(title), *(line for part in parts for line in part), ""])


def _conclude(results: Mapping[str, Any]) -> Iterator[str]:
    yield from _heading("Which method was better")
    verdict = results["verdict"]
    yield from _wrap(verdict["sentence"] if verdict else NO_VERDICT[bool(results["pairs"])])
    for warning in verdict["warnings"] if verdict else ():
        yield from _wrap(f"Careful: {warning}.")
    for pair in results["pairs"]:
        yield from _wrap(pair["sentence"], "- ")
        ratio = pair["cost"]["ratio"]
        cost = (
            f"{pair['a']} took {ratio:.2f} times the device time of {pair['b']}" if ratio else pair["cost"]["why_not"]
        )
        yield from _wrap(f"Compute, with the stages that each builds on: {cost}.", "  ")
    yield from _heading("What stands out")
    found = [(name, finding["says"]) for name, stage in results["stages"].items() for finding in stage["findings"]]
    for name, says in found:
        yield from _wrap(f"{name}: {says}.", "- ")
    if not found:
        yield "Nothing: no spike, no jump of the KL, no divergence, no run much slower than the others."


def _stability(stages: Mapping[str, Row], comparable: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    yield from _heading("Training stability")
    keys = ("variance", "noise_variance", "end_std", "oscillation", "drawdown", "final_minus_best", "spikes")
    for quantity in ("loss", "reward"):
        for alike in comparable[quantity]:
            yield from _wrap(f"{quantity.capitalize()}: {alike['meaning']}")
            rows = []
            for name in alike["stages"]:
                found = stages[name]["stability"]
                rows.append([name, _cell(found["samples_per_value"]), *(_cell(found[quantity][key]) for key in keys)])
            yield from _table(["run", "samples_per_value", *keys], rows)
    for alike in comparable["kl"]:
        yield from _wrap(f"KL: {alike['meaning']}")
        columns = ("jumps", "highest", "last")
        found = {name: stages[name]["stability"]["kl"] for name in alike["stages"]}
        rows = [[name, *(_cell(of[key]) for key in columns)] for name, of in found.items()]
        yield from _table(["run", *columns], rows)
    for name, stage in stages.items():
        signs = [
            f"{key} {_cell(of['first'])} to {_cell(of['last'])}" for key, of in stage["stability"]["signs"].items()
        ]
        if signs:
            yield from _wrap(f"{name}, from first to last: {'; '.join(signs)}.")


def _convergence(stages: Mapping[str, Row], comparable: Sequence[Row]) -> Iterator[str]:
    yield from _heading("Convergence")
    for alike in comparable:
        of = {name: stages[name]["convergence"] for name in alike["stages"]}
        first = next(iter(of.values()))
        yield from _wrap(
            f"Reward: {alike['meaning']}. Threshold {first['threshold']:.3g}, held for {first['hold']} values."
        )
        keys = (*CLOCKS, "final", "rate", "area")
        yield from _table(["run", *keys], [[name, *map(_cell, _until(row))] for name, row in of.items()])
    for name, stage in stages.items():
        if stage["convergence"]["meaning"] is None:
            yield from _wrap(f"{name}: {stage['convergence']['why_not']}.")


def _until(convergence: Row) -> list[Any]:
    """What it took to reach the threshold, or `> n` where it was not reached in n."""
    reached = convergence["reached"]
    ends = convergence if reached else convergence["censored_at"]
    took = [value if reached or value is None else f"> {_cell(value)}" for value in (ends[key] for key in CLOCKS)]
    return [*took, convergence["final"], convergence["rate"], convergence["area"]]


PACE = {"seconds_per_step": "s/step", "samples_per_step": "samples/step", "samples_per_second": "samples/s",
        "tokens_per_second": "tokens/s", "generated_tokens": "sampled tokens"}  # fmt: skip
COMPUTE = {"peak_memory_bytes": "peak memory", "seconds": "seconds", "device_seconds": "device s",
           "device_seconds_with_inputs": "with inputs"}  # fmt: skip


def _efficiency(stages: Mapping[str, Row], comparable: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    yield from _heading("Computational efficiency")
    for quantity, columns in (("seconds", COMPUTE), ("pace", PACE)):
        for alike in comparable[quantity]:
            yield from _wrap(("On " if quantity == "seconds" else "Samples are ") + alike["meaning"])
            rows = []
            for name in alike["stages"]:
                cells = {**stages[name]["efficiency"]}
                cells["peak_memory_bytes"] = f"{cells['peak_memory_bytes'] / 1e9:.2f} GB"
                rows.append([name, *(_cell(cells[key]) for key in columns)])
            yield from _table(["run", *columns.values()], rows)


def _quality(stages: Mapping[str, Row]) -> Iterator[str]:
    measured = {name: stage["quality"] for name, stage in stages.items() if stage["quality"]}
    if not measured:
        return
    yield from _heading("Sample quality, on the same held-out prompts")
    keys = [key for key in ("reward_gain", "gold_gain", "win_rate", "kl", "entropy", "answer_tokens")
            if any(key in quality for quality in measured.values())]  # fmt: skip
    rows = [[name, *(_estimate(quality.get(key)) for key in keys)] for name, quality in measured.items()]
    yield from _table(["run", *keys], rows)


def _seeds(groups: Mapping[str, Row]) -> Iterator[str]:
    several = {name: group for name, group in groups.items() if len(group["stages"]) > 1}
    if not several:
        return
    yield from _heading("Over the seeds of each method")
    for name, group in several.items():
        rows = []
        for key, found in group["seeds"].items():
            points = ", ".join(f"{value:.3g}" for value in found["points"].values())
            rows.append([key, _estimate(found), _cell(found["std"]), _cell(found["iqm"]), points])
        yield from _wrap(f"{name}: {', '.join(group['stages'])}")
        yield from _table(["", "mean", "std", "IQM", "every seed"], rows)


def _define(definitions: Mapping[str, str]) -> Iterator[str]:
    yield from _heading("What the words mean")
    for word, meaning in definitions.items():
        yield from _wrap(f"{word}: {meaning}.", "", "  ")


def _heading(title: str) -> list[str]:
    return ["", title, "-" * len(title)]


def _wrap(text: str, first: str = "", rest: str | None = None) -> list[str]:
    rest = " " * len(first) if rest is None else rest
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:3])) + (" …" if len(value) > 3 else "") if value else "none"
    if isinstance(value, float) or (isinstance(value, int) and value >= 10**6):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value)


def _estimate(value: Row | None) -> str:
    if value is None or value["mean"] is None:
        return "–"
    return f"{value['mean']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    align: list[Callable[[str, int], str]] = [str.ljust, *[str.rjust] * (len(titles) - 1)]
    for row in (titles, *rows):
        yield "  " + "  ".join(put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)).rstrip()
    yield ""
