"""The figures of the evaluation: what is drawn where, legible with one policy and with many, nothing for nothing."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from evaluation_fixtures import invent
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from report_fixtures import ANSWERS, GOLD, PROMPTS, STAGES, SUBSETS, training_stats

from rlhf_trl.evaluate import figures as evaluation_figures
from rlhf_trl.evaluate.figures import (
    plot_distributions,
    plot_kl,
    plot_over_optimisation,
    plot_pareto,
    plot_reward_kl_tradeoff,
    plot_training_curves,
)
from rlhf_trl.figures.policies import PAPER, curve_of, root_ticks, stage_lines, steps
from rlhf_trl.figures.training import BLUE, GREEN, ORANGE
from rlhf_trl.recipe.recipe import Recipe, expand_sweeps

Draw = Callable[[Callable[[Any, Path], None], Any], Figure | None]
SWEEP = {
    **STAGES,
    **GOLD,
    "dpo": {**STAGES["dpo"], "sweep": {"beta": [0.03, 0.1, 0.3, 1.0]}},
    "grpo": {**STAGES["grpo"], "sweep": {"beta": [0.05, 0.1, 0.2]}},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one": ({name: STAGES[name] for name in ("sft", "rm", "dpo")}, {"best_of_n": 0}),
    "three": ({**STAGES, **GOLD}, {"gold": "gold", "checkpoints": 4}),
    "eight": (SWEEP, {"gold": "gold", "checkpoints": 3}),
}


def make(stages: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    content = {
        "name": "run",
        "model": {"model_name_or_path": "gpt2"},
        "stages": stages,
        "evaluation": {"reward": "rm", "prompts": 40, **evaluation},
    }
    recipe = expand_sweeps(Recipe.model_validate(content))
    found = invent(recipe, PROMPTS, ANSWERS, 40, SUBSETS, (0.7, 0.55))
    draw = random.Random(1)
    found["stats"] = {stage: training_stats(stage, entry.trainer, 100, draw) for stage, entry in recipe.stages.items()}
    return found


def shrink(content: Any) -> Any:
    """A thousandth of every number: what a few steps of training leave."""
    if isinstance(content, dict):
        return {key: None if key == "fit" else shrink(value) for key, value in content.items()}
    if isinstance(content, list):
        return [shrink(value) for value in content]
    return content / 1000 if isinstance(content, float) else content


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    found = {name: make(*case) for name, case in CASES.items()}
    tiny = {key: shrink(found["three"][key]) for key in ("metrics", "pareto", "over_optimisation", "stats")}
    for entry in (*tiny["over_optimisation"]["stages"].values(), tiny["over_optimisation"]["best_of_n"]):
        entry["fit"] = {"proxy": None, "gold": None}
    return {**found, "tiny": tiny}


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Draw:
    """Draw a figure and keep it instead of its file."""
    kept: list[Figure] = []
    monkeypatch.setattr(evaluation_figures, "save", lambda figure, path: kept.append(figure))

    def keep(plot: Callable[[Any, Path], None], content: Any) -> Figure | None:
        kept.clear()
        plot(content, tmp_path / "figure.png")
        return kept[0] if kept else None

    return keep


PLOTS: list[tuple[Callable[[Any, Path], None], str]] = [
    (plot_distributions, "metrics"),
    (plot_kl, "metrics"),
    (plot_pareto, "pareto"),
    (plot_over_optimisation, "over_optimisation"),
    (plot_training_curves, "stats"),
    (plot_reward_kl_tradeoff, "stats"),
]


@pytest.mark.parametrize("case", [*CASES, "tiny"])
@pytest.mark.parametrize(("plot", "source"), PLOTS)
def test_no_text_covers_another_or_leaves_the_figure(
    case: str, plot: Any, source: str, cases: dict[str, Any], draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = draw(plot, cases[case][source])
    if case == "one" and plot in (plot_reward_kl_tradeoff, plot_over_optimisation):
        assert figure is None  # no online stage; no checkpoints and no best-of-n
        return
    assert figure is not None
    boxes = shown_texts(figure, monkeypatch)
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.x0 > -1 and box.y0 > -1, text
        assert box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1, text
    for (text, box), (other, second) in itertools.combinations(boxes, 2):
        width = min(box.x1, second.x1) - max(box.x0, second.x0)
        height = min(box.y1, second.y1) - max(box.y0, second.y0)
        assert width < 1 or height < 2, (text, other)


def shown_texts(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The texts that are really drawn (a tick outside its axis is not), with their boxes."""
    drawn: list[Text] = []
    original = Text.draw

    def draw(self: Text, renderer: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            drawn.append(self)
        original(self, renderer)

    renderer = FigureCanvasAgg(figure).get_renderer()
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        figure.draw(renderer)
    return [(text.get_text(), text.get_window_extent(renderer)) for text in drawn]


@pytest.mark.parametrize(("plot", "source"), PLOTS)
def test_a_file_is_a_png_the_same_each_time_and_nothing_global_changes(
    plot: Any, source: str, cases: dict[str, Any], tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams)
    for name in ("a", "b"):
        plot(cases["three"][source], tmp_path / "new" / f"{name}.png")
    assert dict(matplotlib.rcParams) == before
    content = (tmp_path / "new" / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content == (tmp_path / "new" / "b.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("plot", "content"),
    [
        (plot_distributions, {"histogram_edges": {}, "policies": {"reference": {}}}),
        (plot_kl, {"policies": {"reference": {}}, "checkpoints": {}}),
        (plot_pareto, {"axes": {}}),
        (plot_over_optimisation, {"stages": {}, "best_of_n": {"points": []}}),
        (plot_training_curves, {"sft": {"trainer": "sft", "history": []}}),
        (plot_reward_kl_tradeoff, {"dpo": {"trainer": "dpo", "history": [{"step": 1, "loss": 0.7}]}}),
    ],
)
def test_nothing_to_draw_leaves_no_file(plot: Any, content: Any, tmp_path: Path) -> None:
    plot(content, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_distributions_have_a_row_for_each_policy_and_the_reference_first(cases: dict[str, Any], draw: Draw) -> None:
    metrics = cases["three"]["metrics"]
    shuffled = {**metrics, "policies": dict(sorted(metrics["policies"].items()))}  # as JSON has them
    figure = draw(plot_distributions, shuffled)
    assert figure is not None
    left = figure.axes[::2]
    assert [axes.get_ylabel() for axes in left] == ["reference", "dpo", "grpo", "ppo"]
    assert left[-1].get_xlabel() == "score by the reward model, rm"
    assert figure.axes[-1].get_xlabel() == "score by the gold model, gold"
    for axes, name in zip(left, ["reference", "dpo", "grpo", "ppo"], strict=True):
        distribution = metrics["policies"][name]["distributions"]["reward"]
        (median,) = [line for line in axes.lines if len(set(line.get_xdata())) == 1]
        assert median.get_xdata()[0] == distribution["quantiles"]["0.5"]
        heights, edges, _ = axes.patches[0].get_data()
        assert heights == pytest.approx(np.array(distribution["counts"]) / sum(distribution["counts"]))
        assert edges == pytest.approx(metrics["histogram_edges"]["reward"])


def test_without_a_gold_model_there_is_one_column(cases: dict[str, Any], draw: Draw) -> None:
    figure = draw(plot_distributions, cases["one"]["metrics"])
    assert figure is not None
    assert len(figure.axes) == 2


def test_kl_shows_each_estimate_where_it_lies(cases: dict[str, Any], draw: Draw) -> None:
    metrics = cases["three"]["metrics"]
    figure = draw(plot_kl, metrics)
    assert figure is not None
    for key, color in (("kl", BLUE), ("kl_k1", ORANGE), ("kl_k3", GREEN)):
        marks = [line for line in figure.axes[0].lines if line.get_color() == color and len(line.get_xdata()) == 1]
        expected = [metrics["policies"][name][key]["mean"] for name in ("dpo", "grpo", "ppo")]
        assert [mark.get_xdata()[0] for mark in marks] == expected
    drift = figure.axes[1]
    exact = next(line for line in drift.lines if line.get_color() == BLUE)
    assert exact.get_xdata().tolist() == [30, 60, 90, 120]
    assert exact.get_ydata().tolist() == [row["kl"]["mean"] for row in metrics["checkpoints"]["dpo"]]


def test_a_runaway_k3_is_written_out_and_flattens_nothing(draw: Draw) -> None:
    def near(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.2, "high": mean + 0.2, "n": 40}

    summary = {"kl": near(2.0), "kl_k1": near(2.1), "kl_k3": near(31_000.0)}
    figure = draw(plot_kl, {"policies": {"reference": {}, "dpo": summary}, "checkpoints": {}})
    assert figure is not None
    assert figure.axes[0].get_xlim()[1] < 4
    assert "3.1e+04" in [text.get_text() for text in figure.axes[0].texts]


def test_the_frontier_is_hollow_where_dominated_and_steps_where_not(cases: dict[str, Any], draw: Draw) -> None:
    pareto = cases["three"]["pareto"]
    figure = draw(plot_pareto, {**pareto, "axes": dict(sorted(pareto["axes"].items()))})
    assert figure is not None
    panels = dict(zip(("reward", "gold"), figure.axes, strict=True))  # reward first, though JSON is sorted
    assert [axes.get_ylabel() for axes in panels.values()] == [f"{s} gain over the reference" for s in panels]
    for score, axes in panels.items():
        frontier = pareto["axes"][score]
        for point in frontier["points"]:
            place = (point["kl"]["mean"], point["gain"]["mean"])
            marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
            (mark,) = [line for line in marks if (line.get_xdata()[0], line.get_ydata()[0]) == place]
            assert mark.get_marker() == {None: "D", "dpo": "o", "grpo": "s", "ppo": "^"}[point["trainer"]]
            assert (to_hex(mark.get_markerfacecolor()) == PAPER) == (not point["on_front"])
        curve = next(line for line in axes.lines if line.get_marker() == "." and len(line.get_xdata()) > 1)
        assert curve.get_xdata().tolist() == pytest.approx([0, 0.193147, 0.636294, 1.204442, 1.835089], abs=1e-6)
        labels = [text.get_text() for text in axes.texts]
        assert sorted(labels) == ["best of 16", "dpo", "grpo", "ppo", "reference"]


def test_over_optimisation_draws_the_fitted_curve_and_says_where_it_peaks(draw: Draw) -> None:
    def at(kl: float, proxy: float, gold: float) -> dict[str, Any]:
        around = {key: {"mean": m, "low": m - 0.05, "high": m + 0.05} for key, m in (("proxy", proxy), ("gold", gold))}
        return {"step": round(10 * kl), "kl": {"mean": kl, "low": kl, "high": kl}, **around}

    # d (alpha - beta log d) peaks at d = exp(alpha / beta - 1): with alpha = beta at d = 1.
    gold = {"alpha": 0.5, "beta": 0.5, "peak_sqrt_kl": 1.0, "peak_kl": 1.0, "r2": 1.0}
    proxy = {"alpha": 0.5, "beta": 0.01, "peak_sqrt_kl": 1e20, "peak_kl": 1e40, "r2": 1.0}
    points = [at(kl, 0.5 * kl**0.5, 0.5 * kl**0.5 * (1 - math.log(kl**0.5))) for kl in (0.5, 1.0, 4.0)]
    single = {"points": points[:1], "fit": {"proxy": None, "gold": None}, "form": "rl"}
    entry = {"points": points, "fit": {"proxy": proxy, "gold": gold}, "form": "rl"}
    figure = draw(plot_over_optimisation, {"stages": {"ppo": entry, "dpo": single}, "best_of_n": {"points": []}})
    assert figure is not None
    (axes,) = figure.axes  # a stage without checkpoints is no course
    assert axes.get_xlabel().splitlines()[1:] == ["proxy peak: beyond the data", "gold peak: KL 1"]
    curves = [line for line in axes.lines if len(line.get_xdata()) == 199]
    assert [line.get_color() for line in curves] == [BLUE, ORANGE]
    kl, gain = curves[1].get_data()
    assert kl[np.argmax(gain)] == pytest.approx(1, abs=0.05)
    assert gain.max() == pytest.approx(0.5, abs=1e-3)
    peak = next(line for line in axes.lines if line.get_linestyle() == ":")
    assert peak.get_xdata() == pytest.approx([1, 1])
    assert peak.get_ydata() == pytest.approx([0, 0.5])


@pytest.mark.parametrize(("form", "peak", "top"), [("rl", math.exp(2 / 0.5 - 1) ** 2, None), ("bon", 4.0, 2.0)])
def test_curves_are_those_of_gao_et_al(form: str, peak: float, top: float | None) -> None:
    fit = {"alpha": 2.0, "beta": 0.5}
    d = math.sqrt(peak)
    values = curve_of(fit, form, np.array([0.98 * d, d, 1.02 * d]) ** 2)
    assert values[1] > values[0] and values[1] > values[2]
    assert values[1] == pytest.approx(top if top else 0.5 * d)  # rl: d (alpha - beta log d) at the peak is beta d


def test_training_curves_have_a_row_for_each_stage(cases: dict[str, Any], draw: Draw) -> None:
    figure = draw(plot_training_curves, cases["three"]["stats"])
    assert figure is not None
    shown = [axes for axes in figure.axes if axes.get_visible()]
    rows = [axes.get_ylabel() for axes in shown if axes.get_ylabel()]
    assert rows == ["sft\n(sft)", "rm\n(reward)", "dpo\n(dpo)", "grpo\n(grpo)", "ppo\n(ppo)", "gold\n(reward)"]
    titles = [axes.texts[0].get_text() for axes in shown]
    assert titles.count("Loss") == 6
    assert titles.count("Reward accuracy") == 3
    assert "KL to the reference (nats per token)" in titles and "KL to the reference (nats per answer)" in titles


def test_logged_kls_of_two_trainers_share_no_axis(cases: dict[str, Any], draw: Draw) -> None:
    stats = cases["eight"]["stats"]
    figure = draw(plot_reward_kl_tradeoff, stats)
    assert figure is not None
    grpo, ppo, bar = figure.axes
    assert "KL as grpo logs it: k3 estimate" in grpo.get_xlabel()
    assert ppo.get_xlabel() == "KL as ppo logs it: k1 estimate, nats per answer"
    assert not grpo.get_shared_x_axes().joined(grpo, ppo)
    assert [line.get_label() for line in grpo.lines] == ["grpo-beta=0.05", "grpo-beta=0.1", "grpo-beta=0.2"]
    assert len({line.get_linestyle() for line in grpo.lines}) == 3
    # 100 logged steps are drawn as means of 3, and the last mark is the mean of one.
    assert "mean of up to 3 logs" in bar.get_ylabel()
    history = stats["ppo"]["history"]
    (line,) = ppo.lines
    assert len(line.get_xdata()) == 34
    assert line.get_xdata()[0] == pytest.approx(np.mean([row["kl"] for row in history[:3]]))
    assert line.get_ydata()[-1] == pytest.approx(history[-1]["reward"])


def test_a_stage_that_logged_no_kl_has_no_trade_off(cases: dict[str, Any], draw: Draw) -> None:
    stats = cases["three"]["stats"]
    silent = [{key: value for key, value in row.items() if key != "kl"} for row in stats["grpo"]["history"]]
    figure = draw(plot_reward_kl_tradeoff, {**stats, "grpo": {**stats["grpo"], "history": silent}})
    assert figure is not None
    assert len(figure.axes) == 2  # ppo, and the colours


# --- parts -----------------------------------------------------------------------------------------------------------


def test_steps_hold_the_best_gain_so_far() -> None:
    front = [(4.0, 2.0), (0.0, 0.0), (1.0, 1.5)]
    assert steps(front, 9) == [(0, 0), (1, 0), (1, 1.5), (4, 1.5), (4, 2), (9, 2)]
    assert steps([], 9) == []


@given(st.floats(1e-6, 1e6), st.floats(-2, 0))
def test_ticks_are_round_rising_and_apart(right: float, share: float) -> None:
    left = share * right
    ticks = root_ticks(left, right)
    assert 0 in ticks
    assert 2 <= len(ticks) <= 9
    assert left <= ticks[0] and right / 4 <= ticks[-1] <= right
    roots = np.sign(ticks) * np.sqrt(np.abs(ticks))
    assert (np.diff(roots) >= 0.12 * (math.sqrt(-left) + math.sqrt(right))).all()
    assert all(float(f"{tick:.0e}") == pytest.approx(tick) for tick in ticks)


def test_stages_of_one_trainer_have_different_lines() -> None:
    lines = stage_lines({"a": "grpo", "b": "ppo", "c": "grpo", "d": "grpo", "e": "ppo"})
    assert lines == {"a": "-", "b": "-", "c": "--", "d": ":", "e": "--"}
