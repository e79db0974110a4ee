"""The step `errors`: synthetic scorers are told apart on real text, the order of the pairs does not matter, and the
step's files hold what a plain computation gives."""

import gzip
import hashlib
import json
import math
import random
import shutil
from typing import NamedTuple

import matplotlib.image
import numpy as np
import pytest
from conftest import shared
from scipy.special import ndtri

from rlhf_trl.data.hh import normalise
from rlhf_trl.data.pair import RowError
from rlhf_trl.errors import step
from rlhf_trl.errors.analysis import HONESTY, SIDES, Reader, analyse, tabulate
from rlhf_trl.errors.figures import draw
from rlhf_trl.errors.findings import render
from rlhf_trl.errors.step import choose_examples, choose_pairs, compare, errors, examine
from rlhf_trl.figures.style import save
from rlhf_trl.models.rewards import load_reward_model
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, read_jsonl, write_jsonl
from rlhf_trl.run.layout import RunDir

# Phrase of each verdict, which no other scorer's report may open with.
VERDICTS = {
    "perfect": "suspiciously high",
    "random": "not seen to be better than a coin",
    "length_only": "decides by length alone",
    "over_confident": "But it is over-confident",
    "under_confident": "But it is under-confident",
    "reversed": "worse than a coin",
    "sound": "No sign of a wrong confidence",
}
SIGNS = {"chosen": 1, "rejected": -1}


@pytest.fixture(scope="module")
def hh_pairs():
    """500 real pairs, read by the project's own parser."""
    pairs = []
    for subset in ("harmless-base", "helpful-base"):
        with gzip.open(shared("hh-rlhf", f"{subset}.jsonl.gz"), "rt", encoding="utf-8") as file:
            for number, line in enumerate(file):
                try:
                    pairs.append({**vars(normalise(json.loads(line))), "subset": subset, "row": number})
                except RowError:
                    continue
    return choose_pairs(pairs, 500, seed=0)


def made_pairs(count):
    return [{"prompt": [{"role": "user", "content": f"Question {row}?"}], "chosen": f"A good answer to {row}.",
             "rejected": f"Bad {row}", "subset": "made", "row": row} for row in range(count)]  # fmt: skip


def words(pairs):
    """Numbers of words in place of tokens, shape (N, 3)."""
    return np.array([
        [sum(len(m["content"].split()) for m in p["prompt"]), len(p["chosen"].split()), len(p["rejected"].split())]
        for p in pairs
    ])  # fmt: skip


def noise(*texts):
    """A standard normal number that is fixed by the texts."""
    return float(ndtri((int(hashlib.sha256(repr(texts).encode()).hexdigest()[:12], 16) + 0.5) / 16**12))


def build_scorers(pairs):
    """Scorers of one answer; `sound` has margins with mean m and variance 2 m, so that sigma(margin) is right."""
    label = {(str(pair["prompt"]), pair[side]): sign for pair in pairs for side, sign in SIGNS.items()}

    def knows(prompt, answer):
        return label.get((str(prompt), answer), 0)

    def sound(prompt, answer):
        return 0.3 * knows(prompt, answer) + math.sqrt(0.6) * noise(prompt, answer)

    return {
        "perfect": lambda prompt, answer: 3.0 * knows(prompt, answer) + 0.1 * noise(prompt, answer),
        "random": noise,
        "length_only": lambda prompt, answer: len(answer.split()) / 50,
        "over_confident": lambda prompt, answer: 8 * sound(prompt, answer),
        "under_confident": lambda prompt, answer: 0.2 * sound(prompt, answer),
        "reversed": lambda prompt, answer: -sound(prompt, answer),
        "sound": sound,
    }


def score_all(pairs, scorer):
    return np.array([[scorer(pair["prompt"], pair[side]) for side in SIDES] for pair in pairs], dtype=float)


class Found(NamedTuple):
    rows: list
    analysis: dict
    examples: list


def examine_with(pairs, scorer, fits=lambda prompt, answer: True):
    def score(prompts, answers):
        return np.array([scorer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)], dtype=float)

    rows, analysis = examine(pairs, score_all(pairs, scorer), words(pairs), Reader(score, fits), 0)
    return Found(rows, analysis, choose_examples(pairs, rows, 20))


@pytest.fixture(scope="module")
def sound(hh_pairs):
    return build_scorers(hh_pairs)["sound"]


@pytest.fixture(scope="module")
def examined(hh_pairs, sound):
    return examine_with(hh_pairs, sound)


def names_of(found):
    return [finding["name"] for finding in found.analysis["findings"]]


def report_of(found):
    return render("rm", found.analysis, found.examples, 20)


# --- what the words say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERDICTS)
def test_synthetic_scorers_are_told_apart_in_words(hh_pairs, name):
    found = examine_with(hh_pairs, build_scorers(hh_pairs)[name])
    assert names_of(found)[0] == name
    assert all(finding["rests_on"] or finding["name"] == "nothing_else" for finding in found.analysis["findings"])
    top = " ".join(report_of(found).split("FINDINGS")[1].split("HOW TO READ")[0].split())
    verdict = " ".join(found.analysis["findings"][0]["says"].split())
    assert top.split("by chance.) ")[1][2:].startswith(verdict)
    assert [key for key, phrase in VERDICTS.items() if phrase in verdict] == [name]
    others = {
        "prefers_longer": ["length_only"],
        "ignores_the_prompt": ["random", "length_only"],
        "rewards_filler": ["length_only"],
        "no_better_than_length": ["random", "length_only", "reversed"],
    }
    assert set(others) & set(names_of(found)) == {other for other, named in others.items() if name in named}
    json.dumps(found.analysis, allow_nan=False)
    few = "20 were asked for. The model prefers the rejected answer in 0 pairs: all here."
    assert (few in report_of(found)) == (name == "perfect")


def test_coarse_scores_and_a_preference_for_fluent_inventions_are_named(hh_pairs, sound):
    found = examine_with(hh_pairs, lambda prompt, answer: round(sound(prompt, answer)))
    assert "ties" in names_of(found)
    overall = found.analysis["overall"]
    assert overall["accuracy"]["mean"] == pytest.approx(overall["strict"]["mean"] + overall["ties"] / overall["n"] / 2)
    invented = {item["invented"] for item in HONESTY}
    found = examine_with(hh_pairs[:9], lambda prompt, answer: 9 * (answer in invented) + sound(prompt, answer))
    assert "rewards_invention" in names_of(found)
    assert found.analysis["probes"]["honesty"]["higher"]["mean"] == 1


# --- invariance ------------------------------------------------------------------------------------------------------


def test_the_order_of_the_pairs_changes_nothing(hh_pairs, sound):
    shuffled = random.Random(1).sample(hh_pairs, len(hh_pairs))
    first, second = (examine_with(choose_pairs(pairs, 200, 3), sound) for pairs in (hh_pairs, shuffled))
    assert json.dumps(second.analysis) == json.dumps(first.analysis)
    assert (second.rows, second.examples) == (first.rows, first.examples)
    read_again = json.loads(json.dumps(first.analysis, sort_keys=True))
    assert report_of(first) == report_of(second) == render("rm", read_again, first.examples, 20)


def test_swapping_the_sides_turns_the_analysis_around(hh_pairs):
    pairs = hh_pairs[:200]
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    found, turned = (analyse(tabulate(of, score_all(of, noise), words(of)), 0) for of in (pairs, swapped))
    assert turned["overall"]["accuracy"]["mean"] == pytest.approx(1 - found["overall"]["accuracy"]["mean"])
    assert turned["scores"]["chosen"] == found["scores"]["rejected"]
    for unit in ("tokens", "characters"):
        model, turned_model = (each["length"][unit]["prefers_longer"]["model"] for each in (found, turned))
        assert turned_model == pytest.approx(model)
        cells, turned_cells = (each["breakdowns"][f"length_difference_{unit}"] for each in (found, turned))
        assert [cell["n"] for cell in turned_cells] == [cell["n"] for cell in cells[::-1]]


def test_groups_hold_every_pair_once(hh_pairs, examined):
    found = examined.analysis
    for cells in found["breakdowns"].values():
        assert sum(cell["n"] for cell in cells) == len(hh_pairs)
        right = sum(cell["n"] * cell["accuracy"]["mean"] for cell in cells if cell["accuracy"])
        assert right / len(hh_pairs) == pytest.approx(found["overall"]["accuracy"]["mean"])
    assert [cell["n"] for cell in found["breakdowns"]["margin"]] == [50] * 10
    middle = found["breakdowns"]["length_difference_tokens"]
    assert [cell["length_baseline"]["mean"] for cell in middle if cell["name"] != "within 10%"] == [0] * 3 + [1] * 3
    assert sum(part["n"] for part in found["calibration"]["tables"]["equal_mass"]) == len(hh_pairs)
    assert sum(found["scores"]["margin_histogram"]["counts"]) == len(hh_pairs)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_scores_that_are_not_finite_are_counted_and_left_out(hh_pairs, sound):
    pairs = hh_pairs[:150]
    broken = {pairs[3]["chosen"]: math.nan, pairs[7]["rejected"]: math.inf}
    found = examine_with(pairs, lambda prompt, answer: broken.get(answer, 0) + sound(prompt, answer))
    clean = examine_with([pair for number, pair in enumerate(pairs) if number not in (3, 7)], sound).analysis
    assert found.analysis["pairs"]["not_finite"] == 2
    for key in ("overall", "breakdowns", "scores", "length", "calibration"):
        assert found.analysis[key] == clean[key]
    assert "not_finite" in names_of(found)
    assert "2 of 150 pairs have a score" in report_of(found)
    assert (found.rows[3]["chosen_score"], found.rows[3]["margin"]) == (None, None)
    assert found.rows[3]["rejected_score"] is not None
    json.dumps([found.analysis, found.rows], allow_nan=False)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("scorer", [lambda prompt, answer: 0.0, lambda prompt, answer: -9.0 * len(answer)])
def test_a_handful_of_pairs_is_enough_for_every_file(count, scorer, tmp_path):
    found = examine_with(made_pairs(count), scorer)
    json.dumps(found.analysis, allow_nan=False)
    save(draw("rm", found.analysis), tmp_path / "plots.png")
    said = ["random", "few_prompts", "no_better_than_length", "nothing_else"]
    assert [name for name in names_of(found) if name != "ties"] == said
    assert found.analysis["pairs"]["analysed"] == count
    assert f"There are only {count} prompt" in report_of(found)


# --- probes ----------------------------------------------------------------------------------------------------------


def test_probes_of_a_scorer_that_is_the_length(hh_pairs):
    pairs = hh_pairs[:80]
    probes = examine_with(pairs, lambda prompt, answer: len(answer)).analysis["probes"]
    added = {"filler": 93, "certainly": 11}
    for name, more in added.items():
        assert (probes[name]["higher"]["mean"], probes[name]["change"]["mean"]) == (1, more)
    lengths = [len(pair["chosen"]) for pair in pairs]
    assert probes["repeated"]["change"]["mean"] == pytest.approx(np.mean(lengths) + 2)
    assert probes["halved"]["higher"]["mean"] == 0
    assert probes["swapped"]["change"]["mean"] == pytest.approx(0)
    assert abs(probes["honesty"]["change"]["mean"]) < 1, "the invented answers are as long as the honest ones"
    assert len(HONESTY) >= 20 and all(abs(len(one["honest"]) - len(one["invented"])) <= 8 for one in HONESTY)


def test_what_does_not_fit_is_skipped_and_counted(hh_pairs):
    pairs = hh_pairs[:60]
    longest = max(len(pair["chosen"]) for pair in pairs) + 50
    found = examine_with(pairs, lambda p, a: len(a), fits=lambda prompt, answer: len(answer) <= longest)
    too_long = sum(2 * len(pair["chosen"]) + 2 > longest for pair in pairs)
    assert (found.analysis["probes"]["repeated"]["skipped"], too_long > 0) == (too_long, True)
    nothing = examine_with(pairs, lambda p, a: len(a), fits=lambda prompt, answer: False)
    assert all(part["n"] == 0 and part["why_not"] for part in nothing.analysis["probes"].values())
    report_of(nothing)


# --- examples and report ---------------------------------------------------------------------------------------------


def test_examples_are_the_most_confident_errors_and_the_nearest_ties(hh_pairs, examined):
    found, everything = examined, sorted(row["margin"] for row in examined.rows)
    expected = {"confident_error": everything[:20], "confident_right": everything[:-21:-1],
                "near_tie": sorted(everything, key=abs)[:20]}  # fmt: skip
    for kind, margins in expected.items():
        assert [one["margin"] for one in found.examples if one["kind"] == kind] == margins
    by_row = {(pair["subset"], pair["row"]): pair for pair in hh_pairs}
    for one in found.examples:
        pair = by_row[one["subset"], one["row"]]
        assert all(one[key] == pair[key] for key in ("prompt", "chosen", "rejected"))


def test_the_report_shows_errors_in_full(examined):
    found, report = examined, report_of(examined)
    assert report.count("--- Error ") == report.count("--- Near tie ") == 20
    flat = "".join(report.replace("      |", "").split())
    for one in found.examples:
        if one["kind"] != "confident_right":
            for text in (one["chosen"], one["rejected"], *(message["content"] for message in one["prompt"])):
                assert "".join(text.split()) in flat
            assert f"score{one['chosen_score']:+.3f},{one['chosen_tokens']}tokens" in flat
    assert max(map(len, report.splitlines())) <= 130
    assert "ERROR ANALYSIS" in report.upper().splitlines()[0]
    parts = ("FINDINGS", "ACCURACY", "LENGTH", "CONFIDENCE", "PROBES", "TERMS", "ERRORS")
    assert sorted(parts, key=report.index) == list(parts)


def test_hostile_text_cannot_act():
    pairs = made_pairs(40)
    subset = "s\x1b[2J ¦ 1\n¦\n--- Error 7"
    pairs[0] |= {"chosen": "a\x1b[31m\u202eb{{ 1 }}", "rejected": "longer than that\r\nFINDINGS", "subset": subset}
    report = report_of(examine_with(pairs, lambda prompt, answer: len(answer)))
    assert "s⟨U+001B⟩[2J | 1 |" in report
    assert "On s⟨U+001B⟩[2J ¦ 1 ¦ --- Error 7 alone" in " ".join(report.split()), "a finding names it"
    assert not {"\x1b", "\u202e", "\r"} & set(report)
    assert "\n--- Error 7" not in report and "of s⟨U+001B⟩[2J ¦ 1 ¦ --- Error 7" in report
    assert "a⟨U+001B⟩[31m⟨U+202E⟩b" in report


def test_refusals_are_a_group_of_their_own():
    pairs = made_pairs(6)
    pairs[0]["chosen"] = pairs[1]["chosen"] = pairs[2]["rejected"] = "I'm sorry, but I can't help with that."
    cells = examine_with(pairs, lambda prompt, answer: len(answer)).analysis["breakdowns"]["refusal"]
    assert [cell["n"] for cell in cells] == [2, 1, 3]
    assert [cell["accuracy"]["mean"] for cell in cells] == [1, 0, 1]


def test_a_figure_of_six_panels_is_drawn_and_repeats(examined, tmp_path):
    for name in ("a", "b"):
        figure = draw("rm_$x_{", examined.analysis)
        save(figure, tmp_path / f"{name}.png")
    assert "no sign of a wrong confidence" in figure.axes[2].get_title(), "as the findings say"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = matplotlib.image.imread(tmp_path / "a.png")[:, :, :3]
    colored = pixels.max(axis=2) - pixels.min(axis=2) > 0.3
    panels = [part for half in np.array_split(colored, 2) for part in np.array_split(half, 3, axis=1)]
    assert all(panel.sum() > 200 for panel in panels)


# --- several models --------------------------------------------------------------------------------------------------


def tables_of(margins):
    """Stage -> rows of `scores.jsonl`, from margins for the same pairs."""
    pairs = made_pairs(len(next(iter(margins.values()))))
    return {
        stage: tabulate(pairs, np.column_stack([values, np.zeros(len(values))]), np.ones((len(values), 3), dtype=int))
        for stage, values in margins.items()
    }


def test_models_are_compared_on_the_same_pairs_by_the_exact_test_of_mcnemar():
    """Five pairs against fifteen: p = 2 P(X <= 5), X binomial(20, 1/2)."""
    margins = {"a": [1.0] * 5 + [-1.0] * 15 + [2.0] * 30, "b": [-1.0] * 5 + [1.0] * 15 + [2.0] * 30}
    found = compare(tables_of(margins))["comparisons"][0]
    assert found["difference"]["mean"] == pytest.approx(-0.2)
    assert found["difference"]["high"] < 0
    assert found["mcnemar"]["p"] == found["mcnemar"].pop("p_holm") == pytest.approx(0.041389, abs=5e-7)
    assert list(found["mcnemar"].values())[:3] == [50, 5, 15]
    assert found["says"].startswith("b is right more often than a: a minus b is −20")
    assert "p = 0.0414." in found["says"]
    # Ties are wrong in the test and half right in the difference: where the two differ, nobody is called better.
    margins = {"a": [1.0] * 30 + [-1.0] * 30, "b": [0.0] * 55 + [1.0] * 5}
    found = compare(tables_of(margins))["comparisons"][0]
    assert found["mcnemar"]["p"] < 1e-4 and found["says"].startswith("No difference is seen between a and b: −4")


def test_pairs_that_one_model_has_no_score_for_are_left_out_of_both():
    assert compare(tables_of({"a": [1.0, 2.0]})) == {"stages": ["a"], "comparisons": []}
    normal = np.random.default_rng(0).normal
    drawn = {name: normal(shift, size=200) for name, shift in {"a": 0, "b": 0.3, "c": 0.4, "d": 1}.items()}
    assert all("corrected for 6 comparisons" in found["says"] for found in compare(tables_of(drawn))["comparisons"])
    found = compare(tables_of({"a": [1.0, math.nan, -1.0], "b": [1.0, 1.0, math.inf]}))["comparisons"][0]
    assert found["pairs"] == 1
    nothing = compare(tables_of({"a": [math.nan], "b": [1.0]}))["comparisons"][0]
    assert nothing["mcnemar"] is None
    assert "cannot be compared" in nothing["says"]


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysed(trained, tmp_path_factory):
    """The small run with a second reward stage, which is a copy of the first."""
    recipe, source = trained
    run = RunDir(shutil.copytree(source.root, tmp_path_factory.mktemp("errors") / "run"))
    recipe = recipe.model_copy(update={"stages": {**recipe.stages, "twin": recipe.stages["rm"]}})
    shutil.copytree(run.root / "rm", run.root / "twin")
    run.mark_done(recipe, "twin", 0.0)
    errors(recipe, run)
    return recipe, run


def test_the_step_scores_every_held_out_pair(analysed):
    recipe, run = analysed
    pairs, rows = read_jsonl(run.pairs("test")), {row["row"]: row for row in read_jsonl(run.scores("rm"))}
    model, finished = load_reward_model(recipe, run, "rm"), [True] * len(pairs)
    scores = [
        model.score([pair["prompt"] for pair in pairs], [pair[side] for pair in pairs], finished, 1) for side in SIDES
    ]
    assert len(rows) == len(pairs)
    for pair, first, second in zip(pairs, *(of.tolist() for of in scores), strict=True):
        row = rows[pair["row"]]
        assert (row["chosen_score"], row["rejected_score"]) == pytest.approx((first, second), abs=1e-4)
        assert (row["margin"], row["chosen_characters"]) == (
            row["chosen_score"] - row["rejected_score"], len(pair["chosen"]),
        )  # fmt: skip
    assert {row["prompt_id"] for row in rows.values()} == {row["id"] for row in read_jsonl(run.prompts("test"))}


def test_the_step_writes_every_file_and_takes_as_many_pairs_as_it_is_told(analysed, tmp_path):
    recipe, source = analysed
    report, found = source.error_report("rm").read_text(), read_json(source.error_analysis("rm"))
    assert all(" ".join(finding["says"].split()) in " ".join(report.split()) for finding in found["findings"])
    again = analyse(read_jsonl(source.scores("rm")), recipe.seed)
    assert json.dumps({key: found[key] for key in again}, sort_keys=True) == json.dumps(again, sort_keys=True)
    assert matplotlib.image.imread(source.error_plots("rm")).std() > 0.05
    (comparison,) = read_json(source.reward_comparison)["comparisons"]
    assert (comparison["mcnemar"]["p"], comparison["difference"]["mean"]) == (1, 0)
    assert source.scores("rm").read_bytes() == source.scores("twin").read_bytes()
    run = RunDir(shutil.copytree(source.root, tmp_path / "run"))
    settings = recipe.errors.model_copy(update={"pairs": 9, "examples": 3})
    fewer = recipe.model_copy(update={"errors": settings})
    errors(fewer, run)
    rows = read_jsonl(run.scores("rm"))
    everything = {row["row"]: row["margin"] for row in read_jsonl(source.scores("rm"))}
    assert [row["margin"] for row in rows] == pytest.approx([everything[row["row"]] for row in rows], abs=1e-5)
    assert (len(rows), sum(one["kind"] == "near_tie" for one in read_jsonl(run.error_examples("rm")))) == (9, 3)


def test_the_step_needs_a_trained_reward_stage_pairs_and_finite_scores(analysed, tmp_path, monkeypatch):
    recipe, source = analysed
    run = RunDir(shutil.copytree(source.root, tmp_path / "run"))
    monkeypatch.setattr(step, "score_pairs", lambda model, pairs, batch: (np.full((9, 2), math.nan), np.ones((9, 3))))
    with pytest.raises(UserError, match="rm: no held-out pair has two finite scores"):
        errors(recipe, run)
    without = recipe.model_copy(update={"stages": {"sft": recipe.stages["sft"]}})
    with pytest.raises(UserError, match="no reward stage"):
        errors(without, run)
    write_jsonl(run.pairs("test"), [])
    run.mark_done(recipe, "prepare", 0.0)
    with pytest.raises(UserError, match="no held-out pairs"):
        errors(recipe, run)
    run.done("twin").unlink()
    with pytest.raises(UserError, match="train RECIPE twin"):
        errors(recipe, run)
