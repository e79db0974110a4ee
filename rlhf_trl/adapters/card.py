"""The model card of an exported adapter: every number in it comes from the export's own JSON, and says from where.

The template prints a number only by its JSON address, which stands beside it in an HTML comment.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Undefined

from rlhf_trl.adapters.check import EVIDENCE, LINEAGE
from rlhf_trl.adapters.verify import loading_lines
from rlhf_trl.recipe.library import vllm_rank
from rlhf_trl.text.display import fence, inline, visible
from rlhf_trl.text.format import STYLES, pointer, resolve

# Characters that mean something in Markdown or HTML.
ACTIVE = re.compile(r"([\\`*_{}\[\]<>|#~$&])")
PIPELINES = {"policy": "text-generation", "reward": "text-classification"}

LOCAL = ("local:", "builtin:")  # sources of data that are not on the Hub
# What the Hub shows: address in the evidence -> name and kind of a result.
RESULTS = {
    ("policy", "gold_gain"): ("gold reward gain over its start", "gain", "gold_gain"),
    ("policy", "reward_gain"): ("reward gain over its start", "gain", "reward_gain"),
    ("policy", "kl"): ("KL to its start, nats per answer", "estimate", "kl"),
    ("judge", "rate", "win_rate"): ("win rate against its start", "share", "win_rate"),
    ("analysis", "overall", "accuracy"): ("accuracy on held-out pairs", "share", "accuracy"),
}


class Written(str):
    """Markdown that is ready to stand in the card."""


def render_card(lineage: Mapping[str, Any], evidence: Mapping[str, Any], has_figure: bool) -> str:
    """Render the card of an export."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined,
                              finalize=_printable, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.globals |= {
        "measured": partial(_show, evidence, EVIDENCE),
        "recorded": partial(_show, lineage, LINEAGE),
        "fence": lambda text: Written(fence(text)),
        "code": lambda text: Written(inline(str(text))),
    }
    source, base_id = str(lineage["data"]["source"]), lineage["base"]["id"]
    results = list(_results(lineage, evidence, "local" if source.startswith(LOCAL) else visible(source)))
    metadata = ModelCardData(
        model_name=visible(f"{lineage['run']}: {lineage['stage']}"),
        eval_results=results or None,
        library_name="peft",
        base_model_relation="adapter",
        pipeline_tag=PIPELINES[lineage["kind"]],
        base_model=base_id and visible(base_id),
        datasets=None if source.startswith(LOCAL) else [visible(source)],
        tags=["lora", "trl", "rlhf-trl", lineage["trainer"]],
    )
    alarms = list(enumerate(evidence.get("alarms") or ()))
    subsets = enumerate((evidence.get("analysis") or {}).get("subsets", ()))
    rows = [(subset["name"], ("analysis", "subsets", place)) for place, subset in subsets if subset["accuracy"]]
    return environment.get_template("card.md.j2").render(
        lineage=lineage,
        fits=Written("" if lineage["dora"] else str(vllm_rank(lineage["rank"]) or "")),
        evidence=evidence,
        has_figure=has_figure,
        metadata=Written(metadata.to_yaml()),
        subsets=[("all subsets", ("analysis", "overall")), *rows],
        lines=Written(loading_lines(lineage["kind"], lineage["base"]["shipped"])),
        unjudged=[place for place, alarm in alarms if alarm["value"] is None],
        raised=[place for place, alarm in alarms if alarm["raised"]],
    )


def _results(lineage: Mapping[str, Any], evidence: Mapping[str, Any], dataset: str) -> Iterator[EvalResult]:
    """The results that were measured, each with its interval in its name."""
    for keys, (name, style, kind) in RESULTS.items():
        value: Any = evidence
        for key in keys:
            value = (value or {}).get(key)
        if value and value["mean"] is not None:
            yield EvalResult(task_type=PIPELINES[lineage["kind"]], dataset_type=dataset, dataset_name=dataset,
                             metric_type=kind, metric_value=value["mean"],
                             metric_name=f"{name}: {STYLES[style](value)}")  # fmt: skip


def _show(document: Mapping[str, Any], file: str, style: str, *keys: str | int) -> Written:
    """Print the value at an address, with that address in a comment; null prints a dash."""
    value, address = resolve({file: document}, file, keys), f"<!-- {pointer(file, keys)} -->"
    if value is None or (isinstance(value, dict) and value["mean"] is None):
        return Written(f"–{address}")
    text = STYLES[style](value)
    return Written((_escape(text) if style == "text" else text) + address)


def _printable(value: Any) -> Any:
    """Let Markdown that is ready through, make a name harmless, and refuse a number that comes without its address."""
    if isinstance(value, (Written, Undefined)):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is printed without its source")
    return _escape(value)


def _escape(text: str) -> str:
    return ACTIVE.sub(r"\\\1", visible(text)).replace("\n", " ")
