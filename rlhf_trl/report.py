"""Step `report`: one page, for a reader new to the run, that says what came out and where each number is from.

Reads the JSON and JSONL files of the run directory; writes `report.html`, which needs no other file and no script.
A value gets onto the page by its address, `evaluation/metrics.json#/policies/dpo/kl` (the file and a JSON Pointer, see
RFC 6901; lines of a JSONL file count from 0), and carries it as `data-source`; the template cannot print a number
otherwise.

    rlhf-trl report recipes/demo.yaml
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined
from markupsafe import Markup
from ruamel.yaml import YAML

from rlhf_trl.figures import PANELS
from rlhf_trl.recipe import Recipe
from rlhf_trl.report_figures import LINE_STYLES, Point, plot_curves, plot_reward_kl
from rlhf_trl.rundir import RunDir, read_json, read_jsonl, write_text

TEMPLATES = Path(__file__).parent / "templates"
REFERENCE = "reference"
SAMPLES = 8
# A text longer than this is cut for display, and the page says so; longer than PREVIEW, it is folded.
MAX_CHARACTERS = 20_000
PREVIEW = 420
# Characters that act or cannot be seen: controls, format marks (such as those that turn the direction of text), lone
# surrogates, separators; all but line ends, tabs and the joiners that scripts and emoji need.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
HARMLESS = "\n\t\u200c\u200d"


def report(recipe: Recipe, run: RunDir) -> None:
    """Write the page.

    Raises:
        UserError: a stage or the evaluation is missing, or was made with other settings.
    """
    run.require(recipe, "prepare", "prepare RECIPE")
    for stage in recipe.stages:
        run.require(recipe, stage, f"train RECIPE {stage}")
    run.require(recipe, "evaluate", "evaluate RECIPE")
    write_text(run.report, render(recipe, run))


def render(recipe: Recipe, run: RunDir) -> str:
    """Render the page from the files of a finished run."""
    files = _name_files(recipe, run)
    documents: dict[str, Any] = {
        name: (read_jsonl if name.endswith(".jsonl") else read_json)(run.root / name) for name in _flat(files)
    }
    metrics, stats = documents[files["metrics"]], {stage: documents[name] for stage, name in files["stats"].items()}
    verdicts = {name: judge_gain(metrics["policies"][name]) for name in recipe.policies}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"value": partial(show_value, documents), "source": partial(show_source, documents)}
    page = environment.get_template("report.html.j2").render(
        recipe=recipe,
        recipe_lines=_as_yaml(documents[files["recipe"]], list(recipe.stages)).split("\n"),
        files=files,
        contents=list_contents(recipe, run),
        metrics=metrics,
        summary=documents[files["summary"]],
        env=documents[files["env"]],
        stats=stats,
        quarantine=_relative(run, run.quarantine),
        completions={policy: documents[name] for policy, name in files["completions"].items()},
        verdicts=verdicts,
        better=[name for name, verdict in verdicts.items() if verdict == "better"],
        others=[name for name, verdict in verdicts.items() if verdict != "better"],
        reward_verdict=judge_reward_model(metrics["reward_model"]) if metrics["reward_model"] else None,
        trained_on_judge=[name for name in recipe.policies if recipe.stages[name].reward == metrics["reward_stage"]],
        trainers=list(dict.fromkeys(recipe.stages[name].trainer.upper() for name in recipe.policies)),
        starts=sorted({recipe.stages[name].init or "" for name in recipe.policies}),
        scatter=draw_scatter(recipe, metrics),
        panels={stage: draw_panels(stage, stats[stage]["history"]) for stage in recipe.stages},
        samples=choose_samples([documents[files["completions"][name]] for name in files["completions"]]),
        PREVIEW=PREVIEW,
    )
    return page.lstrip()


def _name_files(recipe: Recipe, run: RunDir) -> dict[str, Any]:
    """Name the files that the page reads, relative to the run directory; `done` of `explore` only if it was run."""
    steps = ["prepare", *recipe.stages, "evaluate"]
    if run.done("explore").exists():
        steps.insert(0, "explore")
    policies = [REFERENCE, *recipe.policies] if recipe.policies else []
    paths: dict[str, Any] = {
        "recipe": run.recipe,
        "env": run.env,
        "summary": run.summary,
        "metrics": run.metrics,
        "stats": {stage: run.training_stats(stage) for stage in recipe.stages},
        "done": {step: run.done(step) for step in steps},
        "completions": {policy: run.completions(policy) for policy in policies},
    }

    def name(path: Any) -> Any:
        return {key: name(value) for key, value in path.items()} if isinstance(path, dict) else _relative(run, path)

    return name(paths)


def _relative(run: RunDir, path: Path) -> str:
    return path.relative_to(run.root).as_posix()


def _flat(files: Mapping[str, Any]) -> list[str]:
    return [name for value in files.values() for name in (_flat(value) if isinstance(value, dict) else [value])]


def _as_yaml(recipe: dict[str, Any], order: Sequence[str]) -> str:
    """Write a recipe in the order that people write it in; in JSON its keys, stages included, are sorted."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    buffer = io.StringIO()
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    recipe = {key: recipe[key] for key in Recipe.model_fields}
    yaml.dump({**recipe, "stages": {stage: recipe["stages"][stage] for stage in order}}, buffer)
    return buffer.getvalue().rstrip("\n")


def list_contents(recipe: Recipe, run: RunDir) -> list[tuple[str, str]]:
    """List what lies where in the run directory: path and content."""
    rows = [
        (run.recipe, "the resolved recipe"),
        (run.env, "versions, git state and hardware"),
        (run.exploration, "statistics, figures and samples of the raw data"),
        (run.summary, "what became of every row of the source"),
        (run.quarantine, "the dropped rows, each with its reasons"),
        *((run.pairs(split), f"preference pairs ({split})") for split in ("train", "test")),
        *((run.prompts(split), f"prompts ({split})") for split in ("train", "test")),
        (run.tokenizer, "the tokenizer, as every stage used it"),
    ]
    for stage in recipe.stages:
        adapted = recipe.model_block(stage).get("use_peft")
        weights = (run.adapter(stage), "LoRA adapter") if adapted else (run.model(stage), "full model")
        rows += [weights, (run.training_stats(stage), "every logged step"), (run.training_curves(stage), "its curves")]
    rows += [(run.metrics, "the numbers of this page's results")]
    if recipe.policies:
        rows += [
            (run.completions(name), "every answer, with its reward and KL") for name in (REFERENCE, *recipe.policies)
        ]
    return [(_relative(run, path), content) for path, content in rows]


# --- what the numbers say --------------------------------------------------------------------------------------------


def judge_gain(policy: Mapping[str, Any]) -> str:
    """Say what the paired reward gain shows: `better`, `worse`, `same` (its interval holds 0), or `unscored`."""
    if "reward_gain" not in policy:
        return "unscored"
    gain = policy["reward_gain"]
    return "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "same"


def judge_reward_model(result: Mapping[str, Any]) -> str:
    """Compare the accuracy with what length alone can do: prefer the longer answer, or prefer the shorter one.

    Returns:
        `above` or `below` where the interval is clear of both rules' intervals, else `unclear`.
    """
    accuracy, longer = result["accuracy"], result["length_baseline"]
    if accuracy["low"] > max(longer["high"], 1 - longer["low"]):
        return "above"
    return "below" if accuracy["high"] < min(longer["low"], 1 - longer["high"]) else "unclear"


def draw_scatter(recipe: Recipe, metrics: Mapping[str, Any]) -> list[Markup]:
    """Draw reward gain against KL, for a wide page and for a phone; nothing without a reward stage."""
    measured = metrics["policies"]
    names = [name for name in recipe.policies if "reward_gain" in measured[name]]
    if not names:
        return []
    points = [Point(n, recipe.stages[n].trainer, measured[n]["kl"], measured[n]["reward_gain"]) for n in names]
    label = "Reward gain over the reference against KL to the reference. " + " ".join(
        f"{p.name}: {format_estimate(p.gain, sign='+')} at {format_estimate(p.kl)} nats." for p in points
    )
    more = max(0, len(points) - 6)  # names need room
    sizes = {"wide": (900, 380 + 14 * more), "narrow": (360, 380 + 32 * more)}
    return [Markup(plot_reward_kl(points, *size, f"reward-kl-{name}", label)) for name, size in sizes.items()]


def draw_panels(stage: str, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw the training curves of a stage, one small figure for each quantity that was logged."""
    panels = []
    for title, labels in PANELS.items():
        rows = {key: [i for i, row in enumerate(history) if key in row] for key in labels}
        series = [key for key in labels if rows[key]]
        if not series:
            continue
        ends = {key: (history[rows[key][0]][key], history[rows[key][-1]][key]) for key in series}
        words = [f"{labels[key] or key}: from {first:.3g} to {last:.3g}." for key, (first, last) in ends.items()]
        label = f"{title} of {stage} by step, up to step {history[-1]['step']}. {' '.join(words)}"
        panels.append({
            "title": title,
            "svg": Markup(plot_curves(history, series, f"{stage}-{series[0]}", label)),
            "series": [{"key": key, "label": labels[key], "color": color, "first": rows[key][0], "last": rows[key][-1]}
                       for key, (_, _, color) in zip(series, LINE_STYLES, strict=False)],
        })  # fmt: skip
    return panels


def choose_samples(completions: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
    """Choose prompts for show: the first of each subset in turn, in evaluation's own order, whatever the answers are.

    Returns:
        For each prompt, its line in every file of completions.
    """
    if not completions:
        return []
    turns: defaultdict[str, int] = defaultdict(int)
    order = []
    for line, row in enumerate(completions[0]):
        order.append((turns[row["subset"]], line))
        turns[row["subset"]] += 1
    lines = [{row["id"]: line for line, row in enumerate(rows)} for rows in completions]
    return [[of[completions[0][line]["id"]] for of in lines] for _, line in sorted(order)[:SAMPLES]]


# --- values on the page ----------------------------------------------------------------------------------------------


def show_value(documents: Mapping[str, Any], style: str, file: str, *keys: str | int) -> Markup:
    """Print the value at an address, marked with that address; a value that is null prints a dash."""
    value = _resolve(documents, file, keys)
    text = printable(STYLES[style](value)) if value is not None else "–"
    if isinstance(value, dict):
        mean, bracket, interval = text.partition(" [")
        text = Markup('<b>{}</b><span class="ci">{}</span>').format(mean, bracket + interval)
    address = printable(pointer(file, keys))
    kind = "text" if style == "text" else "number"
    return Markup('<span class="{0}" data-source="{1}" title="{1}">{2}</span>').format(kind, address, text)


def show_source(documents: Mapping[str, Any], file: str, *keys: str | int) -> Markup:
    """Print where the numbers of a section come from."""
    _resolve(documents, file, keys)
    place = Markup(" › <code>{}</code>").format(printable(".".join(str(key) for key in keys))) if keys else ""
    return Markup('<span class="from" data-path="{}"><a href="{}"><code>{}</code></a>{}</span>').format(
        printable(pointer(file, keys)), quote(file), printable(file), place
    )


def _resolve(documents: Mapping[str, Any], file: str, keys: Sequence[str | int]) -> Any:
    value = documents[file]
    for key in keys:
        value = value[key]
    return value


def pointer(file: str, keys: Sequence[str | int]) -> str:
    """Write an address: the file, and a JSON Pointer (RFC 6901) into it."""
    return f"{file}#" + "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def printable(value: Any) -> Any:
    """Make a string safe to look at: no control, direction-changing or invisible character acts, and none is hidden.

    The template's last step before escaping. Refuses numbers, which must come through `show_value` with their address.
    """
    if isinstance(value, (Markup, Undefined)):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is printed without its source")
    shown = "".join(map(_visible, value[:MAX_CHARACTERS]))
    if len(value) > MAX_CHARACTERS:
        shown += f" […] (cut here for display: {len(value):,} characters in all)"
    return shown


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in HIDDEN and character not in HARMLESS
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


def format_estimate(estimate: Mapping[str, float], sign: str = "", percent: bool = False) -> str:
    """Print mean and interval to two digits of the interval's width; the mean alone where there is no spread."""
    scale, unit, fewest = (100, "\u00a0%", 1) if percent else (1, "", 0)
    mean, low, high = (scale * estimate[key] for key in ("mean", "low", "high"))
    if low == high:
        return f"{mean:{sign}.3g}{unit}".replace("-", "−")
    decimals = min(6, max(fewest, 1 - math.floor(math.log10(high - low))))
    mean, low, high = (round(number, decimals) + 0.0 for number in (mean, low, high))  # + 0.0: no minus nought
    text = f"{mean:{sign}.{decimals}f}{unit} [{low:{sign}.{decimals}f}, {high:{sign}.{decimals}f}]"
    return text.replace("-", "−")


def format_number(value: float) -> str:
    """Print two decimals, or the first digit where those would be zeros."""
    return (f"{value:.1g}" if 0 < abs(value) < 0.005 else f"{value:.2f}").replace("-", "−")


def format_seconds(value: float) -> str:
    """Print a duration in its two largest units."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def format_bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


STYLES: dict[str, Callable[[Any], str]] = {
    "estimate": format_estimate,
    "gain": partial(format_estimate, sign="+"),
    "share": partial(format_estimate, percent=True),
    "number": format_number,
    "percent": lambda value: f"{100 * value:.1f}\u00a0%",
    "count": lambda value: f"{value:,.0f}" if value == round(value) else f"{value:,.1f}",
    "seconds": format_seconds,
    "bytes": format_bytes,
    "short": lambda value: f"{value:.3g}".replace("-", "−"),
    "plain": str,
    "date": lambda value: value[:10],
    "moment": lambda value: value[:16].replace("T", " "),
    "text": str,
}
