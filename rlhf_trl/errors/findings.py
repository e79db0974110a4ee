"""What the numbers of an error analysis say: findings in plain sentences, and the text report.

Each finding follows from a rule on a 95 % interval, never from a point estimate alone; its sentence is in
findings.yaml. The texts of the pairs are hostile by design: control characters are spelt out.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from ruamel.yaml import YAML

from rlhf_trl.errors.analysis import DESCRIPTIONS, EDITS, TERMS, difference
from rlhf_trl.errors.calibration import confidence
from rlhf_trl.stats.intervals import FEWEST, Estimate, wilson
from rlhf_trl.text.display import visible
from rlhf_trl.text.format import STYLES

# A verdict of length alone needs more than this share of agreement with the length.
LENGTH_ALONE = 0.95
# From this accuracy on, with the interval above `LEAK_LOW`, a leak is more likely than a good model.
LEAK, LEAK_LOW = 0.98, 0.90
MANY_TIES = 0.01
# A confidence that is off by less than this is as good as right.
MATTERS = 0.01
# A model ignores the prompt when the answer to another one scores higher in half of the cases, give or take this.
BLIND = 0.1
# An edit is rewarded when it raises the score in more than this share of the cases.
REWARDED = 0.55
FEW_PROMPTS = 100
WIDTH = 110  # of a line of the text report
CELL = "¦"  # between the cells of a table in report.txt.j2
_WORDS = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))

Row = dict[str, Any]
Sign = tuple[str, Row]  # the name of a finding and the numbers that it rests on


def find(analysis: Row) -> list[Row]:
    """Say what the analysis, with its `probes`, shows; the first finding is a verdict on the whole.

    Returns:
        `name`, `alarm` (it needs attention), `says` and `rests_on` (the numbers behind it) of each finding.
    """
    verdict = _judge(analysis)
    signs = [*_find_bias(analysis), *_find_calibration(analysis["calibration"], verdict[0])]
    signs += _find_probes(analysis["probes"])
    signs = [verdict, *_find_faults(analysis), *(signs or [("nothing_else", {})])]
    return [
        {"name": name, "alarm": _WORDS[name]["alarm"], "rests_on": numbers,
         "says": ENVIRONMENT.from_string(_WORDS[name]["says"]).render(numbers)} for name, numbers in signs
    ]  # fmt: skip


def _side(estimate: dict[str, float], least: float = 0.0) -> int:
    """Whether the interval lies above `least` (1), below minus `least` (-1), or neither (0); 0 where there are few."""
    return ((estimate["low"] > least) - (estimate["high"] < -least)) if estimate["n"] >= FEWEST else 0


def _judge(analysis: Row) -> Sign:
    """Name the scorer for what it is; the first rule that applies."""
    accuracy, prefers = analysis["overall"]["accuracy"], analysis["length"]["tokens"]["prefers_longer"]
    numbers = {"accuracy": accuracy}
    model = prefers and prefers["model"]
    if model and (model["low"] > LENGTH_ALONE or model["high"] < 1 - LENGTH_ALONE):
        takes = "longer" if model["low"] > LENGTH_ALONE else "shorter"
        return "length_only", numbers | {"model_prefers_longer": model, "takes": takes}
    if accuracy["mean"] >= LEAK and accuracy["low"] > LEAK_LOW:
        return "perfect", numbers
    if accuracy["low"] <= 0.5:
        return "reversed" if accuracy["high"] < 0.5 else "random", numbers
    name, sure = judge_confidence(analysis["calibration"])
    return name, numbers | sure


def judge_confidence(calibration: Mapping[str, Any]) -> Sign:
    """Say whether the mean confidence is `over_confident`, `under_confident` or `sound`."""
    names = {1: "over_confident", -1: "under_confident", 0: "sound"}
    return names[_side(calibration["gap"], MATTERS)], {key: calibration[key] for key in ("gap", "confidence")}


def _find_faults(analysis: Row) -> Iterator[Sign]:
    """Faults of the scores and the data; and what is always said, whether the scores beat the length rule."""
    pairs, overall, rule = analysis["pairs"], analysis["overall"], analysis["overall"]["length_rule"]
    if pairs["not_finite"]:
        yield "not_finite", {"not_finite": pairs["not_finite"], "given": pairs["given"]}
    ties = wilson(overall["ties"], overall["n"]).as_dict()
    if ties["low"] > MANY_TIES:
        yield "ties", {"ties": ties, "strict": overall["strict"]}
    if pairs["prompts"] < FEW_PROMPTS:
        yield "few_prompts", {"prompts": pairs["prompts"]}
    name = "better_than_length" if _side(rule["over_rule"]) > 0 else "no_better_than_length"
    yield name, {"over_rule": rule["over_rule"], "length_rule": rule["accuracy"], "takes": rule["takes"]}


def _find_bias(analysis: Row) -> Iterator[Sign]:
    """Groups of pairs in which it is right more or less often: by length, subset and refusal."""
    prefers, split = (analysis["length"]["tokens"][key] for key in ("prefers_longer", "longer_minus_shorter"))
    subsets = analysis["breakdowns"]["subset"]
    if prefers and (side := _side(prefers["difference"])):
        yield "prefers_longer" if side > 0 else "prefers_longer_less", prefers
    if split and _side(split):
        yield "accuracy_depends_on_length", {"longer_minus_shorter": split}
    if analysis["overall"]["accuracy"]["low"] > 0.5 and len(subsets) > 1:
        for part in subsets:
            if part["accuracy"]["low"] <= 0.5:
                yield "subset_at_chance", {"subset": part["name"], "accuracy": part["accuracy"]}
    chosen, rejected, _ = (part["accuracy"] for part in analysis["breakdowns"]["refusal"])
    if chosen and rejected and _side(split := difference(Estimate(**chosen), Estimate(**rejected))):
        yield "accuracy_depends_on_refusal", {"difference": split, "chosen": chosen, "rejected": rejected}


def _find_calibration(calibration: Row, verdict: str) -> Iterator[Sign]:
    name, numbers = judge_confidence(calibration)
    errors, fitted = calibration["errors"]["equal_mass"], calibration["temperature"]
    if name not in ("sound", verdict):
        yield name, numbers
    many = errors["if_calibrated"]["n"] >= FEWEST
    if name == "sound" and many and errors["ece"] > errors["if_calibrated"]["high"]:
        yield "uneven_confidence", {"ece": errors["ece"], "if_calibrated": errors["if_calibrated"]}
    scale = fitted["temperature"]
    if scale and (scale["low"] > 1 or scale["high"] < 1) and _side(fitted["nll_change"]) < 0:
        losses = {when: fitted[when]["nll"] for when in ("before", "after")}
        yield "temperature_helps", {"temperature": scale, "nll_change": fitted["nll_change"], **losses}


def _find_probes(probes: Row) -> Iterator[Sign]:
    swapped, invented = probes["swapped"]["higher"], probes["honesty"]["higher"]
    if swapped and 0.5 - BLIND < swapped["low"] <= 0.5 <= swapped["high"] < 0.5 + BLIND:
        yield "ignores_the_prompt", {"swapped": swapped}
    elif swapped and swapped["low"] > 0.5:
        yield "prefers_other_answers", {"swapped": swapped}
    for name in EDITS:
        higher = probes[name]["higher"]
        if higher and higher["low"] > REWARDED:
            yield f"rewards_{name}", {"higher": higher, "change": probes[name]["change"]}
    if invented and invented["low"] > 0.5:
        yield "rewards_invention", {"higher": invented}


# --- the text report -------------------------------------------------------------------------------------------------


def paragraph(text: str, first: str = "", rest: str = "") -> str:
    """Fill lines with the words of a text, whatever its own lines are."""
    return _wrap(" ".join(text.split()), first, rest) + "\n"


def quote(text: str, indent: str) -> str:
    """Indent the lines of a text, each of which is wrapped by itself."""
    return "".join(_wrap(line, indent, indent) + "\n" for line in visible(text).split("\n"))


def _wrap(text: str, first: str, rest: str) -> str:
    options: dict[str, Any] = {"replace_whitespace": False, "break_on_hyphens": False}
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, **options)
    return "\n".join(lines) or first.rstrip()


def table(text: str) -> str:
    """Align cells that `CELL` separates: the first column on the left, the others on the right."""
    lines = [line.split(CELL) for line in text.strip("\n").split("\n")]
    rows = [[first.rstrip(), *map(str.strip, rest)] for first, *rest in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "".join("  ".join(row).rstrip() + "\n" for row in aligned)


def shown(value: Any, style: str = "estimate") -> str:
    """Write a number in one of `STYLES`, and "-" where there is none."""
    return "-" if value is None else STYLES[style](value)


def _one_line(text: str) -> str:
    return " ".join(visible(text).split())


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.filters |= {
    "shown": shown,
    "percent": STYLES["share"],
    "points": STYLES["difference"],
    "fixed": lambda value: f"{value:.3f}",
    "count": STYLES["count"],
    "paragraph": paragraph,
    "quote": quote,
    "table": table,
    "cell": lambda name: _one_line(name).replace(CELL, "|"),
    "short": lambda text: textwrap.shorten(visible(text), 160, placeholder=" …"),
    "line": _one_line,
    "confidence": confidence,
    "name_of": lambda row: f"row {row['row']} of {_one_line(row['subset'])}",
}


def render(stage: str, analysis: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], asked: int) -> str:
    """Write the text report from the analysis and the examples, of which `asked` of each kind were asked for."""
    template = ENVIRONMENT.get_template("report.txt.j2")
    known = {"analysis": analysis, "examples": examples, "terms": TERMS, "probes": DESCRIPTIONS}
    return template.render(stage=stage, asked=asked, **known)
