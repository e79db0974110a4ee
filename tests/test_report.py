"""The report: every number traced to its file, hostile text inert, honest sentences, one self-contained file."""

import itertools
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from jinja2 import DictLoader, Environment
from report_fixtures import STAGES, SWEEP, write_run
from ruamel.yaml import YAML

from rlhf_trl.recipe import Recipe, UserError
from rlhf_trl.report import (
    MAX_CHARACTERS,
    choose_samples,
    format_estimate,
    judge_gain,
    judge_reward_model,
    printable,
    render,
    report,
)
from rlhf_trl.report_figures import Point, plot_reward_kl
from rlhf_trl.rundir import read_json, read_jsonl, write_json

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "rect", "circle", "use"}
HOSTILE = "<script>alert(1)</script> {{7*7}} {% raw %} [/b] \x1b[31m \u202egpj.exe\u202c \x00 &lt; \"' onload=x </div>"
RUNS: dict[str, dict[str, Any]] = {
    "sweep": {"stages": SWEEP},
    "no-judge": {"stages": {name: STAGES[name] for name in ("sft", "dpo")}, "reward": None},
    "reward-model-only": {"stages": {name: STAGES[name] for name in ("sft", "rm")}, "accuracy": (0.58, 0.55)},
    "hostile": {
        "stages": {name: STAGES[name] for name in ("sft", "rm", "dpo")},
        "prompts": [[{"role": "user", "content": HOSTILE}]],
        "answers": [HOSTILE, "x" * 1_000_000, ""],
        "subsets": ("<b>sub</b>", "a/b~c d"),
    },
}


@dataclass
class Element:
    tag: str
    attrs: dict[str, str]
    children: list[Any] = field(default_factory=list)

    def all(self) -> list["Element"]:
        return [self, *(e for child in self.children if isinstance(child, Element) for e in child.all())]

    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)


class Tree(HTMLParser):
    """A strict reader: every element must be closed in its turn."""

    def __init__(self, page: str):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


@pytest.fixture(scope="module", params=RUNS)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Element]:
    root = tmp_path_factory.mktemp("runs") / request.param
    recipe, run = write_run(root, **{"count": 24, "steps": 6, **RUNS[request.param]})
    report(recipe, run)
    return root, Tree(run.report.read_text(encoding="utf-8")).root


def resolve(root: Path, address: str) -> Any:
    """Follow an address as RFC 6901 says, with nothing of the report's own code."""
    file, _, pointer = address.partition("#")
    value = read_jsonl(root / file) if file.endswith(".jsonl") else read_json(root / file)
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def numbers(text: str) -> list[tuple[float, float]]:
    """Read the numbers of a text as a person does: value, and half a unit of its last printed digit."""
    text = text.replace("−", "-").replace(",", "").replace("\u00a0", " ")
    unit = {"%": 0.01, "GB": 1e9, "MB": 1e6}.get(text.split("[")[0].split()[-1], 1.0)
    found = []
    for digits in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text):
        decimals = len(digits.partition("e")[0].partition(".")[2]) - int(digits.partition("e")[2] or 0)
        found.append((float(digits) * unit, 0.5 * 10.0**-decimals * unit))
    return found


def seconds(text: str) -> float:
    units = {"s": 1.0, "min": 60.0, "h": 3600.0}
    return sum(
        float(number.replace(",", "")) * units[unit] for number, unit in re.findall(r"([\d.,]+) (s|min|h)", text)
    )


def shows(text: str, value: Any, address: str) -> bool:
    if value is None:
        return text == "–"
    if address == "recipe.json#":
        return YAML(typ="safe", pure=True).load(text) == value
    if isinstance(value, str):
        shown = re.sub(r"⟨U\+([0-9A-F]{4,})⟩", lambda match: chr(int(match[1], 16)), text)
        if len(value) > MAX_CHARACTERS:
            return shown == f"{value[:MAX_CHARACTERS]} […] (cut here for display: {len(value):,} characters in all)"
        return shown == value or (address.endswith("finished") and value.replace("T", " ").startswith(text))
    if address.endswith("seconds"):
        return abs(seconds(text) - value) <= (0.05 if value < 60 else 0.5 if value < 3600 else 60)
    expected = [value["mean"], value["low"], value["high"]] if isinstance(value, dict) else [value]
    found = numbers(text)
    if len(found) == 1 and len(expected) == 3 and expected[1] == expected[2]:
        expected = expected[:1]
    close = [abs(number - true) <= half * 1.001 for (number, half), true in zip(found, expected, strict=True)]
    return all(close)


def test_every_value_on_the_page_is_what_its_source_holds(page: tuple[Path, Element]) -> None:
    root, tree = page
    marked = [element for element in tree.all() if "data-source" in element.attrs]
    assert len(marked) > 50
    wrong = [
        (element.attrs["data-source"], element.text()[:80])
        for element in marked
        if not shows(element.text(), resolve(root, element.attrs["data-source"]), element.attrs["data-source"])
    ]
    assert not wrong


def test_every_section_names_a_source_that_exists(page: tuple[Path, Element]) -> None:
    root, tree = page
    paths = [element.attrs["data-path"] for element in tree.all() if "data-path" in element.attrs]
    assert len(paths) > 5
    for path in paths:
        assert resolve(root, path) not in (None, {}, [])


def test_no_number_stands_on_the_page_without_a_source(page: tuple[Path, Element]) -> None:
    root, tree = page
    names = {*read_json(root / "recipe.json")["stages"], *read_json(root / "data/summary.json")["subsets"], root.name}

    def loose(element: Element) -> list[str]:
        classes = element.attrs.get("class", "").split()
        if element.tag in ("style", "svg", "code", "title") or "data-source" in element.attrs or "start" in classes:
            return []
        texts = [child.strip() for child in element.children if isinstance(child, str)]
        inner = [text for child in element.children if isinstance(child, Element) for text in loose(child)]
        return [text for text in texts if text and text not in names] + inner

    written = ("95 % interval", "From 0 to 100 %")
    quantiles = {"5 %", "25 %", "75 %", "95 %"}
    for text in loose(tree):
        text = text.replace("\u00a0", " ")
        for phrase in written:
            text = text.replace(phrase, "")
        assert text in quantiles or not re.search(r"\d", text), text


def test_page_is_self_contained_and_runs_nothing(page: tuple[Path, Element]) -> None:
    root, tree = page
    elements = tree.all()
    policies = [e.attrs["content"] for e in elements if e.attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    banned = {"script", "iframe", "object", "embed", "img", "form", "base", "foreignobject", "animate", "set"}
    assert not banned & {element.tag for element in elements}
    for element in elements:
        assert not [name for name in element.attrs if name.startswith("on") or name in ("src", "srcset", "action")]
        link = element.attrs.get("href", element.attrs.get("xlink:href", "#"))
        assert link.startswith("#") or link == "data:," or (root / unquote(link)).is_relative_to(root)
        assert ":" not in link.removeprefix("data:")
    assert "url(" not in (root / "report.html").read_text().replace("url(#", "")


def test_ids_are_unique_and_every_reference_has_its_target(page: tuple[Path, Element]) -> None:
    root, tree = page
    elements = tree.all()
    ids = [element.attrs["id"] for element in elements if "id" in element.attrs]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="#|url\(#|aria-labelledby=")([\w-]+)', (root / "report.html").read_text()))
    assert wanted <= set(ids)


def test_every_figure_can_be_read_aloud_and_headings_descend(page: tuple[Path, Element]) -> None:
    _, tree = page
    for svg in (element for element in tree.all() if element.tag == "svg"):
        assert svg.attrs.get("aria-hidden") == "true" or (
            svg.attrs["role"] == "img" and len(svg.attrs["aria-label"]) > 20
        )
    levels = [int(element.tag[1]) for element in tree.all() if re.fullmatch(r"h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    stages = {name: STAGES[name] for name in ("sft", "rm", "dpo")}
    recipe, run = write_run(tmp_path / "run", stages=stages, count=12, steps=4)
    assert render(recipe, run) == render(recipe, run)


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "hostile", count=4, steps=2, **RUNS["hostile"])
    page = render(recipe, run)
    assert "alert(1)" in page
    assert not re.search(r"<script|<b>sub|\[/b\] \x1b|[\x00\x1b\u202e\u202c]", page)
    assert "{{7*7}}" in page
    assert "[/b] ⟨U+001B⟩[31m ⟨U+202E⟩gpj.exe⟨U+202C⟩ ⟨U+0000⟩" in page
    assert "&lt;b&gt;sub&lt;/b&gt;" in page
    assert "1,000,000 characters in all" in page
    assert "an empty text" in page
    assert len(page) < 1_000_000


@pytest.mark.parametrize(
    "character", [*map(chr, range(0x202A, 0x202F)), "\u2066", "\u200b", "\ufeff", "\x9b", "\r", "\ud800"]
)
def test_characters_that_act_or_hide_are_printed_as_codes(character: str) -> None:
    assert printable(f"a{character}b") == f"a⟨U+{ord(character):04X}⟩b"


def test_text_of_all_scripts_is_left_alone() -> None:
    text = "naïve – “quoted”\n\tעברית العربية हिन्दी 日本語 👩\u200d🚀 می\u200cخواهم"
    assert printable(text) == text


def test_a_number_cannot_be_printed_without_its_source() -> None:
    environment = Environment(loader=DictLoader({"page": "{{ number }}"}), autoescape=True, finalize=printable)
    with pytest.raises(TypeError, match="without its source"):
        environment.get_template("page").render(number=0.93)


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [((0.3, 0.01, 0.6), "better"), ((0.3, 0.0, 0.6), "same"), ((-0.3, -0.6, -0.1), "worse"), (None, "unscored")],
)
def test_verdict_follows_the_interval_of_the_paired_gain(gain: tuple[float, ...] | None, verdict: str) -> None:
    policy = {"reward_gain": dict(zip(("mean", "low", "high"), gain, strict=True))} if gain else {}
    assert judge_gain(policy) == verdict


@pytest.mark.parametrize(
    ("accuracy", "longer", "verdict"),
    [
        ((0.66, 0.76), (0.48, 0.62), "above"),
        ((0.60, 0.70), (0.48, 0.62), "unclear"),
        ((0.55, 0.62), (0.36, 0.42), "unclear"),  # the shorter answer is right in 58 to 64 of 100
        ((0.66, 0.76), (0.36, 0.42), "above"),
        ((0.20, 0.30), (0.48, 0.62), "below"),
    ],
)
def test_reward_model_is_held_against_both_length_rules(
    accuracy: tuple[float, float], longer: tuple[float, float], verdict: str
) -> None:
    accuracy_estimate, baseline = ({"low": low, "high": high} for low, high in (accuracy, longer))
    assert judge_reward_model({"accuracy": accuracy_estimate, "length_baseline": baseline}) == verdict


def test_summary_says_what_the_numbers_say(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "run", stages=SWEEP, steps=2, accuracy=(0.57, 0.55))
    gains = {"dpo-beta=0.03": (0.9, 0.7, 1.1), "dpo-beta=0.1": (-0.5, -0.7, -0.3), "dpo-beta=0.3": (0.1, -0.1, 0.3),
             "grpo": (1.23, 1.01, 1.45), "ppo": (0.0, -0.2, 0.2)}  # fmt: skip
    metrics = read_json(run.metrics)
    for name, gain in gains.items():
        metrics["policies"][name]["reward_gain"] = dict(zip(("mean", "low", "high"), gain, strict=True))
    metrics["policies"]["grpo"]["kl"] = {"mean": 3.1, "low": 2.83, "high": 3.36, "n": 60}
    write_json(run.metrics, metrics)
    tree = Tree(render(recipe, run)).root
    short = next(e for e in tree.all() if e.tag == "section" and e.attrs["aria-labelledby"] == "short")
    text = " ".join(short.text().split())
    assert "dpo-beta=0.03 and grpo score better than the reference; dpo-beta=0.1, dpo-beta=0.3 and ppo do not." in text
    assert "grpo better than the reference by the reward model: +1.23 [+1.01, +1.45] at 3.10 [2.83, 3.36] nats" in text
    assert "dpo-beta=0.1 worse than the reference" in text
    assert "dpo-beta=0.3 no significant difference from the reference" in text
    assert "That is not clear of what length alone can do" in text
    assert "grpo and ppo were trained to raise this very score" in text
    assert "A win rate by an independent judge is not part of this run" in text


def test_samples_alternate_between_subsets_and_show_one_prompt_in_every_file() -> None:
    rows = [{"id": str(index), "subset": "ab"[index >= 6]} for index in range(9)]
    samples = choose_samples([rows, rows[::-1]])
    assert [line for line, _ in samples] == [0, 6, 1, 7, 2, 8, 3, 4]
    assert all(rows[line]["id"] == rows[::-1][other]["id"] for line, other in samples)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ((1.234, 1.012, 1.449), "1.23 [1.01, 1.45]"),
        ((-0.0004, -0.21, 0.2), "0.00 [−0.21, 0.20]"),
        ((412.4, 388.0, 431.0), "412 [388, 431]"),
        ((0.0123, 0.0119, 0.0127), "0.01230 [0.01190, 0.01270]"),
        ((0.0, 0.0, 0.0), "0"),
    ],
)
def test_estimates_are_printed_to_the_precision_they_have(estimate: tuple[float, ...], text: str) -> None:
    assert format_estimate(dict(zip(("mean", "low", "high"), estimate, strict=True))) == text


def around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


@pytest.mark.parametrize("width", [360, 900])
def test_names_of_nearby_policies_do_not_cover_each_other(width: int) -> None:
    places = (("dpo", 4.0, 1.0), ("grpo", 4.2, 1.02), ("ppo", 4.4, 0.98))
    points = [Point(name, name, around(kl, 0.3), around(gain, 0.1)) for name, kl, gain in places]
    svg = Tree(plot_reward_kl(points, width, 380, "key", "label")).root
    labels = {element.text(): element.attrs for element in svg.all() if element.tag == "text"}
    boxes = []
    for name in ("reference", "dpo", "grpo", "ppo"):
        x, y = float(labels[name]["x"]), float(labels[name]["y"])
        assert 0 < x < width and 0 < y < 380
        boxes.append((x, y, 3.3 * len(name)))
    for index, (x, y, half) in enumerate(boxes):
        for other_x, other_y, other_half in boxes[index + 1 :]:
            assert abs(x - other_x) >= half + other_half or abs(y - other_y) >= 10


def test_recipe_on_the_page_is_a_recipe_again(tmp_path: Path) -> None:
    stages = {name: STAGES[name] for name in ("sft", "rm", "dpo")}
    recipe, run = write_run(tmp_path / "run", stages=stages, count=4, steps=1)
    shown = next(element for element in Tree(render(recipe, run)).root.all() if element.tag == "pre").text()
    again = Recipe.model_validate(YAML(typ="safe", pure=True).load(shown))
    assert again.model_dump() == recipe.model_dump()
    assert list(again.stages) == ["sft", "rm", "dpo"]
    assert shown.startswith("name: run\n")


def test_report_refuses_an_unfinished_run(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "run", count=4, steps=2)
    run.done("grpo").unlink()
    with pytest.raises(UserError, match="train RECIPE grpo"):
        report(recipe, run)
    assert not run.report.exists()


def test_missing_exploration_and_null_values_are_no_obstacle(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "run", stages={"sft": STAGES["sft"]}, reward=None, steps=1)
    run.done("explore").unlink()
    summary = read_json(run.summary)
    summary["longer_is_chosen"] = None
    write_json(run.summary, summary)
    write_json(run.env, {**read_json(run.env), "git": "", "gpus": []})
    page = render(recipe, run)
    assert "not run from a git checkout" in page
    assert json.dumps("data/summary.json#/longer_is_chosen") + ">–<" in page
