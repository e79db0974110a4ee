"""The figures of the evaluation: what is drawn where, legible with one policy and with many, nothing for nothing."""

import itertools
import math
import random
from collections.abc import Callable
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
from report_fixtures import ANSWERS, GOLD, PROMPTS, STAGES, SUBSETS, recipe_of, training_stats

from rlhf_trl.evaluate.figures import (
    plot_distributions,
    plot_kl,
    plot_over_optimisation,
    plot_pareto,
    plot_reward_kl_tradeoff,
)
from rlhf_trl.figures.frontier import curve_of, draw_frontier
from rlhf_trl.figures.style import BLUE, GREEN, ORANGE, PAPER, policy_styles, root_scale, save
from rlhf_trl.figures.training import plot_training

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
PLOTS: list[tuple[Callable[[Any], Figure | None], str, Any]] = [  # what it draws from, and what leaves nothing to draw
    (plot_distributions, "metrics", {"policies": {"reference": {"distributions": {}}}}),
    (plot_kl, "metrics", {"policies": {"reference": {}}, "checkpoints": {}}),
    (plot_pareto, "pareto", {"axes": {}}),
    (plot_over_optimisation, "over_optimisation", {"stages": {}, "best_of_n": {"points": []}}),
    (plot_training, "stats", {"sft": {"trainer": "sft", "history": []}}),
    (plot_reward_kl_tradeoff, "stats", {"dpo": {"trainer": "dpo", "history": [{"step": 1, "loss": 0.7}]}}),
]


def make(stages: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    recipe = recipe_of(stages, evaluation={"reward": "rm", "prompts": 40, **evaluation})
    draw = random.Random(1)
    stats = {stage: training_stats(stage, entry.trainer, 100, draw) for stage, entry in recipe.stages.items()}
    return {**invent(recipe, PROMPTS, ANSWERS, 40, SUBSETS, (0.7, 0.55)), "stats": stats}


def shrink(content: Any) -> Any:
    """A thousandth of every number: what a few steps of training leave."""
    if isinstance(content, dict):
        return {key: {"proxy": None, "gold": None} if key == "fit" else shrink(of) for key, of in content.items()}
    if isinstance(content, list):
        return [shrink(value) for value in content]
    return content / 1000 if isinstance(content, float) else content


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    made = {name: make(*case) for name, case in CASES.items()}
    return {**made, "tiny": {source: shrink(made["three"][source]) for _, source, _ in PLOTS}}


@pytest.mark.parametrize("case", [*CASES, "tiny"])
@pytest.mark.parametrize(("plot", "source", "_"), PLOTS)
def test_no_text_covers_another_or_leaves_the_figure(case, plot, source, _, cases, monkeypatch):
    if case == "one" and plot in (plot_reward_kl_tradeoff, plot_over_optimisation):
        assert plot(cases[case][source]) is None  # no online stage; no checkpoints and no best-of-n
        return
    figure = plot(cases[case][source])
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
    texts: list[Text] = []
    original = Text.draw

    def draw(self: Text, renderer: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            texts.append(self)
        original(self, renderer)

    renderer = FigureCanvasAgg(figure).get_renderer()
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        figure.draw(renderer)
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts]


@pytest.mark.parametrize(("plot", "source", "nothing"), PLOTS)
def test_a_file_is_a_png_the_same_each_time_and_nothing_global_changes(plot, source, nothing, cases, tmp_path):
    before = dict(matplotlib.rcParams)
    for name in ("a", "b"):
        save(plot(cases["three"][source]), tmp_path / "new" / f"{name}.png")
    save(plot(nothing), tmp_path / "new" / "nothing.png")
    assert dict(matplotlib.rcParams) == before
    content = (tmp_path / "new" / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content == (tmp_path / "new" / "b.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "b.png"]


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_distributions_and_kls_have_a_row_for_each_policy(cases):
    metrics = cases["three"]["metrics"]
    figure = plot_distributions({**metrics, "policies": dict(sorted(metrics["policies"].items()))})
    reward, gold = figure.axes
    assert [text.get_text() for text in reward.get_yticklabels()] == ["reference", "dpo", "grpo", "ppo"]
    assert (reward.get_xlabel(), gold.get_xlabel()) == (
        "score by the reward model, rm",
        "score by the gold model, gold",
    )
    quantiles = metrics["policies"]["ppo"]["distributions"]["gold"]
    box, median = gold.patches[-1].get_bbox(), gold.lines[-1]
    assert (box.x0, box.x1) == pytest.approx((quantiles["0.25"], quantiles["0.75"]))
    assert median.get_xdata()[0] == quantiles["0.5"]
    (axes,) = plot_kl(metrics).axes
    for key, color in (("kl", BLUE), ("kl_k1", ORANGE), ("kl_k3", GREEN)):
        (marks,) = [line for line in axes.lines if line.get_color() == color]
        assert marks.get_xdata().tolist() == [
            metrics["policies"][name][key]["mean"] for name in ("dpo", "grpo", "ppo")
        ]


def test_a_runaway_k3_is_written_out_and_flattens_nothing():
    summary = {key: {"mean": mean, "low": low, "high": mean + 0.2, "n": 40}
               for key, mean, low in (("kl", 2.0, 1.8), ("kl_k1", 2.1, 1.9), ("kl_k3", 3.1e4, -3.1e4))}  # fmt: skip
    figure = plot_kl({"policies": {"reference": {}, "dpo": summary}, "checkpoints": {}})
    assert -4 < figure.axes[0].get_xlim()[0] < figure.axes[0].get_xlim()[1] < 4
    assert "3.1e+04" in [text.get_text() for text in figure.axes[0].texts]


def test_the_frontier_is_hollow_where_dominated_and_steps_where_not(cases):
    pareto = cases["three"]["pareto"]
    figure = plot_pareto({**pareto, "axes": dict(sorted(pareto["axes"].items()))})
    panels = dict(zip(("reward", "gold"), figure.axes, strict=True))  # reward first, though JSON is sorted
    assert [axes.get_ylabel() for axes in panels.values()] == [f"{score} gain over the reference" for score in panels]
    for score, axes in panels.items():
        frontier = pareto["axes"][score]
        for point in frontier["points"]:
            place = (point["kl"]["mean"], point["gain"]["mean"])
            marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
            (mark,) = [line for line in marks if (line.get_xdata()[0], line.get_ydata()[0]) == place]
            assert mark.get_marker() == {None: "D", "dpo": "o", "grpo": "s", "ppo": "^"}[point["trainer"]]
            assert (to_hex(mark.get_markerfacecolor()) == PAPER) == (not point["on_front"])
        lines = {line.get_label(): line for line in axes.lines}
        assert lines["best of n, up to 16"].get_xdata().tolist() == pytest.approx(
            [0, 0.193147, 0.636294, 1.204442, 1.835089], abs=1e-6
        )
        on_front = sorted((p["kl"]["mean"], p["gain"]["mean"]) for p in frontier["points"] if p["on_front"])
        assert lines["front"].get_drawstyle() == "steps-post"
        assert list(zip(*lines["front"].get_data(), strict=True))[:-1] == on_front
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names >= {"reference", "dpo", "grpo", "ppo", "front", "best of n, up to 16", "checkpoints"}


def test_over_optimisation_draws_the_fitted_curve_and_its_peak():
    def at(kl: float, proxy: float, gold: float) -> dict[str, Any]:
        around = {key: {"mean": m, "low": m - 0.05, "high": m + 0.05} for key, m in (("proxy", proxy), ("gold", gold))}
        return {"step": round(10 * kl), "kl": {"mean": kl, "low": kl, "high": kl}, **around}

    # d (alpha - beta log d) peaks at d = exp(alpha / beta - 1): with alpha = beta at d = 1.
    fits = {
        "gold": {"alpha": 0.5, "beta": 0.5, "peak_kl": 1.0},
        "proxy": {"alpha": 0.5, "beta": 0.01, "peak_kl": 1e40},
    }
    points = [at(kl, 0.5 * kl**0.5, 0.5 * kl**0.5 * (1 - math.log(kl**0.5))) for kl in (0.5, 1.0, 4.0)]
    single = {"points": points[:1], "fit": {"proxy": None, "gold": None}, "form": "rl"}
    entry = {"points": points, "fit": fits, "form": "rl"}
    figure = plot_over_optimisation({"stages": {"ppo": entry, "dpo": single}, "best_of_n": {"points": []}})
    (axes,) = figure.axes  # a stage without checkpoints is no course
    curves = [line for line in axes.lines if len(line.get_xdata()) == 199]
    assert [line.get_color() for line in curves] == [BLUE, ORANGE]
    kl, gain = curves[1].get_data()
    assert kl[np.argmax(gain)] == pytest.approx(1, abs=0.05)
    assert gain.max() == pytest.approx(0.5, abs=1e-3)
    (peak,) = [line for line in axes.lines if line.get_linestyle() == ":"]  # the other one lies far outside
    assert (peak.get_xdata(), peak.get_ydata()) == (pytest.approx([1, 1]), pytest.approx([0, 0.5]))


@pytest.mark.parametrize(("form", "peak", "top"), [("rl", math.exp(2 / 0.5 - 1) ** 2, None), ("bon", 4.0, 2.0)])
def test_curves_are_those_of_gao_et_al(form, peak, top):
    fit = {"alpha": 2.0, "beta": 0.5}
    d = math.sqrt(peak)
    values = curve_of(fit, form, np.array([0.98 * d, d, 1.02 * d]) ** 2)
    assert values[1] > values[0] and values[1] > values[2]
    assert values[1] == pytest.approx(top if top else 0.5 * d)  # rl: d (alpha - beta log d) at the peak is beta d


def test_logged_kls_of_two_trainers_share_no_axis(cases):
    stats = cases["eight"]["stats"]
    grpo, ppo = plot_reward_kl_tradeoff(stats).axes
    assert "KL as grpo logs it: k3 estimate" in grpo.get_xlabel()
    assert ppo.get_xlabel() == "KL as ppo logs it: k1 estimate, nats per answer"
    assert [line.get_label() for line in grpo.lines] == ["grpo-beta=0.05", "grpo-beta=0.1", "grpo-beta=0.2"]
    # 100 logged steps are drawn as means of 3, and the last mark is the mean of one.
    history = stats["ppo"]["history"]
    (line,) = ppo.lines
    assert len(line.get_xdata()) == 34
    assert line.get_xdata()[0] == pytest.approx(np.mean([row["kl"] for row in history[:3]]))
    assert line.get_ydata()[-1] == pytest.approx(history[-1]["reward"])
    # A stage that logged no KL has no trade-off.
    silent = {**stats["grpo-beta=0.1"], "history": [{"step": 1, "reward": 0.5}]}
    assert len(plot_reward_kl_tradeoff({"ppo": stats["ppo"], "grpo": silent}).axes) == 1


# --- parts -----------------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e6), st.floats(-2, 0))
def test_ticks_are_round_rising_and_apart(right, share):
    axes, left = Figure().add_subplot(), share * right
    root_scale(axes, left, right)
    ticks = axes.get_xticks().tolist()
    assert 0 in ticks
    assert 2 <= len(ticks) <= 7
    roots = np.sign(ticks) * np.sqrt(np.abs(ticks))
    assert (np.diff(roots) >= 0.11 * math.sqrt(max(-left, right))).all()
    assert all(float(f"{tick:.0e}") == pytest.approx(tick) for tick in ticks)


def test_the_figure_of_win_rates_is_about_half():
    def around(mean: float, half: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - half, "high": mean + half}

    places = (("reference", None, 0.0, 0.5), ("dpo", "dpo", 4.0, 0.93), ("ppo", "ppo", 9.0, 0.52))
    points = [{"policy": name, "trainer": trainer, "step": None, "on_front": True, "kl": around(kl, 0.1),
               "gain": around(gain, 0.1)} for name, trainer, kl, gain in places]  # fmt: skip
    axes = Figure().add_subplot()
    draw_frontier(axes, {"points": points, "best_of_n": []}, "win_rate")
    assert list(axes.get_lines()[0].get_ydata()) == [0.5, 0.5]
    assert axes.get_ylabel() == "win rate against the reference"
    assert 0.3 < axes.get_ylim()[0] < 0.4 and axes.get_ylim()[1] == 1.05


def test_stages_of_one_trainer_have_one_colour_and_different_markers_and_lines():
    styles = policy_styles({"a": "grpo", "b": "ppo", "c": "grpo", "d": "grpo", "e": "ppo"})
    assert [styles[name]["linestyle"] for name in "abcde"] == ["-", "-", "--", ":", "--"]
    assert [styles[name]["color"] for name in "abcde"] == [ORANGE, GREEN, ORANGE, ORANGE, GREEN]
    assert len({styles[name]["marker"] for name in "acd"}) == 3
