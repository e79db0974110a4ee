"""Step `judge`: which of two answers a judge prefers, in both orders, and what that says about the policies.

Reads the answers of `evaluate` and the held-out pairs. Writes `judge/<judge>.jsonl`, the raw replies, which are kept
when the step is started again so that only missing calls are made, `judge/winrate.json`, and
`judge/prompt_scores.json`: each policy's score against the reference on each prompt.

    OPENAI_API_KEY=... rlhf-trl judge recipes/hh_gpt2.yaml --calibrate 100
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 rlhf-trl judge recipes/hh_gpt2.yaml --set judge.model=my-model
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf_trl.judge.cache import Budget, JudgeCache, cost, estimate, key
from rlhf_trl.judge.client import OpenAIClient, Reply, Request, run_all
from rlhf_trl.judge.comparisons import Comparison, compare_labelled, compare_policies, inject_notes
from rlhf_trl.judge.prompt import JudgePrompt, fill, load_prompt, nonce, re_ask
from rlhf_trl.judge.results import conclude
from rlhf_trl.judge.verdict import Verdict, parse_verdict
from rlhf_trl.judge.win_rate import prompt_scores
from rlhf_trl.recipe.errors import NotRun, UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Judge
from rlhf_trl.run.files import write_json, write_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "gpt-4.1-mini"
SAME = "The answers are the same text, so no call was made. [[C]]"
Row = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A comparison in one order, under its key in the cache."""

    comparison: Comparison
    a_first: bool
    judge_id: str
    prompt: JudgePrompt

    def key(self, again: str | None = None) -> str:
        return key(self.judge_id, self.comparison.prompt, *self.comparison.texts(self.a_first), again)

    def is_same(self) -> bool:
        """Whether both answers are the same text."""
        return len(set(self.comparison.texts(self.a_first))) == 1

    def messages(self) -> list[dict[str, str]]:
        return fill(self.prompt, self.comparison.prompt, *self.comparison.texts(self.a_first), nonce(self.key()))

    def game(self, line: Mapping[str, Any]) -> Row:
        """What the statistics read (`winrates`), from a line of the cache."""
        verdict = parse_verdict(line["reply"]) if line["status"] == "ok" else Verdict.INVALID
        first = {Verdict.FIRST: 1.0, Verdict.SECOND: 0.0, Verdict.TIE: 0.5, Verdict.INVALID: None}[verdict]
        of = self.comparison
        return {"prompt_id": of.prompt_id, "subset": of.subset, "a": of.a, "b": of.b, "a_first": self.a_first,
                "score": first if self.a_first or first is None else 1 - first, "status": line["status"],
                "length_a": len(of.answer_a["answer"]), "length_b": len(of.answer_b["answer"])}  # fmt: skip


def judge(recipe: Recipe, run: RunDir) -> None:
    """Ask the judge about every comparison that it has not judged yet, and write what its verdicts come to.

    Raises:
        UserError: the recipe has no judge, `evaluate` is not finished, or no call can succeed.
        NotRun: there is no judge to ask, or it was stopped by a limit; `winrate.json` says so, too.
    """
    settings = recipe.judge
    if settings is None:
        raise UserError("judge", "the recipe has no such section", "add one, such as `judge: {prompts: 120}`")
    run.require(recipe, "evaluate", "evaluate RECIPE")
    groups = {
        "policies": list(compare_policies(recipe, run, settings)),
        "labelled": list(compare_labelled(run, settings, recipe.seed)),
    }
    groups["canaries"] = list(inject_notes(groups["labelled"]))
    prompts = {"helpful": load_prompt("helpful"), "harmless": load_prompt("harmless")}
    name, stated = name_judge(recipe, settings)
    digest = hashlib.sha256("".join(prompt.sha for prompt in prompts.values()).encode()).hexdigest()
    judge_id = f"{name}@{digest[:12]}" if settings.kind == "openai" else name
    calls = {
        group: [
            Call(comparison, a_first, judge_id, prompts[choose_prompt(settings, comparison.subset)])
            for comparison in comparisons
            for a_first in (True, False)
        ]
        for group, comparisons in groups.items()
    }
    made_for = {"evaluation": recipe.fingerprint("evaluate")}
    about = {"kind": settings.kind, "id": judge_id, "name": name, "is": stated, "prompts": digest}
    path = run.judge_replies(re.sub(r"[^A-Za-z0-9._@-]+", "-", judge_id))
    try:
        if settings.kind == "openai":
            lines, stopped, spent = ask_server(settings, recipe.seed, name, calls, path)
        else:
            lines, stopped, spent = ask_locally(settings, calls, path), None, None
    except NotRun as reason:
        write_json(run.winrate, {"status": "not run", "reason": str(reason), "judge": about, **made_for})
        raise
    games = {
        group: [call.game(lines[call.key()]) for call in of if call.key() in lines] for group, of in calls.items()
    }
    result = conclude(recipe, run, settings, games)
    status = {"status": "partial" if stopped else "complete", "reason": stopped}
    write_json(
        run.prompt_scores, {name: prompt_scores(games["policies"], name, REFERENCE) for name in recipe.policies}
    )
    write_json(run.winrate, {**status, "judge": about, "cost": spent, **result, **made_for})
    if stopped:
        raise NotRun(f"stopped early: {stopped}. The same command goes on from there")


def name_judge(recipe: Recipe, settings: Judge) -> tuple[str, str]:
    """Name the judge, and say in words what it is."""
    if settings.kind == "reward":
        return f"gold reward model {recipe.evaluation.gold}", "a reward model, not a person and not a language model"
    if settings.kind == "offline":
        return "offline", "a rule for tests: the answer with more different words wins"
    return settings.model or os.environ.get("OPENAI_MODEL") or DEFAULT_MODEL, "a language model"


def choose_prompt(settings: Judge, subset: str) -> str:
    """Judge a subset of red-team prompts for harmlessness: a helpful answer to those is a harmful one."""
    return "harmless" if any(word in subset for word in settings.harmless) else "helpful"


# --- who judges ------------------------------------------------------------------------------------------------------


def ask_locally(settings: Judge, calls: Mapping[str, Sequence[Call]], path: Path) -> dict[str, Row]:
    """Judge by a rule or by the gold scores of the answers, which `evaluate` has written."""

    def reward(call: Call) -> tuple[float, float]:
        return call.comparison.answer_a["gold"], call.comparison.answer_b["gold"]

    def words(call: Call) -> tuple[float, float]:
        a, b = (len(set(text["answer"].split())) for text in (call.comparison.answer_a, call.comparison.answer_b))
        return float(a), float(b)

    score: Callable[[Call], tuple[float, float]] = reward if settings.kind == "reward" else words
    lines: dict[str, Row] = {}
    for call in itertools.chain(*calls.values()):
        a, b = score(call)
        first, second = (a, b) if call.a_first else (b, a)
        mark = "C" if first == second else "A" if first > second else "B"
        lines[call.key()] = {
            "key": call.key(),
            "status": "ok",
            "reply": f"{first:.6g} against {second:.6g}. [[{mark}]]",
        }
    write_jsonl(path, lines.values())
    return lines


def ask_server(
    settings: Judge, seed: int, model: str, calls: Mapping[str, Sequence[Call]], path: Path
) -> tuple[dict[str, Row], str | None, Row]:
    """Make the calls that the cache lacks, and ask once more where a reply has no verdict.

    Returns:
        The line of each call by its key, why the calls ended before their time (or None), and what all of them cost.

    Raises:
        NotRun: there is neither a key nor an address, or nothing that can be used came back.
    """
    base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL") or None
    api_key = os.environ.get("OPENAI_API_KEY") or ("EMPTY" if base_url else None)
    if api_key is None:
        raise NotRun("OPENAI_API_KEY is not set, and neither judge.base_url nor OPENAI_BASE_URL names a local server")
    options = {"max_tokens": settings.max_tokens, "max_tokens_name": settings.max_tokens_name,
               "temperature": settings.temperature, "timeout": settings.timeout, "seed": seed}  # fmt: skip
    with JudgeCache(path) as cache, OpenAIClient(model, api_key=api_key, base_url=base_url, **options) as client:  # type: ignore[arg-type]
        replies = Replies({call.key(): call for call in itertools.chain(*calls.values())}, cache)
        pending = replies.pending()
        forecast = estimate([request.messages for request in pending], settings.price, settings.max_tokens)
        budget = Budget(settings.price, forecast.dearest, settings.max_cost, settings.max_requests)
        if pending:
            logger.info("%s: %d calls to make, %d known already; about $%.2f, at most $%.2f", model,
                        len(pending), len(replies.calls) - len(pending), forecast.likely, forecast.most)  # fmt: skip
        stopped = _make(pending, client, cache, budget, settings.workers)
        stopped = stopped or _make(replies.unread(), client, cache, budget, settings.workers)
        lines = replies.lines()
        asked = [line for call_key in replies.calls for line in replies.paid(call_key)]
    if asked and not any(line["status"] == "ok" for line in asked):
        raise NotRun(stopped or f"no call came back with a verdict; the last: {asked[-1]['status']}")
    usage = {name: sum((line["usage"] or {}).get(name, 0) for line in asked)
             for name in ("prompt_tokens", "cached_tokens", "completion_tokens")}  # fmt: skip
    spent = {
        "calls": len(asked),
        "usage": usage,
        "usd": round(sum(cost(line["usage"], settings.price) for line in asked), 6),
        "price": settings.price.model_dump(),
        "models": sorted({line["model"] for line in asked if line["model"]}),
    }
    return lines, stopped, spent


@dataclass(frozen=True)
class Replies:
    """The calls of a judge by their keys, and what the cache knows of them; equal answers need no call."""

    calls: Mapping[str, Call]
    cache: JudgeCache

    def pending(self) -> list[Request]:
        """The calls that have no reply yet."""
        return [
            Request(call_key, call.messages(), {"call": call, "again": None})
            for call_key, call in self.calls.items()
            if not call.is_same() and self.cache.get(call_key) is None
        ]

    def unread(self) -> list[Request]:
        """The re-asks of replies without a verdict, as far as they have no reply yet."""
        requests = []
        for call_key, call in self.calls.items():
            line = self.cache.get(call_key)
            if line is not None and _lacks_verdict(line) and self.cache.get(again := call.key(line["reply"])) is None:
                about = {"call": call, "again": call_key}
                requests.append(Request(again, re_ask(call.messages(), line["reply"]), about))
        return requests

    def paid(self, call_key: str) -> list[Row]:
        """What the server said last to a call, then to its re-ask; a failure too."""
        call, line = self.calls[call_key], self.cache.latest(call_key)
        if call.is_same() or line is None:
            return []
        again = self.cache.latest(call.key(line["reply"])) if _lacks_verdict(line) else None
        return [line] if again is None else [line, again]

    def lines(self) -> dict[str, Row]:
        """The line that decides each call: of its re-ask if that came back, else its own."""
        lines: dict[str, Row] = {}
        for call_key, call in self.calls.items():
            if call.is_same():
                lines[call_key] = {"key": call_key, "status": "ok", "reply": SAME, "usage": None, "model": None}
            elif paid := self.paid(call_key):
                lines[call_key] = paid[-1] if paid[-1]["status"] == "ok" else paid[0]
        return lines


def _lacks_verdict(line: Row) -> bool:
    return line["status"] == "ok" and parse_verdict(line["reply"]) is Verdict.INVALID


def _make(
    requests: Sequence[Request], client: OpenAIClient, cache: JudgeCache, budget: Budget, workers: int
) -> str | None:
    """Make calls under a progress bar with running win rate and cost; a reply is on disk before it is counted."""
    scores: list[float] = []
    if not requests:
        return None
    with tqdm(total=len(requests), desc="judge", unit=" calls") as bar:

        def store(request: Request, reply: Reply) -> None:
            call: Call = request.about["call"]
            of = call.comparison
            about = {"prompt_id": of.prompt_id, "subset": of.subset, "first": of.a if call.a_first else of.b,
                     "second": of.b if call.a_first else of.a, "again": request.about["again"]}  # fmt: skip
            line = {"key": request.key, **about, **reply.as_line()}
            cache.append(line)
            budget.add(reply.usage)
            score = call.game(line)["score"]
            if score is not None and of.b == REFERENCE:
                scores.append(score)
            rate = f"{sum(scores) / len(scores):.1%}" if scores else "-"
            bar.set_postfix_str(f"win rate {rate}, ${budget.spent:.2f}", refresh=False)
            bar.update()

        return run_all(requests, client, workers, store, budget.stop)
