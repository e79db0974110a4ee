"""The report: every number traced to its file, hostile text inert, honest sentences, one self-contained file."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from markupsafe import Markup
from matplotlib.figure import Figure
from report_fixtures import GOLD, PROMPTS, STAGES, SWEEP, write_run
from ruamel.yaml import YAML

from rlhf_trl.figures.frontier import draw_frontier
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.report import figures as report_figures
from rlhf_trl.report.beside import compare_runs, lay_beside
from rlhf_trl.report.figures import draw_frontiers
from rlhf_trl.report.sentences import judge_gain, judge_share, order_alarms, read_habits, shows_length
from rlhf_trl.report.step import choose_samples, list_contents, render, report
from rlhf_trl.report.values import MAX_CHARACTERS, Node, build_environment, printable, show_cell
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl
from rlhf_trl.run.layout import RunDir
from rlhf_trl.stats.trust import weigh_trust
from rlhf_trl.text.format import format_dollars, format_estimate

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "rect", "circle", "use"}
HOSTILE = "<script>alert(1)</script> {{7*7}} {% raw %} [/b] \x1b[31m \u202egpj.exe\u202c \x00 &lt; \"' onload=x </div>"
WITH_GOLD = {**STAGES, **GOLD}


def only(*names: str) -> dict[str, Any]:
    return {name: WITH_GOLD[name] for name in names}


JUDGED_BY_GOLD: dict[str, Any] = {"evaluation": {"gold": "gold"}}
HUB = {"gold": "org/gold-70b", "best_of_n": 0, "adversarial": False}
SEEDS = {**WITH_GOLD, "dpo": {**STAGES["dpo"], "sweep": {"seed": [1, 2, 3, 4, 5]}}}
ATTACK = {"prompts": [[{"role": "user", "content": HOSTILE}]], "answers": [HOSTILE, "x" * 1_000_000, ""]}
RUNS: dict[str, dict[str, Any]] = {
    "sweep": {"stages": SWEEP},
    "gold": {"stages": WITH_GOLD, "evaluation": {"gold": "gold", "checkpoints": 4}},
    "seeds": {"stages": SEEDS, **JUDGED_BY_GOLD},
    "hub-judges": {"stages": only("sft", "dpo"), "reward": "org/rm-7b", "evaluation": HUB},
    "no-judge": {"stages": only("sft", "dpo"), "reward": None},
    "reward-model-only": {"stages": only("sft", "rm"), "accuracy": (0.58, 0.55)},
    "judged": {"stages": WITH_GOLD, **JUDGED_BY_GOLD, "judge": "good"},
    "judged-by-chance": {"stages": only("sft", "rm", "dpo", "grpo"), "judge": "chance"},
    "judged-by-gold": {"stages": only("sft", "rm", "gold", "dpo"), **JUDGED_BY_GOLD, "judge": "gold"},
    "judged-in-part": {"stages": {**only("sft", "dpo"), "dpo-2": STAGES["dpo"]}, "reward": None, "judge": "partial"},
    "judged-in-silence": {"stages": only("sft", "rm", "dpo", "grpo"), "judge": "silent"},
    "not-judged": {"stages": only("sft", "rm", "dpo"), "judge": "not run"},
    "hostile": {"stages": only("sft", "rm", "dpo"), **ATTACK, "subsets": ("<b>sub</b>", "a/b~c d")},
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


BESIDE = {"judged beside seeds": ("judged", "seeds"), "hostile beside no-judge": ("hostile", "no-judge")}


@pytest.fixture(scope="module", params=[*RUNS, *BESIDE])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Element]:
    """The page of a run, or of two beside each other, and the folder that its addresses begin in."""
    folder = tmp_path_factory.mktemp("runs")
    made = [write_run(folder / name, **{"count": 24, "steps": 6, **RUNS[name]})
            for name in BESIDE.get(request.param, [request.param])]  # fmt: skip
    if len(made) == 2:
        return folder, Tree(lay_beside(made[0][1], made[1][1]).read_text(encoding="utf-8")).root
    report(*made[0])
    return folder / request.param, Tree(made[0][1].report.read_text(encoding="utf-8")).root


@functools.cache
def load(path: Path) -> Any:
    return read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)


def resolve(root: Path, address: str) -> Any:
    """Follow an address as RFC 6901 says, with nothing of the report's own code."""
    file, _, pointer = address.partition("#")
    value = load(root / file)
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
    if isinstance(value, list):
        return text == (", ".join(map(str, value)) or "none")
    if "seconds" in address.rpartition("/")[2]:
        return abs(seconds(text) - value) <= (0.05 if value < 60 else 0.5 if value < 3600 else 60)
    expected = [value["mean"], value["low"], value["high"]] if isinstance(value, dict) else [value]
    assert text.count("∞") == expected.count(None)
    expected = [number for number in expected if number is not None]
    found = numbers(text)
    if len(found) == 1 and len(expected) == 3 and expected[1] == expected[2]:
        expected = expected[:1]
    close = [abs(number - true) <= half * 1.001 for (number, half), true in zip(found, expected, strict=True)]
    return all(close)


def test_every_value_on_the_page_is_what_its_source_holds(page: tuple[Path, Element]) -> None:
    root, tree = page
    marked = [element for element in tree.all() if "data-source" in element.attrs]
    assert len(marked) > 15
    wrong = [
        (element.attrs["data-source"], element.text()[:80])
        for element in marked
        if not shows(element.text(), resolve(root, element.attrs["data-source"]), element.attrs["data-source"])
    ]
    assert not wrong


def test_every_section_names_a_source_that_exists(page: tuple[Path, Element]) -> None:
    root, tree = page
    paths = [element.attrs["data-path"] for element in tree.all() if "data-path" in element.attrs]
    assert len(paths) > 3
    for path in paths:
        assert resolve(root, path) not in (None, {}, [])


def test_no_number_stands_on_the_page_without_a_source(page: tuple[Path, Element]) -> None:
    root, tree = page
    recipes = [read_json(path) for path in root.rglob("recipe.json")]
    names = {*(recipe["name"] for recipe in recipes), *(name for recipe in recipes for name in recipe["stages"])}
    names |= {name for path in root.rglob("summary.json") for name in read_json(path)["subsets"]}

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
    assert "url(" not in next(root.glob("*.html")).read_text().replace("url(#", "")


def test_ids_are_unique_and_every_reference_has_its_target(page: tuple[Path, Element]) -> None:
    root, tree = page
    elements = tree.all()
    ids = [element.attrs["id"] for element in elements if "id" in element.attrs]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:href="#|url\(#|aria-labelledby=")([\w-]+)', next(root.glob("*.html")).read_text()))
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


# --- what the page says ----------------------------------------------------------------------------------------------


@dataclass
class Page:
    recipe: Recipe
    run: RunDir
    html: str

    @functools.cached_property
    def root(self) -> Element:
        return Tree(self.html).root

    def section(self, name: str) -> Element | None:
        found = [e for e in self.root.all() if e.tag == "section" and e.attrs["aria-labelledby"] == name]
        return found[0] if found else None

    def words(self, name: str) -> str:
        section = self.section(name)
        assert section is not None
        return words(section)


def words(element: Element) -> str:
    return " ".join(element.text().split())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out of a test of the words: drawing takes most of the time."""
    svg = Markup('<svg role="img" aria-label="a figure that this test does not need"></svg>')
    monkeypatch.setattr(report_figures, "draw_panel", lambda *_, **__: svg)


@pytest.fixture
def show(tmp_path: Path, undrawn: None) -> Callable[..., Page]:
    """Write a run with a gold model, change its files, and render its page."""
    folders = (tmp_path / str(number) / "run" for number in itertools.count())

    def show(change: Callable[[RunDir], None] | None = None, policies: Sequence[str] = (), **options: Any) -> Page:
        stages = only("sft", "rm", "gold", *policies) if policies else WITH_GOLD
        evaluation = {"gold": "gold"} if "judge" in options else {"gold": "gold", "checkpoints": 4}
        base = {"stages": stages, "evaluation": evaluation, "count": 60 if "judge" in options else 12, "steps": 2}
        recipe, run = write_run(next(folders), **{**base, **options})
        if change:
            change(run)
        return Page(recipe, run, render(recipe, run))

    return show


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    content = read_json(path)
    yield content
    write_json(path, content)


def around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def say(estimate: dict[str, Any]) -> str:
    return format_estimate(estimate, percent=True).replace("\u00a0", " ")


def rate_of(run: RunDir, policy: str) -> dict[str, Any]:
    rates = read_json(run.winrate)["win_rates"]
    return next(rate for rate in rates if (rate["a"], rate["b"]) == (policy, "reference"))


def set_gains(score: str, gains: dict[str, float]) -> Callable[[RunDir], None]:
    def change(run: RunDir) -> None:
        with edited(run.metrics) as metrics:
            for name, gain in gains.items():
                metrics["policies"][name][f"{score}_gain"] = around(gain, 0.2)
        with edited(run.comparison) as compared:
            for name, gain in gains.items():
                outcome = "better" if gain > 0.2 else "worse" if gain < -0.2 else "trivial"
                compared["against_reference"][name].setdefault(score, {})["outcome"] = outcome

    return change


def test_summary_says_what_the_numbers_say(show: Callable[..., Page]) -> None:
    gains = {"dpo-beta=0.03": 0.9, "dpo-beta=0.1": -0.5, "dpo-beta=0.3": 0.1, "grpo": 1.23, "ppo": 0.0}
    page = show(set_gains("reward", gains), stages=SWEEP, evaluation={}, accuracy=(0.56, 0.55))
    text = page.words("short")
    assert "grpo better than the reference by the reward model: +1.23 [+1.03, +1.43] at " in text
    assert "dpo-beta=0.1 worse than the reference by the reward model" in text
    assert "dpo-beta=0.3 no significant difference from the reference" in text
    assert "It has not shown that it can tell better answers: that is not clear of what length alone can do" in text
    assert "grpo and ppo were trained to raise this very score" in text
    assert "A win rate by an independent judge is not part of this run" in text


def test_summary_says_what_the_gold_model_and_the_alarms_say(show: Callable[..., Page]) -> None:
    text = show(set_gains("gold", {"dpo": 0.4, "grpo": 0.1, "ppo": -0.42})).words("short")
    worse = (
        "worse than the reference by the gold model: −0.42 [−0.62, −0.22] alarm raised: gold, length (what was seen)"
    )
    assert worse in text
    assert "better than the reference by the gold model: +0.40" in text
    assert "no significant difference from the reference by the gold model: +0.10 [−0.10, +0.30]" in text
    assert "No policy was trained to please the gold model" in text
    assert text.count("alarm raised") == 1 and "None of the alarms" not in text


def test_a_gold_model_that_a_policy_was_trained_with_is_not_called_independent(show: Callable[..., Page]) -> None:
    page = show(stages={**WITH_GOLD, "ppo": {**STAGES["ppo"], "reward": "gold"}})
    assert "no policy was trained" not in page.words("short").lower()


def test_raised_alarms_stand_alone_and_all_of_them_in_a_fold(show: Callable[..., Page]) -> None:
    page = show()
    found = page.section("alarms")
    assert found is not None
    tables = [element for element in found.all() if element.tag == "tbody"]
    (fold,) = [element for element in found.all() if element.tag == "details"]
    assert tables[1] in fold.all() and tables[0] not in fold.all()
    rows = [[e for e in row.children if isinstance(e, Element)] for row in tables[0].all() if row.tag == "tr"]
    assert [[words(cell) for cell in row[:2]] for row in rows] == [["ppo", "gold"], ["ppo", "length"]]
    assert words(rows[1][2]) == "answers are 1.70 times as long as the reference's"
    alarms = read_json(page.run.over_optimisation)["alarms"]
    assert len([row for row in tables[1].all() if row.tag == "tr"]) == len(alarms)


def test_without_an_alarm_the_page_says_so(show: Callable[..., Page]) -> None:
    def quiet(run: RunDir) -> None:
        with edited(run.over_optimisation) as over:
            over["alarms"] = [{**alarm, "raised": False} for alarm in over["alarms"]]

    page = show(quiet)
    assert "None of the alarms for over-optimisation was raised." in page.words("short")
    assert "No alarm was raised." in page.words("alarms")


def test_sections_stand_only_where_their_data_exist(show: Callable[..., Page]) -> None:
    plain = show(stages=STAGES, evaluation={"best_of_n": 0, "adversarial": False})
    assert plain.section("adversarial") is None
    assert "gold" not in plain.words("results").replace("Gold gain", "")
    for absent in ("picked by the reward model", "Along the training", 'href="#adversarial"'):
        assert absent not in plain.html
    full = show()
    assert "The same by the gold model" in full.words("results")
    assert "picked by the reward model" in full.words("results")
    for name in ("reference", "dpo", "grpo", "ppo"):
        assert name in full.words("adversarial")
    assert "Along the training" in full.words("alarms")
    unscored = show(reward=None, stages={"dpo": STAGES["dpo"] | {"init": None}}, evaluation={})
    assert "Gain at the same KL" not in unscored.html and unscored.section("reward_models") is None


def test_a_method_that_never_got_so_far_has_a_dash(show: Callable[..., Page]) -> None:
    page = show()
    last = read_json(page.run.pareto)["axes"]["reward"]["at_kl"][-1]
    assert last["kl"] == 20.0 and set(last["gains"].values()) == {None}
    cells = [e for e in page.root.all() if "/at_kl/2/gains/" in e.attrs.get("data-source", "")]
    assert len(cells) == 2 * 4  # reward and gold; three trainers and best of n
    assert {cell.text() for cell in cells} == {"–"}


def test_courses_say_where_the_measured_peak_is(show: Callable[..., Page]) -> None:
    def fit(run: RunDir) -> None:
        inside = {"alpha": 1.0, "beta": 0.5, "peak_sqrt_kl": 1.5, "peak_kl": 2.25, "r2": 0.9}
        beyond = {**inside, "peak_sqrt_kl": 30.0, "peak_kl": 900.0}
        with edited(run.over_optimisation) as over:
            over["stages"]["ppo"]["fit"] = {"proxy": beyond, "gold": inside}
            over["stages"]["dpo"]["fit"] = {"proxy": None, "gold": None}

    figures = [words(e) for e in show(fit).root.all() if e.tag == "figcaption"]
    captions = {text.split()[0]: text for text in figures if "gold model" in text}
    assert captions["ppo"] == "ppo reward model, no peak within the points gold model, peak at 2.25 nats"
    assert captions["dpo"] == "dpo reward model gold model"


def test_findings_of_the_error_analysis_are_on_the_page_with_their_files(show: Callable[..., Page]) -> None:
    found = show().section("reward_models")
    assert found is not None
    text = words(found)
    for stage in ("rm", "gold"):
        assert f"Where {stage} is wrong It is better than a coin" in text
        assert f"Attention: {stage} prefers longer answers more than the humans do." in text
    assert "No difference is seen between rm and gold." in text
    assert text.count("Attention") == 2  # the other findings are no alarms


def test_the_health_of_a_stage_is_on_the_page(show: Callable[..., Page]) -> None:
    def sick(run: RunDir) -> None:
        with edited(run.training_stats("rm")) as stats:
            stats["health"] = [{"what": "over_chance", "says": "the accuracy is not clear of chance (step 2)"}]

    assert "rm: the accuracy is not clear of chance (step 2)" in show(sick).words("training")
    assert "clear of chance" not in show().words("training")


def test_contents_name_what_the_steps_wrote_and_nothing_else(show: Callable[..., Page]) -> None:
    def more(run: RunDir) -> None:
        for path in (run.figure("pareto"), run.root / "other" / "adapter" / "file", run.holder("sft")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    page = show(more)
    contents = dict(list_contents(page.recipe, page.run))
    there = {"pareto.png", "adversarial.json", "over_optimisation.json", "completions-dpo.jsonl"}
    assert {f"evaluation/{name}" for name in there} <= set(contents)
    files = ("error_analysis.json", "error_examples.jsonl")
    assert {f"{stage}/evaluation/{name}" for stage in ("rm", "gold") for name in files} <= set(contents)
    assert {"recipe.json", "sft/training_stats.json", "errors/comparison.json"} <= set(contents)
    assert not {"evaluation/kl_drift.png", "other/adapter", ".locks/sft", "judge/winrate.json"} & set(contents)
    assert set(contents) <= {unquote(e.attrs["href"]) for e in page.root.all() if "href" in e.attrs}


def test_recipe_on_the_page_is_a_recipe_again(show: Callable[..., Page]) -> None:
    page = show(policies=["dpo"])
    shown = next(element for element in page.root.all() if element.tag == "pre").text()
    again = Recipe.model_validate(YAML(typ="safe", pure=True).load(shown))
    assert again.model_dump() == page.recipe.model_dump()
    assert list(again.stages) == ["sft", "rm", "gold", "dpo"]
    assert shown.startswith("name: run\n")


def test_missing_exploration_and_null_values_are_no_obstacle(show: Callable[..., Page]) -> None:
    def bare(run: RunDir) -> None:
        run.done("explore").unlink()
        with edited(run.summary) as summary, edited(run.env) as env:
            summary["longer_is_chosen"] = None
            env |= {"git": "", "gpus": []}

    page = show(bare, stages={"sft": STAGES["sft"]}, reward=None, evaluation={})
    assert "not run from a git checkout" in page.html
    assert re.search(r'data-source="data/summary.json#/longer_is_chosen"[^>]*>–<', page.html)


@pytest.mark.parametrize(("step", "judge"), [("grpo", None), ("judge", "good")])
def test_report_refuses_an_unfinished_run(show: Callable[..., Page], step: str, judge: str | None) -> None:
    page = show(judge=judge)
    page.run.done(step).unlink()
    with pytest.raises(UserError, match="train RECIPE grpo" if step == "grpo" else "judge RECIPE"):
        report(page.recipe, page.run)
    assert not page.run.report.exists()


def test_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    recipe, run = write_run(tmp_path / "run", stages=only("sft", "rm", "dpo"), count=12)
    assert render(recipe, run) == render(recipe, run)


# --- hostile texts ---------------------------------------------------------------------------------------------------


def check_inert(page: Page) -> None:
    assert "{{7*7}}" in page.html and "alert(1)" in page.html
    assert not re.search(r"<script|<b>sub|\[/b\] \x1b|[\x00\x1b\u202e\u202c]", page.html)
    assert not [e for e in page.root.all() if any(name.startswith("on") for name in e.attrs)]


def test_hostile_text_is_shown_and_does_nothing(show: Callable[..., Page]) -> None:
    page = show(**{"evaluation": {}, **RUNS["hostile"], "count": 4})
    check_inert(page)
    assert "[/b] ⟨U+001B⟩[31m ⟨U+202E⟩gpj.exe⟨U+202C⟩ ⟨U+0000⟩" in page.html
    for shown in ("&lt;b&gt;sub&lt;/b&gt;", "1,000,000 characters in all", "an empty text"):
        assert shown in page.html
    assert len(page.html) < 1_000_000


def test_hostile_texts_of_every_file_are_inert(show: Callable[..., Page]) -> None:
    def attack(run: RunDir) -> None:
        with edited(run.over_optimisation) as over:
            over["alarms"][0] |= {"alarm": f"refusal:{HOSTILE}", "says": HOSTILE, "raised": True}
        with edited(run.error_analysis("rm")) as analysis:
            analysis["findings"][0]["says"] = HOSTILE
        with edited(run.metrics) as metrics:
            metrics["policies"]["dpo"]["health"]["common_opening"]["text"] = HOSTILE
        with edited(run.winrate) as result:
            result["reason"] = result["judge"]["name"] = result["judge"]["id"] = result["cost"]["models"][0] = HOSTILE
            result["win_rates"][0]["length_controlled"]["warnings"] = [HOSTILE]
            result["win_rates"][0]["missing"] = {"comparisons": 1, "verdicts": {HOSTILE: 2}}

    options = {"judge": "partial", "subsets": ("<b>sub</b>", "a/b~c d"), "answers": [HOSTILE, "fine"]}
    check_inert(show(attack, policies=["dpo"], **options))


@pytest.mark.parametrize(
    "character", [*map(chr, range(0x202A, 0x202F)), "\u2066", "\u200b", "\ufeff", "\x9b", "\r", "\ud800"]
)
def test_characters_that_act_or_hide_are_printed_as_codes(character: str) -> None:
    assert printable(f"a{character}b") == f"a⟨U+{ord(character):04X}⟩b"


def test_text_of_all_scripts_is_left_alone() -> None:
    text = "naïve – “quoted”\n\tעברית العربية हिन्दी 日本語 👩\u200d🚀 می\u200cخواهم"
    assert printable(text) == text


@pytest.mark.parametrize("template", ["{{ number }}", "{{ node.kl }}", "{{ node.kl ~ '' }}", "{{ node }}"])
def test_a_number_cannot_be_printed_without_its_source(template: str) -> None:
    with pytest.raises(TypeError, match="without its source"):
        build_environment().from_string(template).render(number=0.93, node=Node({"kl": 0.93}, "metrics.json"))


def test_a_cell_has_a_dash_only_where_its_path_allows_one() -> None:
    row = Node({"kl": 0.5, "gold": None}, "metrics.json")
    assert show_cell(row, "number", "gain.mean.?") == show_cell(row, "number", "gold.mean.?") == "–"
    assert 'data-source="metrics.json#/kl"' in show_cell(row, "number", "kl")
    with pytest.raises(KeyError):
        show_cell(row, "number", "gain")


# --- the judge -------------------------------------------------------------------------------------------------------


def test_win_rates_of_a_judge_that_has_shown_its_worth(show: Callable[..., Page]) -> None:
    def control(run: RunDir) -> None:
        with edited(run.winrate) as result:
            for rate in result["win_rates"]:
                if (rate["a"], rate["b"]) == ("dpo", "reference"):
                    rate["length_controlled"]["length_controlled"] = around(0.61, 0.04)
                    rate["length_controlled"]["warnings"] = ["the judge goes by length"]
                elif rate["b"] == "reference":
                    rate["length_controlled"]["length_controlled"]["mean"] = rate["win_rate"]["mean"] + 0.009

    page = show(control, judge="good", policies=["dpo", "ppo"])
    dpo, ppo = rate_of(page.run, "dpo"), rate_of(page.run, "ppo")
    assert dpo["win_rate"]["low"] > 0.5 > ppo["win_rate"]["high"]
    text, card, short = page.words("short"), page.words("judge"), page.section("short")
    by = "against the reference by the language model gpt-4.1-mini"
    assert f"wins {say(dpo['win_rate'])} {by}, more than half; 61.0 % [57.0, 65.0] at equal length (with a w" in text
    assert f"wins {say(ppo['win_rate'])} {by}, less than half" in text
    assert text.count("at equal length") == 1
    assert short and {"more than half", "less than half"} <= {words(e) for e in short.all() if e.tag == "strong"}
    accuracy = read_json(page.run.winrate)["calibration"]["all"]["accuracy"]
    assert f"The language model gpt-4.1-mini finds the preferred answer in {say(accuracy)}" in text
    assert "clear of chance and of length alone" in text and "independent judge is not part" not in text
    assert "has not shown" not in words(page.root)
    assert "Attention: dpo against reference, at equal length: the judge goes by length" in card
    for cause, count in dpo["missing"]["verdicts"].items():
        assert f"{count} {cause}" in card
    assert "Win rate by the judge" in page.words("results")


def test_the_section_has_every_number_of_the_judge(show: Callable[..., Page]) -> None:
    found = show(judge="good", policies=["dpo", "grpo"]).section("judge")
    assert found is not None
    addresses = {e.attrs["data-source"].partition("#")[2] for e in found.all() if "data-source" in e.attrs}
    groups = {
        "/habits": ("consistency", "first_share", "tie_rate", "invalid_rate", "prefers_longer"),
        "/canaries": ("difference", "with_note", "without_note", "n"),
        "/cost": ("calls", "usd", "price/input", "price/cached", "price/output", "models/0"),
        "/ratings/ratings": ("reference", "dpo", "grpo"),
        "/comparisons/0": ("difference", "sign_test/p_holm"),
        "/judge": ("id", "is"),
    }
    for subset in ("", "/subsets/harmless-base", "/subsets/helpful-base"):
        calibrated = ("accuracy", "kappa", "both_correct", "length_rule/accuracy", "n")
        groups |= {f"/calibration{subset or '/all'}": calibrated}
        groups |= {f"/win_rates/{rate}{subset}": ("win_rate", "wins", "ties", "n") for rate in range(3)}
    numbers = {f"{group}/{name}" for group, names in groups.items() for name in names} | {"/prompts"}
    numbers |= {f"/win_rates/{rate}/length_controlled/length_controlled" for rate in range(3)}
    assert numbers <= addresses
    fold = next(e for e in found.all() if e.tag == "details")
    inside = {e.attrs["data-source"].partition("#")[2] for e in fold.all() if "data-source" in e.attrs}
    assert not [
        address for address in addresses - inside if address.startswith("/win_rates") and "/subsets/" in address
    ]


def test_one_policy_is_compared_with_no_other(show: Callable[..., Page]) -> None:
    text = show(judge="unlabelled", policies=["dpo"]).words("judge")
    assert "Win rates" in text and "Elo" not in text and "Policies beside each other" not in text


NOT_SHOWN = "has not shown that it can tell better answers: "


@pytest.mark.parametrize(
    ("judge", "why"),
    [
        ("chance", "that is not clear of a coin"),
        ("length", "that is not clear of what length alone can do"),
        ("unlabelled", "nothing here holds it against human labels"),
        ("silent", "it gave no verdict in both orders on any pair"),
    ],
)
def test_a_judge_that_has_not_shown_its_worth_is_not_believed(show: Callable[..., Page], judge: str, why: str) -> None:
    def beat_chance(run: RunDir) -> None:
        with edited(run.winrate) as result:
            result["calibration"]["all"]["accuracy"] = {**around(0.6, 0.05), "n": 71}
            result["calibration"]["verdict"] = "length"

    page = show(beat_chance if judge == "length" else None, judge=judge, policies=["grpo"])
    short = page.section("short")
    assert short is not None
    for name in ("short", "judge"):
        assert NOT_SHOWN + why in page.words(name)
    lines = [e for e in short.all() if e.tag == "span" and "line" in e.attrs.get("class", "").split()]
    line = next(e for e in lines if "language model" in words(e))
    assert line.attrs["class"].split() == ["line"]
    assert "strong" not in {e.tag for e in line.all()}
    if judge == "silent":
        assert words(line) == "no win rate by the language model gpt-4.1-mini: no prompt has a verdict in both orders"
    elif judge != "unlabelled":
        assert "The judge has not shown that it can tell better answers." in page.words("results")


def test_a_gold_reward_model_is_called_what_it_is(show: Callable[..., Page]) -> None:
    def doubt(run: RunDir) -> None:  # not clear of length by its accuracy on held-out pairs
        with edited(run.winrate) as result:
            result["calibration"]["reward_model"]["length_rule"]["over_rule"] |= around(0.02, 0.05)

    page = show(doubt, judge="gold", policies=["dpo"])
    short, card = page.words("short"), page.words("judge")
    assert "against the reference by the gold reward model gold, " in short
    assert "The win rates are a reward model's, too: they are no person's opinion, and no language model's." in short
    assert NOT_SHOWN + "that is not clear of what length" in short
    assert "The judge is gold reward model gold: a reward model, not a person and not a language model." in card
    for text in (short, card):
        said = text.replace("not a language model", "").replace("no language model's", "")
        assert "language model" not in said and "independent judge" not in said
    assert "Same verdict in both orders" not in card and "What it cost" not in card  # it knows no order


def test_a_rule_for_tests_is_called_one(show: Callable[..., Page]) -> None:
    text = show(judge="offline", policies=["dpo"]).words("short")
    assert "against the reference by the rule offline" in text
    assert "a rule for tests, which says nothing about how good an answer is" in text


def test_a_judge_that_was_not_run_gives_no_number(show: Callable[..., Page]) -> None:
    page = show(judge="not run", policies=["dpo"])
    report(page.recipe, page.run)  # although the step is not finished
    short = page.words("short")
    assert "The judge, the language model gpt-4.1-mini, was not run: OPENAI_API_KEY is not set" in short
    assert "A win rate by an independent judge is not part of this run" in short
    assert "was not run: OPENAI_API_KEY is not set" in page.words("judge")
    marked = [e for e in page.root.all() if e.attrs.get("data-source", "").startswith("judge/")]
    assert marked and {e.attrs["class"] for e in marked} == {"text"}
    assert "Win rate by the judge" not in page.html and "more than half" not in page.html


def test_a_partial_judging_says_so_and_why(show: Callable[..., Page]) -> None:
    page = show(judge="partial", policies=["dpo", "grpo"])
    report(page.recipe, page.run)
    short = page.words("short")
    assert "The judging is not finished: max_requests reached: 40 calls." in short
    assert f"wins {say(rate_of(page.run, 'dpo')['win_rate'])} against the reference" in short
    assert "not yet compared with the reference by the language model gpt-4.1-mini" in short
    assert "It is not finished: max_requests reached: 40 calls." in page.words("judge")
    with edited(page.run.winrate) as result:  # stopped before the first comparison of policies
        result |= {"prompts": 0, "win_rates": [], "comparisons": [], "ratings": None, "pareto": None}
    page = Page(page.recipe, page.run, render(page.recipe, page.run))
    assert "No comparison was made." in page.words("judge")
    assert page.words("short").count("not yet compared") == 2


def test_without_a_reward_model_the_win_rate_is_what_there_is(show: Callable[..., Page]) -> None:
    page = show(judge="good", stages=only("sft", "dpo"), reward=None, evaluation={})
    assert "and only by the judge's win rates whether it became better" in page.words("short")
    assert page.words("results").startswith("Win rate against distance from the reference Win rate by the judge")


def test_a_judge_that_the_recipe_does_not_name_is_not_on_the_page(show: Callable[..., Page]) -> None:
    page = show(judge="good", policies=["dpo"])
    paths = [path for path, _ in list_contents(page.recipe, page.run)]
    assert {"judge/winrate.json", "judge/gpt-4.1-mini@0f4a3c2b1d5e.jsonl"} <= set(paths)
    recipe = page.recipe.model_copy(update={"judge": None})
    page = Page(recipe, page.run, render(recipe, page.run))
    assert page.section("judge") is None and 'href="#judge"' not in page.html
    assert "A win rate by an independent judge is not part of this run" in page.words("short")
    assert not [path for path, _ in list_contents(recipe, page.run) if path.startswith("judge/")]


def test_a_second_decoding_is_said(show: Callable[..., Page]) -> None:
    decoding = {"gold": "gold", "judge_decoding": {"temperature": 0.7, "top_p": 0.9}}
    text = show(judge="good", policies=["dpo"], evaluation=decoding).words("judge")
    assert "The answers are a second set, sampled at temperature 0.7 with top-p 0.9" in text


# --- sentences and formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "verdict"),
    [((0.6, 0.51, 0.7), "better"), ((0.6, 0.5, 0.7), "same"), ((0.4, 0.3, 0.49), "worse"), ((None,) * 3, "unknown")],
)
def test_a_share_is_held_against_half_by_its_interval(share: tuple[float | None, ...], verdict: str) -> None:
    assert judge_share(dict(zip(("mean", "low", "high"), share, strict=True))) == verdict


@pytest.mark.parametrize("outcome", ["better", "worse", "trivial", "equivalent", "same", None])
def test_verdict_follows_the_claim_that_was_corrected_with_all_others(outcome: str | None) -> None:
    claims = {"reward": {"outcome": outcome}} if outcome else {}
    assert judge_gain({"reward_gain": {}}, claims, "reward") == (outcome if outcome in ("better", "worse") else "same")
    assert judge_gain({}, claims, "reward") == "unscored"


@pytest.mark.parametrize(
    ("low", "over", "trust"),
    [(0.66, (0.02, 0.1), "informed"), (0.55, (-0.02, 0.1), "length"), (0.5, (0.3, 0.5), "chance")],
)
def test_a_reward_model_that_judges_is_held_to_chance_and_length(
    low: float, over: tuple[float, float], trust: str
) -> None:
    rule = {"over_rule": {"low": over[0], "high": over[1]}}
    model = {"accuracy": {"mean": 0.7, "low": low, "high": 0.8}, "length_rule": rule}
    result = {"judge": {"kind": "reward"}, "calibration": {"reward_model": model, "verdict": None}}
    assert weigh_trust(result) == trust
    assert weigh_trust({**result, "calibration": {"reward_model": None, "verdict": None}}) == "none"


@pytest.mark.parametrize(
    ("controlled", "plain", "warnings", "shown"),
    [(0.605, 0.6, 0, False), (0.62, 0.6, 0, True), (0.58, 0.6, 0, True), (0.6, 0.6, 1, True), (None, None, 0, False)],
)
def test_the_length_controlled_figure_stands_by_when_it_says_more(
    controlled: float | None, plain: float | None, warnings: int, shown: bool
) -> None:
    rate = {"raw": {"mean": plain}, "length_controlled": {"mean": controlled}, "warnings": ["no overlap"] * warnings}
    assert shows_length(rate) == shown


def test_habits_are_read_from_their_intervals() -> None:
    def read(kind: str, share: dict[str, Any], note: dict[str, Any] | None = None) -> dict[str, str]:
        names = ("consistency", "first_share", "invalid_rate", "tie_rate", "prefers_longer")
        canaries = note and {"difference": note}
        result = {"judge": {"kind": kind}, "habits": dict.fromkeys(names, share), "canaries": canaries}
        return {row["key"]: row["says"] for row in read_habits(result)}

    high, half = (read("openai", around(mean, 0.05), around(mean - 0.6, 0.2)) for mean in (0.9, 0.5))
    low, none = (
        read("openai", around(0.0, 0.0), around(-0.3, 0.1)),
        read("openai", dict.fromkeys(("mean", "low", "high"))),
    )
    assert "seldom changes" in high["consistency"] and "coin" in half["consistency"]
    assert "some verdicts" in read("openai", around(0.7, 0.05))["consistency"]
    assert "more often than not" in low["consistency"] and "Nothing" in none["consistency"]
    assert "shown first" in high["first_share"] and "No preference" in half["first_share"]
    assert "shown second" in low["first_share"]
    assert "left out" in high["invalid_rate"] and low["invalid_rate"] == "Every reply had a verdict."
    assert "longer answer wins" in high["prefers_longer"] and "shorter" in low["prefers_longer"]
    assert "sways" in high["difference"] and "No effect" in half["difference"] and "against" in low["difference"]
    assert "difference" not in none
    assert list(read("reward", around(0.9, 0.05))) == ["tie_rate", "prefers_longer"]


def test_alarms_are_ordered_by_raised_then_policy() -> None:
    alarms = [{"policy": policy, "raised": raised} for policy, raised in (("b", 0), ("b", 1), ("a", 1), ("a", 0))]
    assert order_alarms(alarms, ["a", "b", "c"]) == [2, 1, 3, 0]


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
        ((212.4, 96.0, None), "212 [96, ∞]"),
        ((212.4, None, 388.0), "212 [−∞, 388]"),
        ((212.4, None, None), "212 [−∞, ∞]"),
    ],
)
def test_estimates_are_printed_to_the_precision_they_have(estimate: tuple[float | None, ...], text: str) -> None:
    assert format_estimate(dict(zip(("mean", "low", "high"), estimate, strict=True))) == text


@pytest.mark.parametrize(
    ("dollars", "text"),
    [(0.0, "$0.00"), (0.4, "$0.40"), (12.344, "$12.34"), (0.0312, "$0.031"), (0.00004, "$0.000040")],
)
def test_dollars_are_not_rounded_to_nothing(dollars: float, text: str) -> None:
    assert format_dollars(dollars) == text


# --- figures ---------------------------------------------------------------------------------------------------------


def frontier(*places: tuple[str, float, float], origin: float = 0.0, half: float = 0.1) -> dict[str, Any]:
    points = [("reference", None, around(0, 0), around(origin, 0))]
    points += [(name, name, around(kl, 0.3), around(gain, half)) for name, kl, gain in places]
    keys = ("policy", "trainer", "kl", "gain")
    rows = [{**dict(zip(keys, point, strict=True)), "step": None, "on_front": True} for point in points]
    return {"points": rows, "best_of_n": []}


@pytest.mark.parametrize(("form", "width"), [("narrow", 360), ("wide", 900)])
def test_every_policy_is_named_inside_the_figure(form: str, width: int) -> None:
    names = [f"dpo-beta=0.0{place}" for place in range(1, 9)]
    drawn = frontier(*((name, place / 9, place / 9) for place, name in enumerate(names)))
    for point in drawn["points"][1:]:
        point["trainer"] = "dpo"
    svg = Tree(draw_frontiers({"axes": {"reward": drawn}})[0][form]).root
    labels = {element.text(): element.attrs for element in svg.all() if element.tag == "text"}
    boxes = [(float(labels[name]["x"]), float(labels[name]["y"]), 6 * len(name)) for name in ("reference", *names)]
    assert all(0 < x < x + size < width for x, _, size in boxes)
    for (x, y, size), (other_x, other_y, other_size) in itertools.combinations(boxes, 2):
        assert x + size <= other_x or other_x + other_size <= x or abs(y - other_y) >= 9


def test_the_figure_of_win_rates_is_about_half() -> None:
    drawn = frontier(("dpo", 4.0, 0.93), ("ppo", 9.0, 0.52), origin=0.5)
    svg = Tree(draw_frontiers({"axes": {}}, drawn)[0]["wide"]).root
    texts = [e.text() for e in svg.all() if e.tag == "text"]
    ticks = [float(text.removesuffix(" %")) for text in texts if text.endswith(" %")]
    assert len(ticks) > 2 and min(ticks) >= 0 and max(ticks) <= 100
    assert "win rate against the reference" in texts
    axes = Figure().add_subplot()
    draw_frontier(axes, drawn, "win_rate")
    assert list(axes.get_lines()[0].get_ydata()) == [0.5, 0.5]
    assert 0.3 < axes.get_ylim()[0] < 0.42  # the lowest interval ends at 0.42


# --- two runs beside each other --------------------------------------------------------------------------------------

TWO = {"stages": WITH_GOLD, "evaluation": {"gold": "gold"}, "judge": "good", "count": 24, "steps": 6}


def two_runs(folder: Path, **changes: Any) -> dict[str, tuple[Recipe, RunDir]]:
    return {"a": write_run(folder / "first", **TWO), "b": write_run(folder / "second", **{**TWO, **changes})}


def laid(runs: dict[str, tuple[Recipe, RunDir]]) -> dict[str, Any]:
    return compare_runs(
        {key: recipe for key, (recipe, _) in runs.items()}, {key: run for key, (_, run) in runs.items()}
    )


@pytest.mark.usefixtures("undrawn")
def test_the_policies_of_one_name_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    found = laid(runs)
    assert (found["why_not"], found["different"]) == (None, {"recipe": [], "versions": []})
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [
        (f"first {name}", f"second {name}") for name in ("dpo", "grpo", "ppo")
    ]
    # The invented answers of both runs are the same.
    assert {pair["measures"]["gold"]["equal_kl"]["outcome"] for pair in found["pairs"]} == {"indistinguishable"}
    rows = read_jsonl(runs["b"][1].completions("dpo"))
    write_jsonl(runs["b"][1].completions("dpo"), [{**row, "gold_gain": row["gold_gain"] + 2.0} for row in rows])
    better = laid(runs)["pairs"][0]
    assert "the adapter second dpo scores higher than the adapter first dpo: +2 on 24 prompts" in better["sentence"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompts": PROMPTS[:2], "count": 23}, "their held-out prompts differ"),
        ({"stages": {**WITH_GOLD, "gold": {**GOLD["gold"], "args": {"seed": 9}}}}, "scored by different reward"),
        ({"stages": {**WITH_GOLD, "sft": {**STAGES["sft"], "args": {"seed": 9}}}}, "start from different refer"),
        ({"evaluation": {"gold": "gold", "max_new_tokens": 9}}, "different longest lengths"),
        ({"stages": only("sft", "rm"), "evaluation": {}, "judge": None}, "has no policy"),
    ],
)
def test_gains_of_different_kinds_are_not_compared(tmp_path: Path, changes: Any, why: str) -> None:
    found = laid(two_runs(tmp_path, **changes))
    assert why in found["why_not"]
    assert found["pairs"] == []


@pytest.mark.usefixtures("undrawn")
def test_what_is_different_is_listed_with_both_values(tmp_path: Path) -> None:
    stages = {**TWO["stages"], "ppo": {**STAGES["ppo"], "args": {"kl_coef": 0.2}}, "more": STAGES["dpo"]}
    runs = two_runs(tmp_path, stages=stages)
    env = read_json(runs["b"][1].env)
    write_json(runs["b"][1].env, {**env, "versions": {**env["versions"], "trl": "1.12.1"}})
    assert laid(runs)["different"] == {
        "recipe": [
            {"key": "stages.more", "a": "–", "b": "dpo"},
            {"key": "stages.ppo.args.kl_coef", "a": "0.05", "b": "0.2"},
        ],
        "versions": [{"key": "trl", "a": "1.12.0", "b": "1.12.1"}],
    }


def test_a_run_beside_itself_or_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    _, run = write_run(tmp_path / "first", **TWO)
    with pytest.raises(UserError, match="the same run"):
        lay_beside(run, RunDir(tmp_path / "elsewhere" / ".." / "first"))
    with pytest.raises(UserError, match="is no run"):
        lay_beside(run, RunDir(tmp_path))
