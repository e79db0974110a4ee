"""The step `explore`: its numbers, figures and samples."""

import json
import re

import matplotlib.image
import pytest
from conftest import shared

from rlhf_trl.data import sources
from rlhf_trl.data.explore import explore
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.files import read_json
from rlhf_trl.run.layout import RunDir

FIGURES = ["conversations", "length_bias", "lengths", "refusals"]
# What Markdown, mathtext, a terminal or a file name could trip over.
HOSTILE = [
    "```\n# A title\n```` and ````````",
    "<script>alert(1)</script> $\\frac{ & $x_1$ %s {0}",
    "red \x1b[31m and \u202eback",
    "日本語 🙂 naïve",
    "\r\n\x00 | a | table |",
]


def run_explore(folder, source, model="builtin:tiny", max_rows=None):
    """Explore rows, or a source; returns the run directory."""
    if isinstance(source, list):
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source))
        source = folder / "rows.jsonl"
    recipe = Recipe(name="t", model={"model_name_or_path": str(model)}, stages={"sft": {"trainer": "sft"}},
                    data={"source": str(source), "max_rows": max_rows})  # fmt: skip
    run = RunDir(folder / "run")
    run.replace("explore")
    explore(recipe, run)
    return run


def row(chosen, rejected, subset="s", prompt="Q"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset}


def statistics(run):
    return read_json(run.exploration / "statistics.json")


def check_figures(run):
    assert sorted(path.stem for path in run.exploration.glob("*.png")) == FIGURES
    for name in FIGURES:
        pixels = matplotlib.image.imread(run.exploration / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert pixels.std() > 0.05, f"{name} is blank"
    assert not list(run.exploration.glob(".*"))


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    return run_explore(tmp_path_factory.mktemp("real"), shared("hh-rlhf"), shared("gpt2-tokenizer"))


def test_real_rows_show_their_biases(real_run):
    result = statistics(real_run)
    assert result["rows"] == 3258
    assert result["overall"]["pairs"] + sum(result["unusable"].values()) == 3258
    harmless, helpful = result["subsets"]["harmless-base"], result["subsets"]["helpful-base"]
    assert harmless["chosen_longer"]["characters"]["mean"] == pytest.approx(0.4486, abs=5e-5)
    assert helpful["chosen_longer"]["characters"]["mean"] == pytest.approx(0.5879, abs=5e-5)
    # The bias grows with the difference, downwards in the one subset and upwards in the other.
    assert harmless["verbosity"]["over 3"]["mean"] < 0.4 and helpful["verbosity"]["over 3"]["mean"] > 0.65
    assert harmless["one_refusal"]["is_chosen"]["low"] > 0.5 > helpful["one_refusal"]["is_chosen"]["high"]
    assert harmless["lengths"]["words"]["difference"]["high"] < 0 < helpful["lengths"]["words"]["difference"]["low"]
    check_figures(real_run)


def test_real_samples_can_be_read(real_run):
    page = (real_run.exploration / "samples.md").read_text()
    for heading in ("`harmless-base`", "`helpful-base`", "Rows that `prepare` drops"):
        assert f"## {heading}" in page
    assert "### Only the chosen answer refuses" in page
    for reason in ("consecutive_roles", "empty_chosen", "empty_rejected", "identical", "prompts_differ"):
        assert re.search(rf"^### {reason}.* \(row \d+ of", page, re.MULTILINE)


def test_numbers_of_a_few_pairs(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [
        row("one two three four", "one two", "x"),
        row("one", "one two three", "x", talk),
        row("I can't help you.", "Sure, do it.", "x"),
        row("same size", "tame mice", "y"),
        row("", "empty", "y"),
    ]
    run = run_explore(tmp_path, rows)
    result = statistics(run)
    assert result["unusable"] == {"empty_chosen": 1} and result["overall"]["pairs"] == 4
    x, y = result["subsets"]["x"], result["subsets"]["y"]
    assert x["depth"]["counts"] == {"1": 2, "2": 1}
    assert x["chosen_longer"]["words"]["mean"] == pytest.approx(2 / 3) and y["chosen_longer"]["words"]["mean"] == 0.5
    assert x["lengths"]["words"]["chosen"]["p50"] == 4 and x["lengths"]["characters"]["rejected"]["max"] == 13
    assert x["lengths"]["words"]["difference"]["mean"] == pytest.approx(1 / 3)
    assert x["refusals"]["chosen"]["mean"] == pytest.approx(1 / 3)
    alone = {"mean": 1.0, "low": pytest.approx(0.2065, abs=1e-4), "high": 1.0, "n": 1}
    assert (x["one_refusal"]["is_chosen"], y["one_refusal"]["is_chosen"]) == (alone, None)
    assert x["shared_prefix"]["first_word"]["mean"] == pytest.approx(2 / 3)
    bins = {name: (share["mean"], share["n"]) for name, share in x["verbosity"].items() if share}
    assert bins == {"1.25–1.5": (1, 1), "2–3": (1, 1), "over 3": (0, 1)}
    check_figures(run)


def test_hostile_text_stays_inside_its_fence(tmp_path):
    subsets = ["$\\foo{$", "_hidden", "a\nb # c", "x" * 90, "two", "`three`"]
    rows = [row(f"{text} {i}", f"{other} {j}", subsets[(i + j) % 6], prompt=text)
            for i, text in enumerate(HOSTILE) for j, other in enumerate(HOSTILE)]  # fmt: skip
    run = run_explore(tmp_path, [*rows, "`````` not a row", row("\ud800", "no")])
    page = (run.exploration / "samples.md").read_bytes().decode("utf-8")
    assert "\x1b" not in page and "\u202e" not in page and "⟨U+001B⟩[31m" in page
    fence = None
    outside = []
    for line in page.split("\n"):
        marks = re.match("`{3,}", line)
        if fence is None and marks and line == marks.group() + "text":
            fence = marks.group()
        elif fence is not None and re.fullmatch(f"{fence}`*", line):
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    ours = ("# ", "## ", "### ", "**", "Pairs as", "One for")
    assert not [line for line in outside if line and not line.startswith(ours)]
    assert len(statistics(run)["subsets"]) == 6
    check_figures(run)


def test_one_pair_is_enough_and_none_is_no_crash(tmp_path):
    check_figures(run_explore(tmp_path, [row("yes", "no")]))
    run = run_explore(tmp_path, [row("", "no")])
    assert statistics(run)["overall"] is None
    assert "empty_chosen" in (run.exploration / "samples.md").read_text()


def test_same_rows_give_the_same_files_from_any_number_of_processes(tmp_path, monkeypatch):
    rows = [row(f"yes {i} " * (i % 5 + 1), f"no {i} " * (i % 3 + 1), "ab"[i % 2], f"Q{i}") for i in range(40)]

    def contents():
        run = run_explore(tmp_path, rows, max_rows=30)
        return {path.name: path.read_bytes() for path in run.exploration.iterdir()}

    first = contents()
    monkeypatch.setattr(sources, "CHUNK", 7)
    monkeypatch.setattr(sources, "ALONE", 2)  # two more chunks go to other processes
    assert first == contents()
    assert len(first) == len(FIGURES) + 2 and json.loads(first["statistics.json"])["rows"] == 30


def test_samples_do_not_depend_on_the_order(tmp_path):
    rows = [row(f"yes {i} " * (i % 5 + 1), f"no {i}", "ab"[i % 2], f"Q{i}") for i in range(40)]
    pages = [(run_explore(tmp_path, order).exploration / "samples.md").read_text() for order in (rows, rows[::-1])]
    first, second = (re.sub(r"row \d+ of", "", page) for page in pages)
    assert first == second and first.count("Drawn by hash") == 6
