"""Step `report`: one page, for a reader who has never seen the run, that says what came out and where each number is from.

Reads the JSON and JSONL files of the run directory; writes `report.html`, which needs no other file and holds no script.
Every value on the page is put there by its address, `evaluation/metrics.json#/policies/dpo/kl` (file, then a JSON Pointer as in
RFC 6901; lines of a JSONL file count from 0), and carries it as `data-source`; the template can print no number otherwise.

    rlhf-trl report recipes/demo.yaml
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
# Joiners that scripts and emoji need; every other invisible character is made visible.
JOINERS = "\u200c\u200d"


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
    documents = {name: (read_jsonl if name.endswith("l") else read_json)(run.root / name) for name in _flat(files)}
    metrics, stats = documents[files["metrics"]], {stage: documents[name] for stage, name in files["stats"].items()}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"value": partial(show_value, documents), "source": partial(show_source, documents)}
    return environment.get_template("report.html.j2").render(
        recipe=recipe,
        recipe_lines=_as_yaml(documents[files["recipe"]]).splitlines(),
        files=files,
        contents=list_contents(recipe, run),
        metrics=metrics,
        summary=documents[files["summary"]],
        env=documents[files["env"]],
        stats=stats,
        verdicts={name: judge_gain(metrics["policies"][name]) for name in recipe.policies},
        reward_verdict=judge_reward_model(metrics["reward_model"]) if metrics["reward_model"] else None,
        trained_on_judge=[name for name in recipe.policies if recipe.stages[name].reward == metrics["reward_stage"]],
        starts=sorted({recipe.stages[name].init or "" for name in recipe.policies}),
        scatter=draw_scatter(recipe, metrics),
        panels={stage: draw_panels(stage, stats[stage]["history"]) for stage in recipe.stages},
        samples=choose_samples([documents[files["completions"][name]] for name in files["completions"]]),
        PREVIEW=PREVIEW,
    )


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


def _as_yaml(recipe: Any) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    buffer = io.StringIO()
    yaml.dump(recipe, buffer)
    return buffer.getvalue()


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
    rows += [(run.completions(name), f"every answer of {name}") for name in (REFERENCE, *recipe.policies) if recipe.policies]
    return [(_relative(run, path), content) for path, content in rows]


# --- what the numbers say ----------------------------------------------------------------------------------------------


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
    height = 380 + 14 * max(0, len(points) - 6)
    return [Markup(plot_reward_kl(points, width, height, f"reward-kl-{width}", label)) for width in (760, 350)]


def draw_panels(stage: str, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw the training curves of a stage, one small figure for each quantity that was logged."""
    panels = []
    for title, labels in PANELS.items():
        rows = {key: [i for i, row in enumerate(history) if key in row] for key in labels}
        series = [key for key in labels if rows[key]]
        if not series:
            continue
        words = [
            f"{labels[key] or key}: from {history[rows[key][0]][key]:.3g} to {history[rows[key][-1]][key]:.3g}." for key in series
        ]
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


# --- values on the page ------------------------------------------------------------------------------------------------


def show_value(documents: Mapping[str, Any], style: str, file: str, *keys: str | int) -> Markup:
    """Print the value at an address, marked with that address; a value that is null prints a dash."""
    value = _resolve(documents, file, keys)
    text = Markup("{}").format(printable(STYLES[style](value))) if value is not None else Markup("–")
    if isinstance(value, dict):
        mean, bracket, interval = text.partition(" [")
        text = Markup('<b>{}</b>').format(mean) + Markup(' <span class="ci">{}</span>').format(bracket[1:] + interval)
    address = pointer(file, keys)
    return Markup('<span data-source="{0}" title="{0}">{1}</span>').format(printable(address), text)


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
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in JOINERS:
        return character
    if character < " ":
        return chr(0x2400 + ord(character))  # its picture, such as ␛
    return f"⟨U+{ord(character):04X}⟩"


def format_estimate(estimate: Mapping[str, float], sign: str = "", percent: bool = False) -> str:
    """Print mean and interval with two digits of the interval's half-width; the mean alone where there is no spread."""
    scale = 100 if percent else 1
    mean, low, high = (scale * estimate[key] for key in ("mean", "low", "high"))
    unit = " %" if percent else ""
    if low == high:
        return f"{mean:{sign}.3g}{unit}".replace("-", "−")
    decimals = min(6, max(0, 1 - math.floor(math.log10((high - low) / 2))))
    text = f"{mean:{sign}.{decimals}f}{unit} [{low:{sign}.{decimals}f}, {high:{sign}.{decimals}f}]"
    return text.replace("-", "−")


def format_number(value: float) -> str:
    """Print two decimals, or two digits where those would be zeros."""
    small = 0 < abs(value) < 0.095
    return f"{value:.2g}".replace("-", "−") if small else f"{value:.2f}".replace("-", "−")


def format_seconds(value: float) -> str:
    """Print a duration in its two largest units."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def format_bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


STYLES = {
    "estimate": format_estimate,
    "gain": partial(format_estimate, sign="+"),
    "share": partial(format_estimate, percent=True),
    "number": format_number,
    "percent": lambda value: f"{100 * value:.1f} %",
    "count": lambda value: f"{value:,.0f}",
    "seconds": format_seconds,
    "bytes": format_bytes,
    "date": lambda value: value[:10],
    "text": str,
}
