"""The text report of an error analysis, to be read from top to bottom.

Works on values in memory. The texts of the pairs are hostile by design: control characters are spelt out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_trl.errors.analysis import TERMS
from rlhf_trl.errors.calibration import confidence
from rlhf_trl.errors.findings import percent, points
from rlhf_trl.errors.probes import DESCRIPTIONS
from rlhf_trl.text.display import visible

WIDTH = 110
BRIEF = 5
# A bootstrap of fewer pairs tells nothing.
FEW = 5
FRAMES = {
    "equal_mass": "bins of equal mass, both orders",
    "equal_width": "bins of equal width, both orders",
    "random_order": "one order drawn by hash",
}


def render(stage: str, analysis: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    """Write the report.

    Args:
        stage: name of the reward stage.
        analysis: content of `error_analysis.json`.
        examples: the lines of `error_examples.jsonl`.
    """
    title = f"Error analysis of the reward model {stage!r}"
    return "\n".join(
        [
            title,
            "=" * len(title),
            "",
            *_introduce(analysis),
            *_accuracy(analysis),
            *_scores(analysis["scores"]),
            *_length(analysis["length"]),
            *_calibration(analysis["calibration"]),
            *_probes(analysis["probes"]),
            *_define(analysis["definitions"]),
            *_show(examples, analysis["examples_asked"]),
        ]
    )


def _introduce(analysis: dict[str, Any]) -> Iterator[str]:
    pairs = analysis["pairs"]
    yield from _wrap(
        f"{pairs['analysed']:,} held-out pairs with {pairs['prompts']:,} different prompts. In each pair people have "
        "chosen one of two answers to a prompt. The reward model scores both; it is right where the chosen answer has "
        f"the higher score. Pairs left out because a score is not finite: {pairs['not_finite']:,}."
    )
    rules = "! needs attention. Each follows from a rule on a 95 % interval; of 20 rules, about one applies by chance."
    yield from _heading("Findings", rules)
    for finding in analysis["findings"]:
        yield from _wrap(finding["says"], first="! " if finding["alarm"] else "- ", rest="  ")
    yield from _heading("How to read the tables", "")
    yield from _wrap(
        "Numbers in brackets are 95 % intervals: where the true value may well lie. Accuracy is in per cent; 50 is a "
        "coin. `longer` is the accuracy of taking the longer answer on the same pairs, which needs no model; `over "
        "it` is how far the model is above that, in points. The margin is the score of the chosen minus that of the "
        "rejected answer: positive where the model is right. All terms are defined below the tables."
    )


def _accuracy(analysis: dict[str, Any]) -> Iterator[str]:
    overall = analysis["overall"]
    yield from _heading("Accuracy", "how often the model agrees with the people")
    yield from _cells([{"name": "all pairs", **overall}])
    yield ""
    yield from _wrap(
        f"Ties: {overall['ties']:,} (half right above; with a tie as wrong: {percent(overall['strict'])}). "
        f"Taking the longer answer in characters: {percent(overall['length_baseline_characters'])}."
    )
    for key, words in TERMS["breakdowns"].items():
        yield from _heading(words["title"], words["explanation"], level="-")
        yield from _cells(analysis["breakdowns"][key])


def _cells(cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = []
    for cell in cells:
        numbers = ["-"] * 4
        if cell["accuracy"]:
            numbers[:2] = _plain(cell["accuracy"]), _plain(cell["length_baseline"])
        if cell["n"] >= FEW:
            numbers[2:] = _plain(cell["over_baseline"], signed=True), _number(cell["mean_margin"])
        rows.append([visible(cell["name"]), f"{cell['n']:,}", *numbers])
    yield from table(["", "pairs", "accuracy %", "longer %", "over it", "mean margin"], rows)


def _scores(scores: dict[str, Any]) -> Iterator[str]:
    yield from _heading("Scores and margins", "what the numbers look like; p10 to p90: deciles")
    rows = []
    for name in ("chosen", "rejected", "margin"):
        part = scores[name]
        deciles = [f"{part['deciles'][index]:.3f}" for index in (1, 5, 9)]
        rows.append([name, _number(part["mean"]), f"{part['std']:.3f}", *deciles])
    yield from table(["", "mean", "std", "p10", "median", "p90"], rows)
    yield ""
    scaled = scores["margin"]["in_score_std"]
    in_std = _number(scaled) if scaled else "- (all are equal)"
    known = [
        ["mean margin in standard deviations of the scores", in_std],
        ["chosen above rejected across prompts (AUC)", _plain(scores["auc"]) + " %"],
        ["loss, -log sigma(margin) (0.693: a coin)", _number(scores["nll"])],
        ["Brier score (0.25: a coin)", _number(scores["brier"])],
    ]
    yield from table(["", "value"], known)


def _length(length: dict[str, Any]) -> Iterator[str]:
    yield from _heading("Length", "does the model look at the length instead of the content?")
    rows = []
    for name, key, part in (
        ("correlation of score and length, all answers", "score_and_length", "pearson"),
        ("    by rank", "score_and_length", "spearman"),
        ("correlation of margin and length difference, pairs", "margin_and_difference", "pearson"),
        ("    by rank", "margin_and_difference", "spearman"),
    ):
        found = [unit[key] for unit in length.values()]
        rows.append([name, *(_number(one[part]) if one[part] else one["why_not"] for one in found)])
    for name, key in (
        ("accuracy % where the chosen answer is longer", "chosen_longer"),
        ("accuracy % where it is shorter", "chosen_shorter"),
        ("accuracy % where both are equally long", "equal"),
    ):
        rows.append([name, *(_accuracy_of(unit["accuracy"][key]) for unit in length.values())])
    splits = [_maybe(unit["longer_minus_shorter"], signed=True) for unit in length.values()]
    near = [_accuracy_of(unit["near_equal"]) for unit in length.values()]
    rows += [
        ["    longer minus shorter, points", *splits],
        ["accuracy % where the lengths differ by less than 10 %", *near],
    ]
    for name, key in (
        ("the model prefers the longer answer, %", "model"),
        ("the humans prefer the longer answer, %", "humans"),
        ("    model minus humans, points", "difference"),
    ):
        rows.append([name, *(_maybe((unit["prefers_longer"] or {}).get(key)) for unit in length.values())])
    for name, key in (
        ("P(correct) at equal length, logistic fit", "at_equal_length"),
        ("odds of being right, for one std more length", "odds_ratio"),
    ):
        found = [unit["logistic"] for unit in length.values()]
        rows.append([name, *(_number(one[key]) if one[key] else "- (1)" for one in found)])
    yield from table(["", *length], rows)
    for unit, found in length.items():
        if found["logistic"]["at_equal_length"] is None:
            yield from _wrap(f"(1) {unit}: {found['logistic']['why_not']}.")


def _calibration(found: dict[str, Any]) -> Iterator[str]:
    yield from _heading(
        "Confidence", "sigma(|margin|) is how sure the model is of its preference: is it right as often?"
    )
    for name in ("equal_mass", "equal_width"):
        rows = [
            [f"{100 * part['from']:.2f} to {100 * part['to']:.2f}", f"{part['n']:,}",
             f"{100 * part['predicted']:.2f}", _plain(part["observed"])]
            for part in found["tables"][name]
        ]  # fmt: skip
        yield from table([f"bins of {name.replace('_', ' ')}", "pairs", "mean confidence %", "accuracy %"], rows)
        yield ""
    rows = [
        [name, *(f"{found['errors'][key][error]:.3f}" for error in ("ece", "rmsce", "mce")),
         _number(found["errors"][key]["if_calibrated"])]
        for key, name in FRAMES.items()
    ]  # fmt: skip
    yield from table(["calibration error", "ECE", "RMSCE", "MCE", "ECE of a calibrated model"], rows)
    yield ""
    yield from _wrap(
        f"Accuracy to expect if the probabilities were right: {percent(found['confidence'])}. Minus the accuracy: "
        f"{points(found['gap'])} (above 0: over-confident)."
    )
    fitted = found["temperature"]
    if fitted["temperature"] is None:
        yield from _wrap(f"No temperature: {fitted['why_not']}.")
        return
    yield from _wrap(
        f"Temperature {_number(fitted['temperature'])}, fitted on half of the prompts; on the other half "
        f"({fitted['measured_on']:,} pairs):"
    )
    rows = [
        [name, _number(part["nll"]), _number(part["brier"]), f"{part['ece']:.3f}", _number(part["ece_if_calibrated"])]
        for name, part in (("before", fitted["before"]), ("after", fitted["after"]))
    ]
    yield from table(["", "loss", "Brier", "ECE", "ECE of a calibrated model"], rows)


def _probes(probes: dict[str, Any]) -> Iterator[str]:
    yield from _heading("Probes", "the text is changed in a known way: what does the score do?")
    for name, what in DESCRIPTIONS.items():
        yield from _wrap(f"{name}: {what}", rest="    ")
    yield ""
    rows = [
        [name, f"{part['n']:,}", f"{part['skipped']:,}", _maybe(part["higher"]),
         _number(part["change"]) if part["change"] else "-"]
        for name, part in probes.items() if name != "wrong_prompt"
    ]  # fmt: skip
    yield from table(["", "answers", "skipped", "changed one scores higher %", "mean change of the score"], rows)
    moved = probes["wrong_prompt"]
    yield ""
    if moved["accuracy"]:
        yield from _wrap(
            f"wrong_prompt: accuracy {percent(moved['accuracy'])} on {moved['n']:,} pairs, under their own prompts "
            f"{percent(moved['accuracy_before'])}; change {points(moved['change'])}. A model that reads "
            "the prompt loses accuracy here."
        )
    else:
        yield from _wrap(f"wrong_prompt: no number, {moved['why_not']}.")
    yield from _wrap("Skipped: the changed text is empty, is the same as before, or is too long for the model.")


def _define(definitions: dict[str, str]) -> Iterator[str]:
    yield from _heading("Terms", "")
    for term, meaning in definitions.items():
        yield from _wrap(f"{term}: {meaning.rstrip('.?')}.", rest="    ")


# --- examples --------------------------------------------------------------------------------------------------------


def _show(examples: Sequence[dict[str, Any]], asked: int) -> Iterator[str]:
    kinds = {kind: [one for one in examples if one["kind"] == kind]
             for kind in ("confident_error", "near_tie", "confident_right")}  # fmt: skip
    errors, ties, right = kinds.values()
    yield from _heading("The most confident errors", "pairs as they stand in the data; some may offend")
    if len(errors) < asked:
        yield from _wrap(
            f"{asked} were asked for. The model prefers the rejected answer in {len(errors)} pairs: all here."
        )
    for example in errors:
        yield from _full(f"Error {example['rank']} of {len(errors)}", example)
    yield from _heading("The nearest ties", "the two scores are almost the same")
    for example in ties:
        yield from _full(f"Near tie {example['rank']} of {len(ties)}", example)
    yield from _heading("The most confident right ones, in brief", "error_examples.jsonl has more, in full")
    for example in right[:BRIEF]:
        yield from _wrap(f"{_where(example)}, margin {example['margin']:+.3f}", first="- ", rest="  ")
        for side in ("chosen", "rejected"):
            text = textwrap.shorten(visible(example[side]), 160, placeholder=" …")
            yield from _wrap(f"{side}: {text}", first="    ", rest="    ")


def _full(title: str, example: dict[str, Any]) -> Iterator[str]:
    sure = float(confidence(example["margin"]))
    yield ""
    yield f"--- {title}: {_where(example)}"
    yield f"    margin {example['margin']:+.3f}, confidence {100 * sure:.1f} %"
    yield f"    prompt, {example['prompt_tokens']} tokens:"
    for message in example["prompt"]:
        yield from _quote(f"[{message['role']}] {message['content']}")
    for side in ("chosen", "rejected"):
        yield f"    {side} by people: score {example[f'{side}_score']:+.3f}, {example[f'{side}_tokens']} tokens, " + (
            f"{example[f'{side}_characters']} characters"
        )
        yield from _quote(example[side])


def _where(example: dict[str, Any]) -> str:
    return f"row {example['row']} of {visible(example['subset'])}"


def _quote(text: str) -> Iterator[str]:
    for line in visible(text).split("\n"):
        yield from _wrap(line, first="      | ", rest="      | ")


# --- text ------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align columns: the first one on the left, the others on the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        yield "  ".join(cells).rstrip()


def _heading(title: str, explanation: str, level: str = "=") -> Iterator[str]:
    yield ""
    if level == "=":
        yield ""
        yield title.upper()
        yield "-" * len(title)
    else:
        yield f"{title}:"
    if explanation:
        yield from _wrap(f"({explanation})")


def _wrap(text: str, first: str = "", rest: str = "") -> list[str]:
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, replace_whitespace=False, break_on_hyphens=False
    )
    return lines or [first.rstrip()]


def _plain(estimate: dict[str, float], signed: bool = False) -> str:
    return points(estimate).replace(" points", "") if signed else percent(estimate).replace(" %", "")


def _number(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _maybe(estimate: dict[str, float] | None, signed: bool = False) -> str:
    return _plain(estimate, signed) if estimate else "-"


def _accuracy_of(cell: dict[str, Any]) -> str:
    return f"{_plain(cell['accuracy'])} of {cell['n']:,}" if cell["accuracy"] else "- of 0"
