"""The report: every number traced to its file, hostile text inert, an honest first screen, self-contained pages."""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from html_tree import Element, Tree, words
from markupsafe import Markup
from report_fixtures import GOLD, PROMPTS, STAGES, SUBSETS, SWEEP, follow, write_run
from typer.testing import CliRunner

from rlhf_trl.cli.app import app
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.report import step as report_step
from rlhf_trl.report.beside import compare_runs, lay_beside
from rlhf_trl.report.step import read_documents, render, render_answers, report, summarise
from rlhf_trl.report.values import MAX_CHARACTERS, Node, build_environment
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl
from rlhf_trl.run.layout import RunDir

HOSTILE = "<script>alert(1)</script> {{7*7}} {% raw %} [/b] \x1b[31m \u202egpj.exe\u202c \x00 &lt; \"' onload=x </div>"
WITH_GOLD = {**STAGES, **GOLD}


def only(*names: str) -> dict[str, Any]:
    return {name: WITH_GOLD[name] for name in names}


JUDGED_BY_GOLD: dict[str, Any] = {"evaluation": {"gold": "gold"}}
HUB = {"gold": "org/gold-70b", "best_of_n": 0, "adversarial": False}
SEEDS = {**WITH_GOLD, "dpo": {**STAGES["dpo"], "sweep": {"seed": [1, 2, 3, 4, 5]}}}
ATTACK = {"prompts": [[{"role": "user", "content": HOSTILE}]], "answers": [HOSTILE, "x" * 100_000, ""]}
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


BESIDE = {"judged beside seeds": ("judged", "seeds"), "hostile beside no-judge": ("hostile", "no-judge")}


@dataclass
class Page:
    """A page, and the folder that its addresses begin in."""

    root: Path
    path: Path

    @functools.cached_property
    def html(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @functools.cached_property
    def tree(self) -> Element:
        return Tree(self.html).root


@pytest.fixture(scope="module", params=[*RUNS, *BESIDE])
def pages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Page]:
    """The pages of a run, or the one of two runs beside each other."""
    folder = tmp_path_factory.mktemp("runs")
    made = [write_run(folder / name, **{"count": 24, "steps": 6, **RUNS[name]})
            for name in BESIDE.get(request.param, [request.param])]  # fmt: skip
    if len(made) == 2:
        return [Page(folder, lay_beside(made[0][1], made[1][1]))]
    report(*made[0])
    run = made[0][1]
    return [Page(run.root, run.report), Page(run.root, run.answers_page)]


@functools.cache
def load(path: Path) -> Any:
    return read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)


def resolve(root: Path, address: str) -> Any:
    file, _, pointer = address.partition("#")
    return follow(load(root / file), pointer)


def numbers(text: str) -> list[tuple[float, float]]:
    """Read the numbers of a text as a person does: value, and half a unit of its last printed digit."""
    text = text.replace("−", "-").replace(",", "").replace("\u00a0", " ")
    unit = {"%": 0.01, "points": 0.01, "GB": 1e9, "MB": 1e6}.get(text.split("[")[0].split()[-1], 1.0)
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


def test_every_value_is_what_its_source_holds(pages):
    marked = [(page.root, element) for page in pages for element in page.tree.all() if "data-source" in element.attrs]
    assert len(marked) > (15 if len(pages) == 2 else 3)
    wrong = [
        (element.attrs["data-source"], element.text()[:80])
        for root, element in marked
        if not shows(element.text(), resolve(root, element.attrs["data-source"]), element.attrs["data-source"])
    ]
    assert not wrong


def test_every_section_names_a_source_that_exists(pages):
    paths = [e.attrs["data-path"] for page in pages for e in page.tree.all() if "data-path" in e.attrs]
    assert len(paths) > 1
    assert all(resolve(pages[0].root, path) not in (None, {}, []) for path in paths)


def test_no_number_stands_on_a_page_without_a_source(pages):
    root = pages[0].root
    recipes = [read_json(path) for path in root.rglob("recipe.json")]
    names = {*(recipe["name"] for recipe in recipes), *(name for recipe in recipes for name in recipe["stages"])}
    names |= {recipe["evaluation"][key] for recipe in recipes for key in ("reward", "gold")}
    names |= {name for path in root.rglob("summary.json") for name in read_json(path)["subsets"]}

    def loose(element: Element) -> list[str]:
        classes = element.attrs.get("class", "").split()
        if element.tag in ("style", "svg", "code", "title") or "data-source" in element.attrs or "start" in classes:
            return []
        texts = [child.strip() for child in element.children if isinstance(child, str)]
        inner = [text for child in element.children if isinstance(child, Element) for text in loose(child)]
        return [text for text in texts if text and text not in names] + inner

    quantiles = {"5 %", "25 %", "75 %", "95 %"}
    for text in (text for page in pages for text in loose(page.tree)):
        text = text.replace("\u00a0", " ").replace("95 % interval", "")
        assert text in quantiles or not re.search(r"\d", text), text


def test_pages_are_self_contained_and_run_nothing(pages):
    banned = {"script", "iframe", "object", "embed", "img", "form", "base", "foreignobject", "animate", "set"}
    for page in pages:
        elements = page.tree.all()
        policies = [e.attrs["content"] for e in elements if e.attrs.get("http-equiv") == "Content-Security-Policy"]
        assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
        assert not banned & {element.tag for element in elements}
        for element in elements:
            assert not [name for name in element.attrs if name.startswith("on") or name in ("src", "srcset", "action")]
            link = element.attrs.get("href", element.attrs.get("xlink:href", "#"))
            assert link.startswith("#") or link == "data:," or (page.root / unquote(link)).is_relative_to(page.root)
            assert ":" not in link.removeprefix("data:")
        assert "url(" not in page.html.replace("url(#", "")


def test_ids_are_unique_and_every_reference_has_its_target(pages):
    ids = {page.path.name: [e.attrs["id"] for e in page.tree.all() if "id" in e.attrs] for page in pages}
    for page in pages:
        own = ids[page.path.name]
        assert len(own) == len(set(own))
        assert set(re.findall(r'(?:href="#|url\(#|aria-labelledby=")([\w-]+)', page.html)) <= set(own)
        for name, target in re.findall(r'href="(report|answers)\.html(?:#([\w-]+))?"', page.html):
            assert len(pages) == 1 or not target or target in ids[f"{name}.html"]


def test_every_figure_can_be_read_aloud_and_headings_descend(pages):
    for page in pages:
        for svg in (element for element in page.tree.all() if element.tag == "svg"):
            shown = svg.attrs.get("role") == "img" and len(svg.attrs["aria-label"]) > 20
            assert shown or svg.attrs["aria-hidden"] == "true"
        levels = [int(element.tag[1]) for element in page.tree.all() if re.fullmatch(r"h[1-6]", element.tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


# --- what the page says ----------------------------------------------------------------------------------------------


@dataclass
class Shown:
    """Both pages of a run, and the first screen as a program reads it."""

    recipe: Recipe
    run: RunDir

    def __post_init__(self) -> None:
        documents = read_documents(self.recipe, self.run)
        self.html = render(self.recipe, self.run, documents)
        self.answers = render_answers(self.recipe, self.run, documents)
        self.screen = summarise(self.recipe, self.run)
        self.root, self.answers_root = Tree(self.html).root, Tree(self.answers).root

    def section(self, name: str) -> Element | None:
        elements = [*self.root.all(), *self.answers_root.all()]
        return next((e for e in elements if e.attrs.get("aria-labelledby") == name), None)

    def words(self, name: str) -> str:
        return words(self.section(name))

    def rows(self, name: str) -> dict[str, dict[str, str]]:
        """The first table of a section: head of the row -> head of the column -> cell."""
        table = next(e for e in self.section(name).all() if e.tag == "table")
        rows = [[words(e) for e in row.all() if e.tag in ("th", "td")] for row in table.all() if row.tag == "tr"]
        return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}

    def warnings(self) -> list[str]:
        return [f"{of['about']}: {of['says']} {of.get('why', '')}".strip() for of in self.screen["warnings"]]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out of a test of the words: drawing takes most of the time."""
    svg = Markup('<svg role="img" aria-label="a figure that this test does not need"></svg>')
    monkeypatch.setattr(report_step, "draw_panel", lambda *_, **__: svg)


@pytest.fixture
def show(tmp_path: Path, undrawn: None) -> Callable[..., Shown]:
    """Write a run with a gold model, change its files, and render its pages."""
    folders = (tmp_path / str(number) / "run" for number in itertools.count())

    def show(change: Callable[[RunDir], None] | None = None, policies: Sequence[str] = (), **options: Any) -> Shown:
        stages = only("sft", "rm", "gold", *policies) if policies else WITH_GOLD
        evaluation = {"gold": "gold"} if "judge" in options else {"gold": "gold", "checkpoints": 4}
        base = {"stages": stages, "evaluation": evaluation, "count": 60 if "judge" in options else 12, "steps": 2}
        recipe, run = write_run(next(folders), **{**base, **options})
        if change:
            change(run)
        return Shown(recipe, run)

    return show


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    content = read_json(path)
    yield content
    write_json(path, content)


def around(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def test_the_command_prints_the_first_screen_and_nothing_else(tmp_path):
    recipe, run = write_run(tmp_path / "a", stages=only("sft", "dpo"), reward=None, count=12, steps=2)
    (tmp_path / "a.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    done = CliRunner().invoke(app, ["report", str(tmp_path / "a.yaml"), "--runs", str(tmp_path), "--json"])
    assert (done.exit_code, json.loads(done.stdout)) == (0, summarise(recipe, run))
    write_run(tmp_path / "b", stages=only("sft", "dpo"), reward=None, count=12, steps=2)
    done = CliRunner().invoke(app, ["report", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    assert json.loads(done.stdout) == read_json(tmp_path / "a-beside-b.json")


SCREEN = {"run", "verdict", "winner", "methods", "judge", "warnings"}


def test_the_first_screen_is_one_table_of_the_methods(show):
    def gain(run: RunDir) -> None:
        with edited(run.metrics) as metrics, edited(run.comparison) as compared:
            for name, mean, outcome in (("dpo", 0.4, "better"), ("grpo", 0.1, "trivial"), ("ppo", -0.42, "worse")):
                metrics["policies"][name]["gold_gain"] = around(mean, 0.2)
                compared["against_reference"][name]["gold"]["outcome"] = outcome

    page = show(gain, judge="good")
    rows = page.rows("short")
    assert list(rows) == ["dpo", "grpo", "ppo", "reference"]
    assert list(rows["dpo"]) == [
        "Gold gain score points", "Reward gain score points", "KL nats an answer", "Win rate by the judge",
        "Length tokens", "Training time", "Alarms",
    ]  # fmt: skip
    assert rows["dpo"]["Gold gain score points"] == "(significantly better) +0.40 [+0.20, +0.60]"
    assert rows["grpo"]["Gold gain score points"] == "+0.10 [−0.10, +0.30]"
    assert rows["ppo"]["Gold gain score points"] == "(significantly worse) −0.42 [−0.62, −0.22]"
    assert rows["ppo"]["Win rate by the judge"].startswith("(significantly worse)")
    assert rows["ppo"]["Alarms"] == "gold, length" and rows["dpo"]["Alarms"] == "none"
    assert rows["reference"]["Gold gain score points"] == rows["reference"]["Alarms"] == "–"
    headline = next(e for e in page.root.all() if e.attrs.get("id") == "short")
    assert words(headline) == page.screen["verdict"]
    few = show(judge="good", count=19).screen["methods"].values()
    assert not [row["significant"] for row in few if row["significant"]]
    screens = page.screen, show(stages={"sft": STAGES["sft"]}, reward=None, evaluation={}).screen
    assert all(set(screen) == SCREEN for screen in screens)
    assert page.screen["methods"]["ppo"]["alarms"] == ["gold", "length"]


@pytest.mark.parametrize(
    ("options", "change", "warnings"),
    [
        ({"stages": STAGES, "evaluation": {}, "accuracy": (0.66, 0.64)}, None,
         ["the comparison: grpo and ppo were trained to raise this very reward",
          "rm: the reward model has not shown that it can tell better answers: it is not clear of what length alone",
          "win rate: this run has no judge"]),
        ({}, None, ["ppo: answers are 1.70 times as long as the reference's",
                    "rm: policies were trained to raise this reward score", "rm: its errors show: prefers longer"]),
        ({"stages": {**WITH_GOLD, "ppo": {**STAGES["ppo"], "reward": "gold"}}}, None, []),
        ({"judge": "not run", "policies": ["dpo"]}, None,
         ["the judge: it was not run: OPENAI_API_KEY is not set"]),
        ({"judge": "partial", "policies": ["dpo"]}, None,
         ["the judge: it was stopped: max_requests reached: 40 calls"]),
        ({"judge": "offline", "policies": ["dpo"]}, None, ["the judge: it is a rule for tests, which says nothing"]),
        ({"judge": "gold", "policies": ["dpo"]}, None,
         ["the judge: its win rates are a reward model's: no person's opinion"]),
        ({"judge": "chance", "policies": ["dpo"]}, None,
         ["the judge: it has not shown that it can tell better answers: it is not clear of a coin",
          "the judge: it changes verdicts when the answers change places"]),
        ({"judge": "length", "policies": ["dpo"]}, {"verdict": "length"}, ["not clear of what length alone can do"]),
        ({"judge": "unlabelled", "policies": ["dpo"]}, None, ["nothing here compares it with human labels"]),
        ({"judge": "silent", "policies": ["dpo"]}, None,
         ["it was held against too few pairs", "dpo: many prompts have no verdict"]),
    ],
)  # fmt: skip
def test_what_to_beware_of_is_one_list(show, options, change, warnings):
    def doubt(run: RunDir) -> None:
        with edited(run.winrate) as result:
            result["calibration"] |= change or {}

    page = show(doubt if change else None, **{"count": 60, **options})
    found = page.warnings()
    assert not [warning for warning in warnings if not any(warning in text for text in found)], found
    assert len(found) == len(set(found))
    text = page.words("short")
    assert all(warning["says"] in text for warning in page.screen["warnings"])


@pytest.mark.parametrize(
    ("judge", "n", "marked"), [("good", 60, True), ("good", 19, False), ("chance", 60, False), ("silent", 60, False)]
)
def test_a_win_rate_is_significant_only_on_enough_prompts_by_a_judge_that_has_shown_its_worth(show, judge, n, marked):
    def win(run: RunDir) -> None:
        with edited(run.winrate) as result:
            result["win_rates"][0]["win_rate"] |= around(0.9, 0.05) | {"n": n}

    page = show(win, judge=judge, policies=["grpo"])
    assert ("win_rate" in page.screen["methods"]["grpo"]["significant"]) == marked


def test_sections_stand_only_where_their_data_exist(show):
    plain = show(stages=STAGES, evaluation={"best_of_n": 0, "adversarial": False})
    assert plain.section("adversarial") is None and plain.section("judge") is None
    assert "Gold gain score points" not in plain.rows("short")["dpo"] and "gold" not in plain.words("results")

    def fell(run):
        with edited(run.over_optimisation) as over:
            next(of for of in over["alarms"] if (of["policy"], of["alarm"]) == ("ppo", "cut"))["threshold"] = 0.5

    full = show(fell)
    assert full.rows("alarms")["cut"]["Threshold"] == "1.50, 0.50"
    assert {"reference", "dpo", "grpo", "ppo"} <= set(full.words("adversarial").split())
    assert "Best of n" in full.words("results") and "Gain against KL along the training" in full.words("alarms")
    assert {name for name in full.rows("alarms") if "⚠ ppo" in name} == {"gold ⚠ ppo", "length ⚠ ppo"}
    assert {"harmless-base", "helpful-base"} <= set(full.rows("reward_models")["rm"])
    assert full.words("errors").count("It is better than a coin") == 2
    assert "No spike, no divergence and no stop in dpo, grpo, ppo" in full.words("training")
    assert "No difference is seen between rm and gold." in full.words("reward_models")
    # Nothing goes so far as the last KL: a dash for each of reward and gold, by three trainers and best of n.
    cells = [e for e in full.root.all() if "/at_kl/4/gains/" in e.attrs.get("data-source", "")]
    assert [cell.text() for cell in cells].count("–") == 6
    unscored = show(reward=None, stages={"dpo": STAGES["dpo"] | {"init": None}}, evaluation={})
    assert "Gain at the same KL" not in unscored.html and unscored.section("reward_models") is None
    judged = show(judge="good", policies=["dpo"])
    recipe = judged.recipe.model_copy(update={"judge": None})
    assert Shown(recipe, judged.run).section("judge") is None


@pytest.mark.usefixtures("undrawn")
def test_the_page_stays_short_and_leaves_the_texts_to_the_other(show):
    page = show(judge="good", answers=["It depends on many things, " + "quokka " * 50])
    (main,) = (element for element in page.root.all() if element.tag == "main")
    assert len(words(main).split()) < 3_000 and "quokka" not in words(main)
    assert "quokka" in page.answers and 'href="answers.html"' in page.html and 'href="report.html"' in page.answers


def test_missing_exploration_and_null_values_are_no_obstacle(show):
    def bare(run: RunDir) -> None:
        run.done("explore").unlink()
        with edited(run.training_stats("sft")) as stats:
            stats["health"] = [{"what": "loss", "says": "the loss is odd (step 2)"}]
        with edited(run.summary) as summary, edited(run.env) as env:
            summary["longer_is_chosen"] = None
            env |= {"git": "", "gpus": []}

    page = show(bare, stages={"sft": STAGES["sft"]}, reward=None, evaluation={})
    assert "not run from a git checkout" in page.html and "sft: the loss is odd (step 2)" in page.warnings()
    assert re.search(r'data-source="data/summary.json#/longer_is_chosen"[^>]*>–<', page.html)


@pytest.mark.parametrize(("step", "judge"), [("grpo", None), ("judge", "good")])
def test_report_refuses_an_unfinished_run(show, step, judge):
    page = show(judge=judge)
    page.run.done(step).unlink()
    with pytest.raises(UserError, match="train RECIPE grpo" if step == "grpo" else "judge RECIPE"):
        report(page.recipe, page.run)
    assert not page.run.report.exists()


# --- hostile texts ---------------------------------------------------------------------------------------------------


def check_inert(shown: Shown) -> None:
    assert "{{7*7}}" in shown.answers and "alert(1)" in shown.answers
    for html, root in ((shown.html, shown.root), (shown.answers, shown.answers_root)):
        assert not re.search(r"<script|<b>sub|\[/b\] \x1b|[\x00\x1b\u202e\u202c]", html)
        assert not [e for e in root.all() if any(name.startswith("on") for name in e.attrs)]


def test_hostile_text_is_shown_and_does_nothing(show):
    page = show(**{"evaluation": {}, **RUNS["hostile"], "count": 4})
    check_inert(page)
    assert "[/b] ⟨U+001B⟩[31m ⟨U+202E⟩gpj.exe⟨U+202C⟩ ⟨U+0000⟩" in page.answers
    for shown in ("&lt;b&gt;sub&lt;/b&gt;", "100,000 characters in all", "an empty text"):
        assert shown in page.answers
    assert len(page.answers) < 300_000


def test_hostile_texts_of_every_file_are_inert(show):
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


@pytest.mark.parametrize("template", ["{{ number }}", "{{ node.kl }}", "{{ node.kl ~ '' }}", "{{ node }}"])
def test_a_number_cannot_be_printed_without_its_source(template):
    with pytest.raises(TypeError, match="without its source"):
        build_environment().from_string(template).render(number=0.93, node=Node({"kl": 0.93}, "metrics.json"))


# --- the judge


def test_the_judge_is_one_row(show):
    page = show(judge="good", policies=["dpo", "grpo"])
    (name, row), *_ = page.rows("judge").items()
    assert name == "gpt-4.1-mini"
    assert set(row) == {
        "Agreement with people", "Length alone the better rule", "Difference paired", "Kappa", "harmless-base",
        "helpful-base", "Consistency both orders", "Position bias first among winners", "Length bias longer wins",
        "Ties", "Not parsed no verdict", "A note gains", "Price", "Time"}  # fmt: skip
    found = page.section("judge")
    assert len([e for e in found.all() if e.tag == "table"]) == 2
    addresses = {e.attrs["data-source"].partition("#")[2] for e in found.all() if "data-source" in e.attrs}
    groups = {
        "/cost": ("calls", "usd", "price/input", "price/cached", "price/output", "models/0"),
        "/ratings": ("dpo", "grpo"),
        "/judge": ("id", "is"),
    }
    for rate in range(3):
        groups |= {f"/win_rates/{rate}/subsets/{subset}": ("win_rate",) for subset in SUBSETS}
        groups[f"/win_rates/{rate}"] = ("win_rate", "wins", "ties", "losses", "length_controlled/length_controlled")
    assert {f"{group}/{name}" for group, names in groups.items() for name in names} | {"/prompts"} <= addresses
    for cause, count in read_json(page.run.winrate)["win_rates"][0]["missing"]["verdicts"].items():
        assert f"{count} {cause}" in words(found)


def test_a_judge_that_is_no_language_model_has_no_order_and_no_price(show):
    decoding = {"gold": "gold", "judge_decoding": {"temperature": 0.7, "top_p": 0.9}}
    page = show(judge="gold", policies=["dpo"], evaluation=decoding)
    (row,) = page.rows("judge").values()
    assert not {"Consistency both orders", "Not parsed no verdict", "Price"} & set(row)
    assert "a reward model, not a person" in page.words("judge")
    assert "The answers are a second set, sampled at temperature 0.7 with top-p 0.9" in page.words("judge")


@pytest.mark.parametrize("judge", ["not run", "partial"])
def test_a_judge_that_gave_up_does_not_stop_the_report(show, judge):
    page = show(judge=judge, policies=["dpo"])
    report(page.recipe, page.run)  # although the step is not finished
    if judge == "partial":
        with edited(page.run.winrate) as result:  # stopped before the first comparison of policies
            result |= {"prompts": 0, "win_rates": [], "comparisons": [], "ratings": None, "pareto": None}
        assert "No comparison was made." in Shown(page.recipe, page.run).words("judge")
    else:
        assert "was not run: OPENAI_API_KEY is not set" in page.words("judge")
        marked = [e for e in page.root.all() if e.attrs.get("data-source", "").startswith("judge/")]
        assert marked and {e.attrs["class"] for e in marked} == {"text"}
        assert "Win rate by the judge" not in page.rows("short")["dpo"]


# --- two runs beside each other --------------------------------------------------------------------------------------

TWO = {"stages": WITH_GOLD, "evaluation": {"gold": "gold"}, "judge": "good", "count": 24, "steps": 6}


def two_runs(folder: Path, **changes: Any) -> dict[str, tuple[Recipe, RunDir]]:
    return {"a": write_run(folder / "first", **TWO), "b": write_run(folder / "second", **{**TWO, **changes})}


def laid(runs: dict[str, tuple[Recipe, RunDir]]) -> dict[str, Any]:
    return compare_runs(
        {key: recipe for key, (recipe, _) in runs.items()}, {key: run for key, (_, run) in runs.items()}
    )


@pytest.mark.usefixtures("undrawn")
def test_the_policies_of_one_name_are_compared_prompt_by_prompt(tmp_path):
    runs = two_runs(tmp_path, accuracy=(0.5, 0.5))
    found = laid(runs)
    assert found["warnings"][0] == "the gold model has not shown that it can tell better answers"
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
def test_judges_of_other_answers_are_not_compared(tmp_path):
    decoding = {"gold": "gold", "judge_decoding": {"temperature": 0.7}}
    measures = laid(two_runs(tmp_path, evaluation=decoding))["pairs"][0]["measures"]
    assert measures["gold"]["why_not"] is None and "or other answers" in measures["win_rate"]["why_not"]


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
def test_gains_of_different_kinds_are_not_compared(tmp_path, changes, why):
    found = laid(two_runs(tmp_path, **changes))
    assert why in found["why_not"]
    assert found["pairs"] == []


@pytest.mark.usefixtures("undrawn")
def test_what_is_different_is_listed_with_both_values(tmp_path):
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


def test_a_run_beside_itself_or_a_folder_that_is_none_is_refused(tmp_path):
    _, run = write_run(tmp_path / "first", **TWO)
    with pytest.raises(UserError, match="the same run"):
        lay_beside(run, RunDir(tmp_path / "elsewhere" / ".." / "first"))
    with pytest.raises(UserError, match="is no run"):
        lay_beside(run, RunDir(tmp_path))
