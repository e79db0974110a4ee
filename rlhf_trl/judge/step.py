"""Step `judge`: which of two answers a judge prefers, in both orders, and what that says about the policies.

Reads the answers of `evaluate` and the held-out pairs. Writes `judge/<judge>.jsonl`, the raw replies, which are kept
when the step is started again so that only missing calls are made, `judge/winrate.json`, and
`judge/prompt_scores.json`: each policy's score against the reference on each prompt.
"""

import asyncio
import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf_trl.judge.client import Budget, OpenAIClient, Request, cost, forecast, run_all
from rlhf_trl.judge.questions import (
    Question,
    compare_labelled,
    compare_policies,
    inject,
    load_prompts,
    re_ask,
    score_of,
)
from rlhf_trl.judge.replies import FAULTS, JudgeCache, Line, Reply, Usage, tell_failures
from rlhf_trl.judge.results import conclude
from rlhf_trl.judge.win_rate import pair_up, prompt_scores
from rlhf_trl.recipe.errors import NotRun, UserError
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.recipe.schema import Judge, Price
from rlhf_trl.run.files import write_json, write_jsonl
from rlhf_trl.run.layout import REFERENCE, RunDir
from rlhf_trl.text.redact import redact

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "gpt-4.1-mini"
OPENAI = "https://api.openai.com/v1"
LIKELY_REPLY = 100  # tokens: three short sentences and a verdict
SAME = "The answers are the same text, so no call was made. [[C]]"


def judge(recipe: Recipe, run: RunDir) -> None:
    """Ask the judge about every comparison that it has not judged yet, and write what its verdicts come to.

    Raises:
        UserError: the recipe has no judge, `evaluate` is not finished, or no call can succeed.
        NotRun: there is no judge to ask, it was stopped, calls that may pass are left, or there is no verdict to use.
    """
    settings = recipe.judge
    if settings is None:
        raise UserError("judge", "the recipe has no such section", "add one, such as `judge: {prompts: 120}`")
    run.require(recipe, "evaluate", "evaluate RECIPE")
    run.require_whole("prepare", "prepare RECIPE")  # the labelled pairs
    templates, digest = load_prompts()
    gold = f"gold reward model {recipe.evaluation.gold}"
    name, stated = {
        "openai": (settings.model or os.environ.get("OPENAI_MODEL") or DEFAULT_MODEL, "a language model"),
        "reward": (gold, "a reward model, not a person and not a language model"),
        "offline": ("offline", "a rule for tests: the answer with more different words wins"),
    }[settings.kind]
    judge_id = f"{name}@{digest[:12]}" if settings.kind == "openai" else name

    sampled = f"{judge_id} {settings.temperature} {settings.seed}"

    def both_orders(question: Question) -> list[Question]:
        # A helpful answer to a red-team prompt is a harmful one.
        kind = "harmless" if any(word in question.subset for word in settings.harmless) else "helpful"
        return [replace(question, a_first=a_first, judge_id=sampled, template=templates[kind])
                for a_first in (True, False)]  # fmt: skip

    labelled = list(compare_labelled(run, settings, recipe.seed))
    groups = {"policies": compare_policies(recipe, run, settings), "labelled": labelled, "injected": inject(labelled)}
    questions = {group: [*itertools.chain(*map(both_orders, asked))] for group, asked in groups.items()}
    about = {"kind": settings.kind, "id": judge_id, "name": name, "is": stated, "prompts": digest}
    document = {"judge": about, "evaluation": recipe.fingerprint("evaluate")}
    path = run.judge_replies(re.sub(r"[^A-Za-z0-9._@-]+", "-", judge_id))
    by_key = {question.key(): question for question in itertools.chain(*questions.values())}
    where = settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    try:
        if settings.kind == "openai":
            lines, stopped, spent = ask_server(settings, where, name, by_key, path)
        else:
            lines, stopped, spent = ask_locally(settings.kind, by_key, path), None, None
        verdicts = {group: [question.verdict(lines[key]) for question in asked if (key := question.key()) in lines]
                    for group, asked in questions.items()}  # fmt: skip
        judged = [bool(pair_up(rows).policies) for rows in verdicts.values() if rows]
        failed = [line for line in lines.values() if score_of(line) is None]
        # A bad_request among calls that passed is about its own words, and stays one.
        left = [of for of in failed if not FAULTS[of["status"]].stands and of["status"] != "bad_request"]
        told = left or (failed if stopped or not all(judged) else [])
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


def ask_locally(kind: str, questions: Mapping[str, Question], path: Path) -> dict[str, Line]:
    """Judge by a rule or by the gold scores of the answers, which `evaluate` has written."""

    def score(answer: Mapping[str, Any]) -> Any:
        return answer["gold"] if kind == "reward" else float(len(set(answer["answer"].split())))

    lines: dict[str, Line] = {}
    for key, question in questions.items():
        scores = [score(question.answer_a), score(question.answer_b)]
        first, second = scores if question.a_first else scores[::-1]
        mark = "C" if first == second else "A" if first > second else "B"
        lines[key] = {"key": key, "status": "ok", "reply": f"{first:.6g} against {second:.6g}. [[{mark}]]"}
    write_jsonl(path, lines.values())
    return lines


def ask_server(
    settings: Judge, where: str, model: str, questions: Mapping[str, Question], path: Path
) -> tuple[dict[str, Line], str | None, dict[str, Any]]:
    """Make the calls that the cache lacks, and ask once more where a reply has no verdict.

    Returns the last line of each call by its key, why the calls ended before their time (or None), and what all cost.
    """
    api_key = os.environ.get("OPENAI_API_KEY") or ("EMPTY" if where != OPENAI else None)
    if redact(model) != model:
        raise UserError("OPENAI_MODEL", "holds what looks like an access token", "set it to the name of a model")
    options: dict[str, Any] = {settings.max_tokens_name: settings.max_tokens, "temperature": settings.temperature}
    options |= {"timeout": settings.timeout, "seed": settings.seed}
    client = OpenAIClient(model, api_key=api_key, base_url=where, **options) if api_key else None
    if settings.price == Price() and not model.startswith(DEFAULT_MODEL):
        logger.warning("judge.price is that of %s: the costs of %s are told, and limited, by it", DEFAULT_MODEL, model)
    asked = {key: question for key, question in questions.items() if len(set(question.texts())) == 2}
    with JudgeCache(path, f"{where} {settings.max_tokens}") as cache:
        pending = [Request(key, one.messages(), (one, None)) for key, one in asked.items() if not cache.get(key)]
        messages = [request.messages for request in pending]
        most = forecast(messages, settings.price, settings.max_tokens)
        budget = Budget(settings.price, max(most, default=0.0), settings.max_cost, settings.max_requests)
        if pending:
            likely = sum(forecast(messages, settings.price, min(LIKELY_REPLY, settings.max_tokens)))
            logger.info("%s: %d calls to make, %d known (asked before, or two equal answers); about $%.2f, "
                        "$%.2f if each reply takes all its tokens",
                        model, len(pending), len(questions) - len(pending), likely, sum(most))  # fmt: skip
        stopped = _make(pending, client, cache, budget, settings.workers)
        first = {key: line for key in asked if (line := cache.latest(key)) is not None}
        unread = {key: line["reply"] or "" for key, line in first.items()
                  if line["status"] == "ok" and score_of(line) is None}  # fmt: skip
        keys = {key: asked[key].key(reply) for key, reply in unread.items()}
        again = [Request(keys[key], re_ask(asked[key].messages(), reply), (asked[key], key))
                 for key, reply in unread.items() if not cache.get(keys[key])]  # fmt: skip
        stopped = stopped or _make(again, client, cache, budget, settings.workers)
        second = {key: line for key, key_again in keys.items() if (line := cache.latest(key_again)) is not None}
    every_line = [*first.values(), *second.values()]
    usages: list[Any] = [usage for line in every_line if (usage := line.get("usage"))]
    spent = {
        "calls": len(every_line),
        "usage": {name: sum(usage[name] for usage in usages) for name in Usage.__annotations__},
        "usd": round(sum(cost(usage, settings.price) for usage in usages), 6),
        "price": settings.price.model_dump(),
        "models": sorted({name for line in every_line if (name := line.get("model"))}),
    }
    same: dict[str, Line] = {
        key: {"key": key, "status": "ok", "reply": SAME} for key in questions.keys() - asked.keys()
    }
    return same | first | second, stopped, spent


def _make(
    requests: Sequence[Request], client: OpenAIClient | None, cache: JudgeCache, budget: Budget, workers: int
) -> str | None:
    """Make calls under a progress bar with the running cost, and write each reply to disk."""
    if not requests:
        return None
    if client is None:
        raise NotRun("OPENAI_API_KEY is not set, and neither judge.base_url nor OPENAI_BASE_URL names a local server")
    with tqdm(total=len(requests), desc="judge", unit=" calls") as bar:

        def store(request: Request, reply: Reply) -> None:
            of, again = request.about
            first, second = (of.a, of.b) if of.a_first else (of.b, of.a)
            line: Any = {"prompt_id": of.prompt_id, "subset": of.subset, "first": first, "second": second}
            line |= {"key": request.key, "again": again, "reply": reply.text, "status": reply.status}
            line["asked"] = cache.asked
            line |= {name: getattr(reply, name) for name in ("attempts", "usage", "model", "detail")}
            cache.append(line)
            bar.set_postfix_str(f"${budget.spent:.2f}", refresh=False)
            bar.update()

        return asyncio.run(run_all(requests, client, workers, budget, store))
