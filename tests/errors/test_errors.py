"""The step `errors`: synthetic scorers are told apart on real text, the order of the pairs does not matter, and the
step's files hold what a plain computation gives."""

import gzip
import hashlib
import json
import math
import random
import shutil

import matplotlib.image
import numpy as np
import pytest
from conftest import shared
from scipy.special import ndtri

from rlhf_trl.data.hh import RowError, normalise
from rlhf_trl.errors.analysis import analyse, tabulate
from rlhf_trl.errors.figures import draw
from rlhf_trl.errors.probes import HONESTY
from rlhf_trl.errors.step import choose_pairs, compare, errors, examine, mcnemar
from rlhf_trl.errors.text_report import render
from rlhf_trl.models.rewards import load_reward_model
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl
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
    prompts = [[{"role": "user", "content": f"Question {number}?"}] for number in range(count)]
    return [
        {
            "prompt": prompt,
            "chosen": f"A good answer to {row}.",
            "rejected": f"Bad {row}",
            "subset": "made",
            "row": row,
        }
        for row, prompt in enumerate(prompts)
    ]


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
    label = {
        (str(pair["prompt"]), pair[side]): sign for pair in pairs for side, sign in (("chosen", 1), ("rejected", -1))
    }

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


def examine_with(pairs, scorer, examples=20, fits=lambda prompt, answer: True):
    def score(prompts, answers):
        return np.array([scorer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)], dtype=float)

    return examine(pairs, score, words(pairs), fits, examples, 0, "rm")


def names_of(found):
    return [finding["name"] for finding in found.analysis["findings"]]


# --- what the words say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERDICTS)
def test_synthetic_scorers_are_told_apart_in_words(hh_pairs, name):
    found = examine_with(hh_pairs, build_scorers(hh_pairs)[name])
    assert names_of(found)[0] == name
    report = render("rm", found.analysis, found.examples)
    top = " ".join(report.split("FINDINGS")[1].split("HOW TO READ")[0].split())
    verdict = found.analysis["findings"][0]["says"]
    assert top.split("by chance.) ")[1][2:].startswith(verdict)
    assert [key for key, phrase in VERDICTS.items() if phrase in verdict] == [name]
    others = set(names_of(found)[1:])
    assert ("prefers_longer" in others) == (name == "length_only")
    assert ("ignores_the_prompt" in others) == (name in ("random", "length_only"))
    assert ("rewards_filler" in others) == (name == "length_only")
    assert ("no_better_than_length" in others) == (name in ("random", "length_only", "reversed"))
    json.dumps(found.analysis, allow_nan=False)


def test_every_finding_rests_on_numbers(hh_pairs):
    for finding in examine_with(hh_pairs, build_scorers(hh_pairs)["length_only"]).analysis["findings"]:
        assert finding["rests_on"]
        assert finding["says"].endswith(".")


def test_nothing_significant_is_said(hh_pairs):
    """A scorer that knows labels and length as the humans do, on few pairs."""
    pairs = hh_pairs[:120]
    found = examine_with(pairs, build_scorers(pairs)["sound"])
    assert names_of(found) == ["sound", "better_than_length", "nothing_else"]
    report = render("rm", found.analysis, found.examples)
    assert "Nothing else is significant" in report


def test_coarse_scores_are_named(hh_pairs):
    scorer = build_scorers(hh_pairs)["sound"]
    found = examine_with(hh_pairs, lambda prompt, answer: round(scorer(prompt, answer)))
    assert "ties" in names_of(found)
    overall = found.analysis["overall"]
    assert overall["accuracy"]["mean"] == pytest.approx(overall["strict"]["mean"] + overall["ties"] / overall["n"] / 2)


def test_a_preference_for_fluent_inventions_is_named(hh_pairs):
    invented = {item["invented"] for item in HONESTY}
    scorer = build_scorers(hh_pairs)["sound"]
    found = examine_with(hh_pairs, lambda prompt, answer: 9 * (answer in invented) + scorer(prompt, answer))
    assert "rewards_invention" in names_of(found)
    assert found.analysis["probes"]["honesty"]["higher"]["mean"] == 1


# --- invariance ------------------------------------------------------------------------------------------------------


def test_the_order_of_the_pairs_changes_nothing(hh_pairs):
    scorer = build_scorers(hh_pairs)["sound"]
    shuffled = random.Random(1).sample(hh_pairs, len(hh_pairs))
    first, second = (examine_with(choose_pairs(pairs, 200, 3), scorer) for pairs in (hh_pairs, shuffled))
    assert json.dumps(second.analysis) == json.dumps(first.analysis)
    assert (second.rows, second.examples) == (first.rows, first.examples)
    rows = random.Random(2).sample(first.rows, 200)
    kept = {key: first.analysis[key] for key in analyse(rows, 0)}
    assert json.dumps(analyse(rows, 0), sort_keys=True) == json.dumps(kept, sort_keys=True)
    assert render("rm", first.analysis, first.examples) == render("rm", second.analysis, second.examples)


def test_swapping_the_sides_turns_the_analysis_around(hh_pairs):
    pairs = hh_pairs[:200]
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    scores = np.array([[noise(pair["prompt"], pair[side]) for side in ("chosen", "rejected")] for pair in pairs])
    found = analyse(tabulate(pairs, *scores.T, words(pairs)), 0)
    turned = analyse(tabulate(swapped, *scores.T[::-1], words(swapped)), 0)
    assert turned["overall"]["accuracy"]["mean"] == pytest.approx(1 - found["overall"]["accuracy"]["mean"])
    assert turned["scores"]["chosen"] == found["scores"]["rejected"]
    for unit in ("tokens", "characters"):
        assert turned["length"][unit]["prefers_longer"]["model"] == pytest.approx(
            found["length"][unit]["prefers_longer"]["model"]
        )
        cells, turned_cells = (each["breakdowns"][f"length_difference_{unit}"] for each in (found, turned))
        assert [cell["n"] for cell in turned_cells] == [cell["n"] for cell in cells[::-1]]
    # The drawn order is of the texts, whichever of them was chosen.
    for key in ("n", "predicted"):
        drawn, turned_drawn = (
            [part[key] for part in each["calibration"]["tables"]["random_order"]] for each in (found, turned)
        )
        assert turned_drawn == pytest.approx(drawn)


def test_adding_a_constant_to_all_scores_moves_only_the_scores(hh_pairs):
    pairs = hh_pairs[:150]
    scores = np.array([[round(8 * noise(p["prompt"], p[s])) / 8 for s in ("chosen", "rejected")] for p in pairs])
    found, moved = (analyse(tabulate(pairs, *(scores + add).T, words(pairs)), 0) for add in (0, 16))
    for key in ("pairs", "overall", "breakdowns", "calibration"):
        assert moved[key] == found[key]
    for key in ("margin_histogram", "auc", "nll", "brier"):
        assert moved["scores"][key] == found["scores"][key]
    assert moved["scores"]["margin"]["mean"] == found["scores"]["margin"]["mean"]
    assert moved["scores"]["chosen"]["mean"]["mean"] == found["scores"]["chosen"]["mean"]["mean"] + 16


def test_groups_hold_every_pair_once(hh_pairs):
    found = examine_with(hh_pairs, build_scorers(hh_pairs)["sound"]).analysis
    for cells in found["breakdowns"].values():
        assert sum(cell["n"] for cell in cells) == len(hh_pairs)
        right = sum(cell["n"] * cell["accuracy"]["mean"] for cell in cells if cell["accuracy"])
        assert right / len(hh_pairs) == pytest.approx(found["overall"]["accuracy"]["mean"])
    assert [cell["n"] for cell in found["breakdowns"]["margin"]] == [50] * 10
    middle = found["breakdowns"]["length_difference_tokens"]
    assert [cell["length_baseline"]["mean"] for cell in middle if cell["name"] != "within 10%"] == [0] * 3 + [1] * 3
    for table in found["calibration"]["tables"].values():
        assert sum(part["n"] for part in table) == len(hh_pairs)
    assert sum(found["scores"]["margin_histogram"]["counts"]) == len(hh_pairs)


def test_pairs_that_share_a_prompt_widen_the_intervals(hh_pairs):
    pairs = hh_pairs[:100]
    copies = [{**pair, "row": 1000 * copy + pair["row"]} for copy in range(4) for pair in pairs]
    scorer = build_scorers(pairs)["sound"]
    found, often = (examine_with(each, scorer).analysis for each in (pairs, copies))
    assert (often["pairs"]["analysed"], often["pairs"]["prompts"]) == (400, 100)
    once, copied = found["overall"]["accuracy"], often["overall"]["accuracy"]
    assert (copied["low"], copied["high"]) == pytest.approx((once["low"], once["high"]), abs=2e-3)


# --- faults ----------------------------------------------------------------------------------------------------------


def test_scores_that_are_not_finite_are_counted_and_left_out(hh_pairs, tmp_path):
    pairs, scorer = hh_pairs[:150], build_scorers(hh_pairs)["sound"]
    broken = {pairs[3]["chosen"]: math.nan, pairs[7]["rejected"]: math.inf}
    found = examine_with(pairs, lambda prompt, answer: broken.get(answer, 0) + scorer(prompt, answer))
    rest = [pair for number, pair in enumerate(pairs) if number not in (3, 7)]
    clean = examine_with(rest, scorer).analysis
    assert found.analysis["pairs"]["not_finite"] == 2
    for key in ("overall", "breakdowns", "scores", "length", "calibration"):
        assert found.analysis[key] == clean[key]
    assert "not_finite" in names_of(found)
    assert "2 of 150 pairs have a score" in render("rm", found.analysis, found.examples)
    assert (found.rows[3]["chosen_score"], found.rows[3]["margin"]) == (None, None)
    assert found.rows[3]["rejected_score"] is not None
    write_json(tmp_path / "analysis.json", found.analysis)
    write_jsonl(tmp_path / "scores.jsonl", found.rows)
    with pytest.raises(UserError, match="two finite scores"):
        examine_with(pairs, lambda prompt, answer: math.nan)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("scorer", [lambda prompt, answer: 0.0, lambda prompt, answer: float(len(answer))])
def test_a_handful_of_pairs_is_enough_for_every_file(count, scorer, tmp_path):
    found = examine_with(made_pairs(count), scorer)
    write_json(tmp_path / "analysis.json", found.analysis)
    draw("rm", found.analysis, tmp_path / "plots.png")
    report = render("rm", found.analysis, found.examples)
    assert "few_prompts" in names_of(found)
    assert found.analysis["pairs"]["analysed"] == count
    assert f"There are only {count} prompt" in report


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
    assert probes["wrong_prompt"]["change"] == {"mean": 0, "low": 0, "high": 0, "n": 80}


def test_accuracy_collapses_under_a_wrong_prompt_for_a_scorer_that_reads_it(hh_pairs):
    pairs = hh_pairs[:80]
    moved = examine_with(pairs, build_scorers(pairs)["perfect"]).analysis["probes"]["wrong_prompt"]
    assert moved["accuracy_before"]["mean"] == 1
    assert moved["accuracy"]["low"] < 0.5 < moved["accuracy"]["high"]
    assert moved["change"]["high"] < -0.3


def test_what_does_not_fit_is_skipped_and_counted(hh_pairs):
    pairs = hh_pairs[:60]
    longest = max(len(pair["chosen"]) for pair in pairs) + 50
    found = examine_with(pairs, lambda p, a: len(a), fits=lambda prompt, answer: len(answer) <= longest)
    too_long = sum(2 * len(pair["chosen"]) + 2 > longest for pair in pairs)
    assert (found.analysis["probes"]["repeated"]["skipped"], too_long > 0) == (too_long, True)
    nothing = examine_with(pairs, lambda p, a: len(a), fits=lambda prompt, answer: False)
    assert all(part["n"] == 0 and part["why_not"] for part in nothing.analysis["probes"].values())
    assert "wrong_prompt: no number" in render("rm", nothing.analysis, nothing.examples)


def test_honest_and_invented_answers_are_alike_in_length():
    assert len(HONESTY) >= 20
    assert len({item["question"] for item in HONESTY}) == len(HONESTY)
    assert all(abs(len(item["honest"]) - len(item["invented"])) <= 8 for item in HONESTY)


# --- examples and report ---------------------------------------------------------------------------------------------


def test_examples_are_the_most_confident_errors_and_the_nearest_ties(hh_pairs):
    found = examine_with(hh_pairs, build_scorers(hh_pairs)["sound"], examples=25)
    margins = {
        kind: [one["margin"] for one in found.examples if one["kind"] == kind]
        for kind in ("confident_error", "near_tie", "confident_right")
    }
    everything = sorted(row["margin"] for row in found.rows)
    assert margins["confident_error"] == everything[:25]
    assert margins["confident_right"] == everything[:-26:-1]
    assert margins["near_tie"] == sorted(everything, key=abs)[:25]
    by_row = {(pair["subset"], pair["row"]): pair for pair in hh_pairs}
    for one in found.examples:
        pair = by_row[one["subset"], one["row"]]
        assert all(one[key] == pair[key] for key in ("prompt", "chosen", "rejected"))


def without_spaces(text):
    return "".join(text.split())


def test_the_report_shows_errors_in_full(hh_pairs):
    found = examine_with(hh_pairs, build_scorers(hh_pairs)["sound"])
    report = render("rm", found.analysis, found.examples)
    assert report.count("--- Error ") == report.count("--- Near tie ") == 20
    flat = without_spaces(report.replace("      |", ""))
    for one in found.examples:
        if one["kind"] != "confident_right":
            for text in (one["chosen"], one["rejected"], *(message["content"] for message in one["prompt"])):
                assert without_spaces(text) in flat
            assert f"score{one['chosen_score']:+.3f},{one['chosen_tokens']}tokens" in flat
    assert max(map(len, report.splitlines())) <= 130
    assert "ERROR ANALYSIS" in report.upper().splitlines()[0]
    order = [
        report.index(part) for part in ("FINDINGS", "ACCURACY", "LENGTH", "CONFIDENCE", "PROBES", "TERMS", "ERRORS")
    ]
    assert order == sorted(order)


def test_the_report_says_when_there_are_fewer_errors(hh_pairs):
    found = examine_with(hh_pairs[:100], build_scorers(hh_pairs)["perfect"])
    report = render("rm", found.analysis, found.examples)
    assert "20 were asked for. The model prefers the rejected answer in 0 pairs: all here." in report


def test_hostile_text_cannot_act():
    pairs = made_pairs(4)
    pairs[0] |= {"chosen": "a\x1b[31m\u202eb", "rejected": "longer than that\r\nFINDINGS", "subset": "s\x1b[2J"}
    found = examine_with(pairs, lambda prompt, answer: len(answer))
    report = render("rm", found.analysis, found.examples)
    assert not {"\x1b", "\u202e", "\r"} & set(report)
    assert "a⟨U+001B⟩[31m⟨U+202E⟩b" in report


def test_refusals_are_a_group_of_their_own():
    pairs = made_pairs(6)
    pairs[0]["chosen"] = pairs[1]["chosen"] = pairs[2]["rejected"] = "I'm sorry, but I can't help with that."
    cells = examine_with(pairs, lambda prompt, answer: len(answer)).analysis["breakdowns"]["refusal"]
    assert [cell["n"] for cell in cells] == [2, 1, 3]
    assert [cell["accuracy"]["mean"] for cell in cells] == [1, 0, 1]


def test_figures_are_drawn_and_repeat(hh_pairs, tmp_path):
    analysis = examine_with(hh_pairs, build_scorers(hh_pairs)["sound"]).analysis
    for name in ("a", "b"):
        draw("rm_$x_{", analysis, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert min(pixels.shape[:2]) > 600
    # Each of the six panels holds something.
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 3
    for row in range(2):
        for column in range(3):
            panel = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width, :3]
            colored = panel.max(axis=2) - panel.min(axis=2) > 0.3
            assert colored.sum() > 200, (row, column)


# --- several models --------------------------------------------------------------------------------------------------


def tables_of(margins):
    """Stage -> rows of `scores.jsonl`, from margins for the same pairs."""
    pairs = made_pairs(len(next(iter(margins.values()))))
    return {
        stage: tabulate(pairs, values, [0.0] * len(values), np.ones((len(values), 3), dtype=int))
        for stage, values in margins.items()
    }


def test_mcnemar_is_exact():
    """Five pairs against fifteen: p = 2 P(X <= 5), X binomial(20, 1/2)."""
    first = np.array([True] * 5 + [False] * 15 + [True] * 30)
    second = np.array([False] * 5 + [True] * 15 + [True] * 30)
    found = mcnemar(first, second)
    assert (found["only_first_right"], found["only_second_right"], found["pairs"]) == (5, 15, 50)
    assert found["p"] == pytest.approx(0.041389, abs=5e-7)
    assert mcnemar(first, first)["p"] == 1


def test_models_are_compared_on_the_same_pairs():
    margins = {"a": [1.0] * 5 + [-1.0] * 15 + [2.0] * 30, "b": [-1.0] * 5 + [1.0] * 15 + [2.0] * 30}
    found = compare(tables_of(margins), seed=0)["comparisons"][0]
    assert found["difference"]["mean"] == pytest.approx(-0.2)
    assert found["difference"]["high"] < 0
    assert found["agreement"]["mean"] == 0.6
    assert [one["mean"] for one in found["accuracy"]] == [0.7, 0.9]
    assert found["mcnemar"]["p_holm"] == pytest.approx(0.041389, abs=5e-7)
    assert found["says"].startswith("b is right more often than a: a minus b is -20.0 points")
    assert "p = 0.0414." in found["says"]


def test_several_comparisons_are_corrected():
    random_ = np.random.default_rng(0)
    margins = {
        name: (random_.normal(size=200) + shift).tolist() for name, shift in zip("abcd", (0, 0.3, 0.4, 1), strict=True)
    }
    comparisons = compare(tables_of(margins), seed=0)["comparisons"]
    p = sorted(found["mcnemar"]["p"] for found in comparisons)
    holm = np.minimum(np.maximum.accumulate([value * (6 - rank) for rank, value in enumerate(p)]), 1)
    assert sorted(found["mcnemar"]["p_holm"] for found in comparisons) == pytest.approx(holm.tolist())
    assert all("corrected for 6 comparisons" in found["says"] for found in comparisons)
    assert {found["says"].split()[0] for found in comparisons} >= {"No", "d"}


def test_one_model_has_nothing_to_be_compared_with():
    found = compare(tables_of({"a": [1.0, 2.0]}), seed=0)
    assert (found["comparisons"], found["stages"]) == ([], ["a"])
    assert found["why_empty"]


def test_pairs_that_one_model_has_no_score_for_are_left_out_of_both():
    found = compare(tables_of({"a": [1.0, math.nan, -1.0], "b": [1.0, 1.0, math.inf]}), seed=0)["comparisons"][0]
    assert (found["pairs"], found["not_finite"]) == (1, 2)
    nothing = compare(tables_of({"a": [math.nan], "b": [1.0]}), seed=0)["comparisons"][0]
    assert nothing["mcnemar"] is None
    assert "cannot be compared" in nothing["says"]


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysed(trained, tmp_path_factory):
    """The small run with a second reward stage, which is a copy of the first."""
    recipe, source = trained
    run = RunDir(tmp_path_factory.mktemp("errors") / "run")
    shutil.copytree(source.root, run.root)
    recipe = recipe.model_copy(update={"stages": {**recipe.stages, "twin": recipe.stages["rm"]}})
    shutil.copytree(run.root / "rm", run.root / "twin")
    run.mark_done(recipe, "twin", 0.0)
    errors(recipe, run)
    return recipe, run


def test_the_step_scores_every_held_out_pair(analysed):
    recipe, run = analysed
    pairs = read_jsonl(run.pairs("test"))
    model = load_reward_model(recipe, run, "rm")
    prompts, finished = [pair["prompt"] for pair in pairs], [True] * len(pairs)
    chosen, rejected = (model.score(prompts, [pair[s] for pair in pairs], finished, 1) for s in ("chosen", "rejected"))
    rows = {row["row"]: row for row in read_jsonl(run.scores("rm"))}
    assert len(rows) == len(pairs)
    for pair, first, second in zip(pairs, chosen.tolist(), rejected.tolist(), strict=True):
        row = rows[pair["row"]]
        assert (row["chosen_score"], row["rejected_score"]) == pytest.approx((first, second), abs=1e-4)
        assert row["margin"] == row["chosen_score"] - row["rejected_score"]
        assert row["chosen_characters"] == len(pair["chosen"])
        assert row["turns"] == sum(message["role"] == "user" for message in pair["prompt"])
    found = read_json(run.error_analysis("rm"))
    margin = (chosen - rejected).double()
    assert found["overall"]["accuracy"]["mean"] == pytest.approx(((margin.sign() + 1) / 2).mean().item())
    assert found["scores"]["nll"]["mean"] == pytest.approx(-margin.sigmoid().log().mean().item(), abs=1e-4)
    ids = {prompt["id"] for prompt in read_jsonl(run.prompts("test"))}
    assert {row["prompt_id"] for row in rows.values()} == ids


def test_the_analysis_can_be_computed_again_from_the_scores(analysed):
    recipe, run = analysed
    found = read_json(run.error_analysis("rm"))
    again = analyse(read_jsonl(run.scores("rm")), recipe.seed)
    assert found["stage"] == "rm"
    assert json.dumps({key: found[key] for key in again}, sort_keys=True) == json.dumps(again, sort_keys=True)


def test_the_step_writes_every_file(analysed):
    recipe, run = analysed
    report = run.error_report("rm").read_text()
    assert report.startswith("Error analysis of the reward model 'rm'")
    for finding in read_json(run.error_analysis("rm"))["findings"]:
        assert " ".join(finding["says"].split()) in " ".join(report.split())
    examples = read_jsonl(run.error_examples("rm"))
    assert sum(one["kind"] == "near_tie" for one in examples) == recipe.errors.examples
    assert matplotlib.image.imread(run.error_plots("rm")).std() > 0.05
    comparison = read_json(run.reward_comparison)
    assert comparison["stages"] == ["rm", "twin"]
    found = comparison["comparisons"][0]
    assert (found["mcnemar"]["p"], found["difference"]["mean"], found["agreement"]["mean"]) == (1, 0, 1)
    assert run.scores("rm").read_bytes() == run.scores("twin").read_bytes()


def test_the_step_repeats_and_takes_as_many_pairs_as_it_is_told(analysed, tmp_path):
    recipe, source = analysed
    run = RunDir(tmp_path / "run")
    shutil.copytree(source.root, run.root)
    stages = {name: stage for name, stage in recipe.stages.items() if name != "twin"}
    settings = recipe.errors.model_copy(update={"pairs": 9, "examples": 3})
    fewer = recipe.model_copy(update={"errors": settings, "stages": stages})
    errors(fewer, run)
    rows = read_jsonl(run.scores("rm"))
    assert len(rows) == 9
    everything = {row["row"]: row["margin"] for row in read_jsonl(source.scores("rm"))}
    assert [row["margin"] for row in rows] == pytest.approx([everything[row["row"]] for row in rows], abs=1e-5)
    assert sum(one["kind"] == "near_tie" for one in read_jsonl(run.error_examples("rm"))) == 3
    before = run.error_analysis("rm").read_bytes()
    errors(fewer, run)
    assert run.error_analysis("rm").read_bytes() == before


def test_the_step_needs_a_trained_reward_stage_and_pairs(analysed, tmp_path):
    recipe, source = analysed
    run = RunDir(tmp_path / "run")
    shutil.copytree(source.root, run.root)
    without = recipe.model_copy(update={"stages": {"sft": recipe.stages["sft"]}})
    with pytest.raises(UserError, match="no reward stage"):
        errors(without, run)
    write_jsonl(run.pairs("test"), [])
    with pytest.raises(UserError, match="no held-out pairs"):
        errors(recipe, run)
    run.done("twin").unlink()
    with pytest.raises(UserError, match="train RECIPE twin"):
        errors(recipe, run)
