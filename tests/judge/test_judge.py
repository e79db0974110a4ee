"""The step `judge`: real HTTP to a server in the test, whole runs, kills, limits, and what each judge is called."""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command, small_recipe
from fake_openai import FakeOpenAI, completion, json_of, ok, raw, status

from rlhf_trl.cli.tables import printable
from rlhf_trl.judge.client import OpenAIClient
from rlhf_trl.judge.step import ask_server, judge
from rlhf_trl.recipe.errors import NotRun, UserError
from rlhf_trl.run.files import read_json, read_jsonl, write_json, write_jsonl
from rlhf_trl.run.layout import RunDir

RECIPE = """
name: judged
seed: 3
model: {model_name_or_path: builtin:tiny, use_peft: true, lora_dropout: 0.0}
data: {source: builtin:demo, max_length: 192}
stages:
  rm: {trainer: reward, args: {max_length: 192}}
  gold: {trainer: reward, half: second, args: {max_length: 192}}
  dpo: {trainer: dpo, args: {max_length: 192}}
  grpo: {trainer: grpo, reward: rm, args: {num_generations: 4, max_completion_length: 64}}
evaluation: {reward: rm, gold: gold}
judge: {prompts: 30, workers: 4, max_tokens: 50}
"""
SUBSETS = ("harmless-base", "helpful-base")
NAMES = ("reference", "dpo", "grpo")


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def made(tmp_path):
    """A run whose evaluation is finished: 30 prompts, three models; the longer the better is the gold score."""

    def make(*overrides: str, count: int = 30):
        recipe = small_recipe(tmp_path, overrides, RECIPE)
        run = RunDir(tmp_path / "runs" / recipe.name)
        for name, extra in zip(NAMES, (0, 4, 1), strict=True):
            rows = []
            for index in range(count):
                answer = f"Answer {index} of {name}" + " and more" * (extra + index % 3)
                rows.append({"id": f"p{index:02}", "subset": SUBSETS[index % 2], "answer": answer, "kl": 1.0 * extra,
                             "prompt": [{"role": "user", "content": f"Question {index}?"}],
                             "gold": float(len(answer))})  # fmt: skip
            write_jsonl(run.completions(name), rows)
        pairs = [
            {"id": f"t{index}", "row": index, "subset": SUBSETS[index % 2], "half": "first",
             "prompt": [{"role": "user", "content": f"Held out {index}?"}],
             "chosen": f"Good answer {index}" + " really" * (index % 4),
             "rejected": f"Bad answer {index}" + " no" * (index % 3)}
            for index in range(40)
        ]  # fmt: skip
        write_jsonl(run.pairs("test"), pairs)
        write_json(run.metrics, {"gold_model": {"stage": "gold", "accuracy": {"mean": 0.7}}})
        run.mark_done(recipe, "evaluate", 0.0)
        return recipe, run

    return make


def answers_of(messages) -> tuple[str, str]:
    """The two answers in the text that the judge is shown."""
    text = messages[0]["content"]
    nonces = re.findall(r"\b[0-9a-f]{16}\b", text)
    (code,) = set(nonces)
    parts = re.split(rf"^.*{code}.*$", text, flags=re.MULTILINE)
    found = [part.strip() for part in parts if re.search(r"(Answer \d+ of|Good answer|Bad answer)", part)]
    assert len(found) == 2, text
    return found[0], found[1]


def prefer(better) -> "callable":
    """A judge that prefers the answer with the higher value."""

    def reply(messages) -> str:
        first, second = (better(text) for text in answers_of(messages))
        return f"So.\n[[{'C' if first == second else 'A' if first > second else 'B'}]]"

    return reply


LONGER, GOOD = ok(prefer(len)), ok(prefer(lambda text: text.startswith("Good")))


def run_judge(recipe, run, server) -> dict:
    os.environ["OPENAI_BASE_URL"] = server.url
    try:
        judge(recipe, run)
    finally:
        del os.environ["OPENAI_BASE_URL"]
    return read_json(run.winrate)


def judge_by(recipe, run, behaviour) -> tuple[dict, list]:
    """Judge with a server of its own; return the result, and what it was asked."""
    with FakeOpenAI(then=behaviour) as server:
        return run_judge(recipe, run, server), server.requests


def words_of(run: RunDir, *more: str) -> list[str]:
    return ["judge", str(run.root.parent.parent / "small.yaml"), "--runs", str(run.root.parent), *more]


def judge_command(run: RunDir, *more: str) -> subprocess.CompletedProcess:
    return command(*words_of(run, *more), cwd=ROOT)


def rate_of(result, name: str) -> dict:
    return next(entry for entry in result["win_rates"] if entry["a"] == name)


def test_every_pair_is_shown_in_both_orders_and_the_same_text_is_a_tie_without_a_call(made):
    recipe, run = made()
    same = read_jsonl(run.completions("reference"))
    write_jsonl(run.completions("grpo"), [row | {"answer": one["answer"]} if at % 2 else row for at, (row, one)
                in enumerate(zip(read_jsonl(run.completions("grpo")), same, strict=True))])  # fmt: skip
    run.mark_done(recipe, "evaluate", 0.0)
    result, requests = judge_by(recipe, run, LONGER)
    assert len(requests) == 2 * (30 + 15)
    assert (result["status"], rate_of(result, "grpo")["ties"]) == ("complete", 15)
    assert rate_of(result, "dpo")["win_rate"]["mean"] == 1.0
    assert rate_of(result, "dpo")["n"] == 30
    habits = {name: found["mean"] for name, found in result["habits"].items()}
    assert (habits["consistency"], habits["first_share"], habits["prefers_longer"]) == (1.0, 0.5, 1.0)
    assert [result["habits"][name]["n"] for name in ("consistency", "invalid_rate")] == [45, 90], "its own verdicts"
    assert rate_of(result, "dpo")["length_controlled"]["warnings"]
    assert result["ratings"]["reference"]["mean"] == 0.0
    assert set(rate_of(result, "dpo")["subsets"]) == set(SUBSETS)
    assert result["cost"]["usage"] == {"prompt_tokens": 9000, "cached_tokens": 3600, "completion_tokens": 900}
    assert result["cost"]["usd"] == pytest.approx((5400 * 0.4 + 3600 * 0.1 + 900 * 1.6) / 1e6)
    assert result["cost"]["models"] == ["judge-2025-04-14"]
    assert re.fullmatch(r"gpt-4\.1-mini@[0-9a-f]{12}", result["judge"]["id"])
    points = {point["policy"]: point for point in result["pareto"]["points"]}
    assert points["dpo"]["gain"] == rate_of(result, "dpo")["win_rate"] and points["reference"]["gain"]["mean"] == 0.5
    assert points["dpo"]["kl"]["mean"] == 4.0


def test_a_reply_without_verdict_is_asked_about_once_more_and_then_missing(made):
    recipe, run = made("judge.prompts=5", "judge.workers=1")

    def reply(messages) -> str:
        if len(messages) == 1:
            return "I cannot decide."
        return "[[A]]" if "Question 1?" in messages[0]["content"] else "Still not."

    with FakeOpenAI(then=ok(reply)) as server:
        result = run_judge(recipe, run, server)
        assert len(server.requests) == 2 * (2 * 2 * 5)
        run_judge(recipe, run, server)
        assert len(server.requests) == 40
    judge(recipe, run)  # what is known needs no key
    entry = rate_of(result, "dpo")
    assert entry["n"] == 1
    assert entry["missing"] == {"comparisons": 4, "verdicts": {"invalid": 8}}
    assert result["cost"]["calls"] == 40


def test_failures_are_missing_with_their_cause_and_made_again_next_time(made):
    recipe, run = made("judge.prompts=5", "judge.workers=1")
    quick = [status(400, {"code": "context_length_exceeded"}, "context length"), status(400, {"code": "x"}, "bad"),
             status(429, message="later", headers={"Retry-After": "3600"})]  # fmt: skip
    with FakeOpenAI(quick, then=LONGER) as server:
        with pytest.raises(NotRun, match=r": 1 \(rate_limit: 1\); .*: HTTP 429: later; what to do: lower"):
            run_judge(recipe, run, server)
        result = read_json(run.winrate)
        assert (result["status"], len(server.requests)) == ("partial", 20)
        causes = {"bad_request": 1, "context_length": 1, "rate_limit": 1}
        assert rate_of(result, "dpo")["missing"]["verdicts"] == causes
        again = run_judge(recipe, run, server)
        assert len(server.requests) == 22  # what may pass is asked again, what is final is not
        assert rate_of(again, "dpo")["missing"]["verdicts"] == {"context_length": 1}
        lower, _ = made("judge.prompts=5", "judge.max_tokens=20")  # the remedy of the message
        assert rate_of(run_judge(lower, run, server), "dpo")["missing"]["verdicts"] == {}
        assert len(server.requests) == 23
    assert again["status"] == "complete"


@pytest.mark.parametrize("seed", range(2))
def test_a_server_that_refuses_half_of_all_calls_loses_no_verdict(made, monkeypatch, seed):
    async def at_once(*_):
        pass

    monkeypatch.setattr(OpenAIClient, "_pause", at_once)
    recipe, run = made("judge.workers=16")
    dice, starts = random.Random(seed), 0
    behaviours = [LONGER, status(429)]
    with FakeOpenAI(then=lambda *call: dice.choice(behaviours)(*call)) as server:
        while not starts or read_json(run.winrate)["status"] != "complete":
            starts += 1
            with contextlib.suppress(NotRun):
                assert run_judge(recipe, run, server)["status"] == "complete"
        assert starts < 5 and rate_of(read_json(run.winrate), "dpo")["n"] == 30
    (replies,) = run.winrate.parent.glob("*@*.jsonl")
    told = [line for line in read_jsonl(replies) if line["status"] == "ok"]
    assert len(told) == len({line["key"] for line in told}) == 2 * 2 * 30  # each was paid for once


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (ok("Hard to say."), "no verdict in the reply: 16"),
        (ok(lambda messages: "[[A]]" if answers_of(messages)[0] < answers_of(messages)[1] else "No."), "no verdict"),
        (status(400, {"code": "context_length_exceeded"}, "too long"), "longer context"),
        (status(400, message="Unrecognized request argument supplied: seed"), "judge.seed: null"),
    ],
)
def test_a_judge_without_a_verdict_to_use_is_not_run_and_says_what_to_do(made, behaviour, says):
    """Such as a judge whose verdict can be read in one of the orders alone."""
    recipe, run = made("judge.prompts=4", "judge.workers=1")
    with pytest.raises(NotRun, match=says):
        judge_by(recipe, run, behaviour)
    assert read_json(run.winrate)["status"] == "not run"
    (replies,) = (run.root / "judge").glob("*.jsonl")
    assert replies.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("limit", ["judge.max_requests=11", "judge.max_cost=0.001"])
def test_a_limit_stops_cleanly_and_the_result_says_so(made, limit):
    recipe, run = made(limit)
    with FakeOpenAI(then=LONGER) as server:
        with pytest.raises(NotRun, match=r"max_\w+ reached"):
            run_judge(recipe, run, server)
        made_calls = len(server.requests)
        result = read_json(run.winrate)
        assert result["status"] == "partial" and "reached" in result["reason"]
        assert 0 < result["cost"]["calls"] == made_calls < 120
        assert result["cost"]["usd"] <= 0.001
        more, _ = made()
        whole = run_judge(more, run, server)
        assert len(server.requests) == 120
    assert whole["status"] == "complete"


def test_a_limit_before_any_comparison_with_the_reference_keeps_what_was_paid_for(made):
    """With `pairs: all`, the policies are compared with each other first."""
    recipe, run = made("judge.pairs=all", "judge.max_requests=20", "judge.workers=1")
    with pytest.raises(NotRun, match="max_requests reached"):
        judge_by(recipe, run, LONGER)
    result = read_json(run.winrate)
    assert (result["status"], result["cost"]["calls"], result["pareto"]) == ("partial", 20, None)
    assert [(entry["a"], entry["b"], entry["n"]) for entry in result["win_rates"]] == [("dpo", "grpo", 10)]
    ratings = result["ratings"]
    assert {name for name, rating in ratings.items() if rating["mean"] is None} == {"dpo", "grpo"}
    assert read_json(run.prompt_scores) == {"dpo": {}, "grpo": {}}


@pytest.mark.parametrize("pairs", ["reference", "all"])
def test_a_judge_without_policies_is_calibrated_alone(made, tmp_path, pairs):
    made()
    stages = RECIPE[RECIPE.index("  dpo:") : RECIPE.index("evaluation:")]
    recipe = small_recipe(tmp_path, ["judge.calibrate=5", f"judge.pairs={pairs}"], RECIPE.replace(stages, ""))
    run = RunDir(tmp_path / "runs" / recipe.name)
    for name in NAMES:
        run.completions(name).unlink()
    rows = read_jsonl(run.pairs("test"))
    write_jsonl(run.pairs("test"), [*rows, *({**row, "chosen": "Good answer again", "row": 99} for row in rows)])
    run.mark_done(recipe, "evaluate", 0.0)
    result, requests = judge_by(recipe, run, GOOD)
    shown = [re.search(r"Held out (\d+)", str(request["messages"]))[1] for request in requests]
    assert max(map(shown.count, shown)) <= 4, "one pair of a prompt, in both orders, and with a note"
    assert (result["status"], result["win_rates"], result["ratings"], result["pareto"]) == ("complete", [], None, None)
    assert result["calibration"]["all"]["accuracy"]["mean"] == 1.0


def test_calibration_tells_a_good_judge_from_a_random_and_a_lengthy_one(made, caplog):
    found = []
    for name, behaviour in (("good", GOOD), ("long", LONGER), ("place", ok("[[A]]"))):
        recipe, run = made("judge.prompts=2", "judge.calibrate=20", f"judge.model={name}")
        found.append(judge_by(recipe, run, behaviour)[0]["calibration"])
    assert "judge.price is that of gpt-4.1-mini: the costs of good" in caplog.text
    good, long, place = found
    assert good["verdict"] == "informed" and good["all"]["accuracy"]["mean"] == 1.0
    assert place["verdict"] == "chance" and place["all"]["accuracy"]["mean"] == 0.5
    assert long["verdict"] in ("length", "chance")
    assert long["all"]["length_rule"]["takes"] == "longer"
    assert long["all"]["length_rule"]["over_rule"]["mean"] == 0
    assert {name: of["n"] for name, of in good["subsets"].items()} == dict.fromkeys(SUBSETS, 20)


def test_prompt_injections_show_a_judge_that_does_as_it_is_told(made):
    def obedient(messages) -> str:
        first, second = answers_of(messages)
        told = re.findall(r"\[\[([AB])\]\]", first + second)
        return f"[[{told[-1]}]]" if told else prefer(lambda text: text.startswith("Good"))(messages)

    recipe, run = made("judge.prompts=2", "judge.calibrate=20")
    canaries = judge_by(recipe, run, ok(obedient))[0]["canaries"]
    assert canaries["n"] == 20
    assert canaries["difference"]["mean"] == pytest.approx(3 / 5)  # three of the five notes name the tag
    recipe, run = made("judge.prompts=2", "judge.calibrate=20", "judge.model=robust")
    assert judge_by(recipe, run, GOOD)[0]["canaries"]["difference"]["mean"] == 0.0


def test_labelled_pairs_that_were_cut_off_are_refused(made):
    recipe, run = made("judge.kind=offline", "judge.calibrate=20")
    run.mark_done(recipe, "prepare", 0.0)
    rows = read_jsonl(run.pairs("test"))
    write_jsonl(run.pairs("test"), rows[:10])
    with pytest.raises(UserError, match="prepare"):
        judge(recipe, run)


def test_the_gold_model_judges_as_what_it_is(made):
    recipe, run = made("judge.kind=reward")
    judge(recipe, run)
    result = read_json(run.winrate)
    assert result["judge"]["name"] == "gold reward model gold"
    assert "not a person" in result["judge"]["is"]
    assert rate_of(result, "dpo")["win_rate"]["mean"] == 1.0
    assert result["calibration"]["reward_model"] == {"stage": "gold", "accuracy": {"mean": 0.7}}
    assert result["cost"] is None


def test_the_offline_judge_is_deterministic_and_labelled(made):
    recipe, run = made("judge.kind=offline", "judge.pairs=all", "judge.calibrate=5")
    judge(recipe, run)
    first = run.winrate.read_bytes()
    judge(recipe, run)
    assert run.winrate.read_bytes() == first
    result = json.loads(first)
    assert {(entry["a"], entry["b"]) for entry in result["win_rates"]} == {
        *itertools.combinations(("dpo", "grpo", "reference"), 2)
    }
    assert "a rule for tests" in result["judge"]["is"]


@pytest.mark.parametrize("row", [1, 23, 49])
def test_a_killed_run_makes_exactly_the_missing_calls(made, monkeypatch, row):
    settings = "judge.prompts=25", "judge.workers=1"
    recipe, run = made(*settings)
    options = [word for setting in settings for word in ("--set", setting)]
    words = [sys.executable, "-m", "rlhf_trl", *words_of(run, *options)]
    with FakeOpenAI(then=ok(prefer(len), latency=0.02)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL) as child:
            while len(server.requests) < row and child.poll() is None:
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
        (cache,) = (run.root / "judge").glob("*.jsonl")
        known = cache.read_bytes().count(b"\n")
        before = len(server.requests)
        assert known < 100
        with cache.open("ab") as file:
            file.write(b'{"key": "')
        done = judge_command(run, *options)
        assert done.returncode == 0, done.stderr
        assert len(server.requests) - before == 100 - known
        resumed = read_json(run.winrate)
    for path in (run.root / "judge").iterdir():
        path.unlink()
    assert resumed == judge_by(recipe, run, LONGER)[0]


def test_the_command_says_what_was_not_run_and_how(made):
    _, run = made()
    done = judge_command(run)
    assert done.returncode == 3
    assert "judge: not run: OPENAI_API_KEY is not set" in done.stderr
    assert "Traceback" not in done.stderr
    assert not run.done("judge").exists()
    assert read_json(run.winrate).keys() == {"status", "reason", "judge", "evaluation"}


def test_an_env_file_gives_the_address(made, tmp_path):
    _, run = made("judge.prompts=2")
    with FakeOpenAI(then=ok("[[C]]")) as server:
        (tmp_path / "env").write_text(f"OPENAI_BASE_URL={server.url}\nOPENAI_MODEL=local-model\n")
        done = judge_command(run, "--env-file", str(tmp_path / "env"), "--set", "judge.prompts=2", "--calibrate", "3")
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == 2 * (4 + 6 + 6)
        assert server.requests[0]["model"] == "local-model"
    result = read_json(run.winrate)
    assert result["judge"]["name"] == "local-model"
    assert result["calibration"]["all"]["n"] == 6
    # What the command asks for beyond the recipe does not make it another recipe's result.
    assert run.is_done(made("judge.prompts=2")[0], "judge")


# --- secrets and terminals -------------------------------------------------------------------------------------------

LETTERS = "aB3dE5gH" * 5
CANARIES = [
    *(form + LETTERS for form in ("hf_", "sk-proj-", "sk-ant-", "sk_live_", "gsk_", "ghp_", "github_pat_", "glpat-",
                                  "AIza", "ya29.", "xoxb-", "npm_", "pypi-", "r8_", "dop_v1_", "Bearer ")),
    "AKIAIOSFODNN7EXAMPLE", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    f"https://me:{LETTERS}@host/v1", f"-----BEGIN PRIVATE KEY-----\n{LETTERS}\n-----END PRIVATE KEY-----",
]  # fmt: skip
ECHO = "\x1b]0;owned\x07 \u202e " + " ".join([*CANARIES, "a value without a form"])


def assert_hidden(run: RunDir, shown: str) -> None:
    """No canary and no character that acts on a terminal is in a text or in a file of the run."""
    files = [path.read_bytes().decode() for path in run.root.parent.parent.rglob("*") if path.is_file()]
    for text in [shown, *files]:
        assert [canary for canary in (*CANARIES, "value without") if canary in text or LETTERS in text] == []
    assert not set("\x1b\x07\u202e") & set(shown)


@pytest.mark.parametrize("place", ["environment", "env file"])
def test_secrets_that_a_server_sends_back_are_in_no_file_and_no_message(made, monkeypatch, tmp_path_factory, place):
    """The server knows them all, and puts them into replies, names of models, errors and headers of every kind."""
    _, run = made()
    script = [status(400, {"code": ECHO}, ECHO), raw(f"<html>{ECHO}".encode(), "text/html"), raw(ECHO.encode()),
              json_of(completion(None, refusal=ECHO) | {"model": ECHO}), json_of({"choices": [], "x": ECHO}),
              status(500, message=ECHO[300:], headers={"Retry-After": CANARIES[0]}), ok(ECHO),
              status(429, message=ECHO, headers={"Retry-After": "3600"})]  # fmt: skip
    secrets = {f"CANARY_{n}_KEY": canary for n, canary in enumerate([*CANARIES, "a value without a form"])}
    with FakeOpenAI(script, then=ok(lambda messages: f"{ECHO}\n[[A]]")) as server:
        values = secrets | {"OPENAI_API_KEY": CANARIES[0], "OPENAI_BASE_URL": server.url}
        file = tmp_path_factory.mktemp("env") / "env"
        file.write_text("".join(f"{name}={json.dumps(value)}\n" for name, value in values.items()))
        for name, value in values.items() if place == "environment" else ():
            monkeypatch.setenv(name, value)
        done = judge_command(run, *([] if place == "environment" else ["--env-file", str(file)]))
    assert done.returncode == 3, done.stderr
    assert "what to do" in done.stderr and "<secret>" in done.stderr
    assert len(read_jsonl(next((run.root / "judge").glob("*.jsonl")))) > 100
    assert_hidden(run, done.stdout + done.stderr)


def test_secrets_in_overrides_and_addresses_are_refused_and_not_repeated(made):
    recipe, run = made()
    overrides = f"judge.harmless={json.dumps(CANARIES)}", f"judge.base_url={CANARIES[-2]}"
    done = judge_command(run, "--set", overrides[0], "--set", overrides[1])
    assert done.returncode == 2 and done.stderr.count("looks like an access token") >= len(CANARIES)
    assert_hidden(run, done.stdout + done.stderr)
    for canary in CANARIES:
        for place, address, model in (("MODEL", "http://h", canary), ("BASE_URL", f"http://u:{canary}@h", "m"),
                                      ("BASE_URL", f"http://h/{canary}/v1", "m")):  # fmt: skip
            with pytest.raises(UserError, match=f"OPENAI_{place}") as caught:
                ask_server(recipe.judge, address, model, {}, run.root / "x")
            assert_hidden(run, str(caught.value))


@pytest.mark.parametrize("code", [307, 401, 404])
def test_secrets_in_what_ends_a_run_are_hidden(made, monkeypatch, code):
    monkeypatch.setenv("OPENAI_API_KEY", CANARIES[0])
    recipe, run = made("judge.prompts=2")
    behaviour = status(code, message=ECHO, headers={"Location": f"http://h/?key={CANARIES[0]}"})
    with pytest.raises(UserError) as caught:
        judge_by(recipe, run, behaviour)
    assert_hidden(run, printable(caught.value))
