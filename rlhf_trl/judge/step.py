"""Step `judge`: which of two answers a judge prefers, in both orders, and what that says about the policies.

Reads the answers of `evaluate` and the held-out pairs. Writes `judge/<judge>.jsonl`, the raw replies, which are kept
when the step is started again so that only missing calls are made, `judge/winrate.json`, and
`judge/prompt_scores.json`: each policy's score against the reference on each prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from rlhf_trl.judge.advice import tell_failures
from rlhf_trl.judge.cache import JudgeCache, Line, key
from rlhf_trl.judge.client import OpenAIClient, Request, run_all
from rlhf_trl.judge.comparisons import Comparison, compare_labelled, compare_policies, inject
from rlhf_trl.judge.cost import LIKELY_REPLY, Budget, cost, forecast
from rlhf_trl.judge.prompt import JudgePrompt, fill, load_prompt, nonce, re_ask
from rlhf_trl.judge.replies import MAY_PASS, Reply, Usage
from rlhf_trl.judge.results import conclude
from rlhf_trl.judge.verdict import parse_verdict
from rlhf_trl.judge.win_rate import Verdict, pair_up, prompt_scores
from rlhf_trl.recipe.errors import NotRun, UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Judge
from rlhf_trl.run.files import write_json, write_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.text.redact import redact

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "gpt-4.1-mini"
OPENAI = "https://api.openai.com/v1"
SAME = "The answers are the same text, so no call was made. [[C]]"


@dataclass(frozen=True)
class Call:
    """A comparison in one order: what a judge is asked."""

    comparison: Comparison
    a_first: bool
    judge_id: str
    prompt: JudgePrompt

    def key(self, again: str | None = None) -> str:
        return key(self.judge_id, self.comparison.prompt, *self.comparison.texts(self.a_first), again)

    def messages(self) -> list[dict[str, str]]:
        return fill(self.prompt, self.comparison.prompt, *self.comparison.texts(self.a_first), nonce(self.key()))

    def verdict(self, line: Line) -> Verdict:
        of, first = self.comparison, _score(line)
        return {"prompt_id": of.prompt_id, "subset": of.subset, "a": of.a, "b": of.b, "a_first": self.a_first,
                "score": first if self.a_first or first is None else 1 - first, "status": line["status"],
                "length_a": len(of.answer_a["answer"]), "length_b": len(of.answer_b["answer"])}  # fmt: skip


def _score(line: Line) -> float | None:
    """The score of the answer shown first; None without a verdict."""
    return parse_verdict(line["reply"] or "") if line["status"] == "ok" else None


def judge(recipe: Recipe, run: RunDir) -> None:
    """Ask the judge about every comparison that it has not judged yet, and write what its verdicts come to.

    Raises:
        UserError: the recipe has no judge, `evaluate` is not finished, or no call can succeed.
        NotRun: there is no judge to ask, it was stopped, calls that may pass are left, or there is no verdict to use;
            `winrate.json` says so, too.
    """
    settings = recipe.judge
    if settings is None:
        raise UserError("judge", "the recipe has no such section", "add one, such as `judge: {prompts: 120}`")
    run.require(recipe, "evaluate", "evaluate RECIPE")
    prompts = {"helpful": load_prompt("helpful"), "harmless": load_prompt("harmless")}
    digest = hashlib.sha256("".join(prompt.sha for prompt in prompts.values()).encode()).hexdigest()
    gold = f"gold reward model {recipe.evaluation.gold}"
    name, stated = {
        "openai": (settings.model or os.environ.get("OPENAI_MODEL") or DEFAULT_MODEL, "a language model"),
        "reward": (gold, "a reward model, not a person and not a language model"),
        "offline": ("offline", "a rule for tests: the answer with more different words wins"),
    }[settings.kind]
    judge_id = f"{name}@{digest[:12]}" if settings.kind == "openai" else name
    labelled = list(compare_labelled(run, settings, recipe.seed))
    groups = {"policies": compare_policies(recipe, run, settings), "labelled": labelled, "injected": inject(labelled)}
    calls = {
        group: [
            Call(comparison, a_first, judge_id, prompts[choose_prompt(settings, comparison.subset)])
            for comparison in comparisons
            for a_first in (True, False)
        ]
        for group, comparisons in groups.items()
    }
    about = {"kind": settings.kind, "id": judge_id, "name": name, "is": stated, "prompts": digest}
    document = {"judge": about, "evaluation": recipe.fingerprint("evaluate")}
    path = run.judge_replies(re.sub(r"[^A-Za-z0-9._@-]+", "-", judge_id))
    by_key = {call.key(): call for call in itertools.chain(*calls.values())}
    where = settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    try:
        if settings.kind == "openai":
            lines, stopped, spent = ask_server(settings, where, name, by_key, path)
        else:
            lines, stopped, spent = ask_locally(settings.kind, by_key, path), None, None
        verdicts = {
            group: [call.verdict(lines[of]) for call in rows if (of := call.key()) in lines]
            for group, rows in calls.items()
        }
        judged = [bool(pair_up(rows).policies) for rows in verdicts.values() if rows]
        failed = [line for line in lines.values() if _score(line) is None]
        # A bad_request among calls that passed is about its own words, and stays one.
        left = [line for line in failed if line["status"] in MAY_PASS - {"bad_request"}]
        told = left or ([] if all(judged) else failed)
        reason = "; ".join(filter(None, [stopped, tell_failures(where, told)]))
        if by_key and not any(judged):
            raise NotRun(reason)
    except NotRun as why:
        write_json(run.winrate, {"status": "not run", "reason": str(why), **document})
        raise
    result = conclude(recipe, run, settings, verdicts)
    scores = {name: prompt_scores(verdicts["policies"], name, REFERENCE) for name in recipe.policies}
    write_json(run.prompt_scores, scores)
    status = {"status": "partial" if reason else "complete", "reason": reason or None}
    write_json(run.winrate, {**status, **document, "cost": spent, **result})
    if reason:
        raise NotRun(f"not finished: {reason}. The same command goes on from there")


def choose_prompt(settings: Judge, subset: str) -> Literal["helpful", "harmless"]:
    """Judge a subset of red-team prompts for harmlessness: a helpful answer to those is a harmful one."""
    return "harmless" if any(word in subset for word in settings.harmless) else "helpful"


def ask_locally(kind: str, calls: Mapping[str, Call], path: Path) -> dict[str, Line]:
    """Judge by a rule or by the gold scores of the answers, which `evaluate` has written."""

    def score(answer: Mapping[str, Any]) -> Any:
        return answer["gold"] if kind == "reward" else float(len(set(answer["answer"].split())))

    lines: dict[str, Line] = {}
    for call_key, call in calls.items():
        scores = [score(call.comparison.answer_a), score(call.comparison.answer_b)]
        first, second = scores if call.a_first else scores[::-1]
        mark = "C" if first == second else "A" if first > second else "B"
        lines[call_key] = {"key": call_key, "status": "ok", "reply": f"{first:.6g} against {second:.6g}. [[{mark}]]"}
    write_jsonl(path, lines.values())
    return lines


def ask_server(
    settings: Judge, where: str, model: str, calls: Mapping[str, Call], path: Path
) -> tuple[dict[str, Line], str | None, dict[str, Any]]:
    """Make the calls that the cache lacks, and ask once more where a reply has no verdict.

    Returns:
        The last line of each call by its key, why the calls ended before their time (or None), and what all cost.

    Raises:
        NotRun: there is neither a key nor an address.
        UserError: the key, the address, the name of the model or an option cannot be used.
    """
    api_key = os.environ.get("OPENAI_API_KEY") or ("EMPTY" if where != OPENAI else None)
    if api_key is None:
        raise NotRun("OPENAI_API_KEY is not set, and neither judge.base_url nor OPENAI_BASE_URL names a local server")
    if redact(model) != model:
        raise UserError("OPENAI_MODEL", "holds what looks like an access token", "set it to the name of a model")
    options: dict[str, Any] = {settings.max_tokens_name: settings.max_tokens, "temperature": settings.temperature}
    options |= {"timeout": settings.timeout, "seed": settings.seed}
    client = OpenAIClient(model, api_key=api_key, base_url=where, **options)
    asked = {of: call for of, call in calls.items() if len(set(call.comparison.texts(call.a_first))) == 2}
    with JudgeCache(path) as cache:
        pending = [Request(of, call.messages(), (call, None)) for of, call in asked.items() if not cache.get(of)]
        messages = [request.messages for request in pending]
        most = forecast(messages, settings.price, settings.max_tokens)
        budget = Budget(settings.price, max(most, default=0.0), settings.max_cost, settings.max_requests)
        if pending:
            likely = sum(forecast(messages, settings.price, min(LIKELY_REPLY, settings.max_tokens)))
            logger.info("%s: %d calls to make, %d known already; about $%.2f, at most $%.2f", model,
                        len(pending), len(calls) - len(pending), likely, sum(most))  # fmt: skip
        stopped = _make(pending, client, cache, budget, settings.workers)
        first = {of: line for of in asked if (line := cache.latest(of)) is not None}
        unread = {
            of: line["reply"] or "" for of, line in first.items() if line["status"] == "ok" and _score(line) is None
        }
        keys = {of: asked[of].key(reply) for of, reply in unread.items()}
        again = [
            Request(keys[of], re_ask(asked[of].messages(), reply), (asked[of], of))
            for of, reply in unread.items()
            if not cache.get(keys[of])
        ]
        stopped = stopped or _make(again, client, cache, budget, settings.workers)
        second = {of: line for of, key_again in keys.items() if (line := cache.latest(key_again)) is not None}
    every_line = [*first.values(), *second.values()]
    usages: list[Any] = [line.get("usage") for line in every_line]
    spent = {
        "calls": len(every_line),
        "usage": {name: sum(usage[name] for usage in usages if usage) for name in Usage.__annotations__},
        "usd": round(sum(cost(usage, settings.price) for usage in usages), 6),
        "price": settings.price.model_dump(),
        "models": sorted({name for line in every_line if (name := line.get("model"))}),
    }
    same: dict[str, Line] = {of: {"key": of, "status": "ok", "reply": SAME} for of in calls.keys() - asked.keys()}
    return same | first | second, stopped, spent


def _make(
    requests: Sequence[Request], client: OpenAIClient, cache: JudgeCache, budget: Budget, workers: int
) -> str | None:
    """Make calls under a progress bar with running win rate and cost; a reply is on disk before it is counted."""
    scores: list[float] = []
    if not requests:
        return None
    with tqdm(total=len(requests), desc="judge", unit=" calls") as bar:

        def store(request: Request, reply: Reply) -> None:
            call, again = request.about
            of = call.comparison
            first, second = (of.a, of.b) if call.a_first else (of.b, of.a)
            line: Any = {"prompt_id": of.prompt_id, "subset": of.subset, "first": first, "second": second}
            line |= {"key": request.key, "again": again, "reply": reply.text, "status": reply.status}
            line |= {name: getattr(reply, name) for name in ("attempts", "usage", "model", "detail")}
            cache.append(line)
            budget.add(reply.usage)
            score = call.verdict(line)["score"]
            if score is not None and of.b == REFERENCE:
                scores.append(score)
            rate = f"{sum(scores) / len(scores):.1%}" if scores else "-"
            bar.set_postfix_str(f"win rate {rate}, ${budget.spent:.2f}", refresh=False)
            bar.update()

        return asyncio.run(run_all(requests, client, workers, store, budget.stop))
