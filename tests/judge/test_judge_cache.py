"""The file of judge replies: what is a hit, what a kill leaves behind, two processes, and the money."""

import json
import signal
import subprocess
import sys
from typing import get_args

import pytest

from rlhf_trl.judge.cache import JudgeCache, key
from rlhf_trl.judge.cost import Budget, cost, forecast
from rlhf_trl.judge.replies import MAY_PASS, Status
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Price

TALK = [{"role": "user", "content": "Hello"}]
MINI = Price(input=0.4, cached=0.1, output=1.6)
STANDS = {"ok", "refusal", "content_filter", "length", "null_content", "context_length"}


def line_of(name: str, status: str = "ok", **values) -> dict:
    return {"key": name, "status": status, "reply": "[[A]]"} | values


def test_what_is_written_is_found_again(tmp_path):
    path = tmp_path / "judge" / "gpt.jsonl"
    lines = [line_of("a", reply="größer\u2028 \n [[B]]", more=1), line_of("b", "length", reply=None)]
    with JudgeCache(path) as cache:
        assert cache.get("a") is None
        for line in lines:
            cache.append(line)
        assert cache.get("a") == lines[0]
    assert path.read_text(encoding="utf-8").count("\n") == 2
    with JudgeCache(path) as cache:
        assert (cache.get("a"), cache.get("b"), cache.get("c")) == (*lines, None)


def test_every_status_is_a_hit_or_is_made_again(tmp_path):
    assert set(get_args(Status)) == STANDS | MAY_PASS and not STANDS & MAY_PASS
    with JudgeCache(tmp_path / "x.jsonl") as cache:
        for status in get_args(Status):
            cache.append(line_of(status, status))
    with JudgeCache(tmp_path / "x.jsonl") as cache:
        assert {status for status in get_args(Status) if cache.get(status) is not None} == STANDS
        assert all(cache.latest(status)["status"] == status for status in get_args(Status))


def test_a_failure_gives_way_to_a_reply_and_a_reply_to_nothing(tmp_path):
    with JudgeCache(tmp_path / "x.jsonl") as cache:
        for status in ("timeout", "rate_limit"):
            cache.append(line_of("a", status))
        assert (cache.get("a"), cache.latest("a")["status"]) == (None, "rate_limit")
        for status in ("ok", "quota", "refusal"):
            cache.append(line_of("a", status))
        assert cache.get("a") == cache.latest("a") == line_of("a")
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 5


def test_a_line_that_was_cut_off_is_mended_and_said(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    whole = json.dumps(line_of("a")).encode() + b"\n"
    for end in range(1, len(whole)):
        path.write_bytes(whole + whole.replace(b'"a"', b'"b"')[:end])
        caplog.clear()
        with JudgeCache(path) as cache:
            assert cache.get("a") and not cache.get("b")
            cache.append(line_of("c"))
        assert "cut off" in caplog.text
        assert [json.loads(text)["key"] for text in path.read_text().splitlines()] == ["a", "c"]


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\x00\x00",
        b"{",
        b"[]",
        b"\xff",
        *(
            json.dumps(line_of("b") | wrong).encode()
            for wrong in (
                {"key": 1},
                {"status": "unknown"},
                {"reply": None},
                {"reply": ["[[A]]"]},
                {"usage": 3},
                {"usage": {"prompt_tokens": 1}},
                {"usage": {"prompt_tokens": 10**400, "cached_tokens": 0, "completion_tokens": 1}},
                {"usage": {"prompt_tokens": -1, "cached_tokens": 0, "completion_tokens": 1}},
                {"model": 4},
            )
        ),
    ],
)
def test_damage_in_the_middle_costs_only_its_own_line(tmp_path, caplog, damage):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([json.dumps(line_of("a")).encode(), damage, json.dumps(line_of("c")).encode(), b""]))
    before = path.read_bytes()
    with JudgeCache(path) as cache:
        assert [bool(cache.latest(name)) for name in "abc"] == [True, False, True]
    assert path.read_bytes() == before
    assert f"{path}:2" in caplog.text


def test_no_line_holds_a_number_that_json_has_not(tmp_path):
    with JudgeCache(tmp_path / "x.jsonl") as cache:
        with pytest.raises(ValueError):
            cache.append(line_of("a", seconds=float("nan")))
        assert cache.get("a") is None
    assert (tmp_path / "x.jsonl").read_bytes() == b""


def test_a_second_process_is_refused_until_the_first_lets_go(tmp_path):
    path = tmp_path / "x.jsonl"
    code = "import sys; from pathlib import Path; from rlhf_trl.judge.cache import JudgeCache\n"
    code += "with JudgeCache(Path(sys.argv[1])) as cache: print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"):
            JudgeCache(path)
        other.send_signal(signal.SIGKILL)  # the system lets go of the lock of a killed process
        other.wait()
        with JudgeCache(path):
            pass


def test_a_key_names_all_that_decides_a_verdict():
    keys = [
        key("gpt@1", TALK, "a", "b"),
        key("gpt@2", TALK, "a", "b"),
        key("gpt@1", [*TALK, *TALK], "a", "b"),
        key("gpt@1", [{"role": "system", "content": "Hello"}], "a", "b"),
        key("gpt@1", TALK, "b", "a"),
        key("gpt@1", TALK, "ab", ""),
        key("gpt@1", TALK, "a", "b", again=""),
        key("gpt@1", TALK, "a", "b", again="no verdict"),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key("gpt@1", [{"content": "Hello", "role": "user"}], "a", "b")


def test_what_calls_cost():
    usage = {"prompt_tokens": 1_000_000, "cached_tokens": 250_000, "completion_tokens": 500_000}
    assert cost(usage, MINI) == pytest.approx(0.75 * 0.4 + 0.25 * 0.1 + 0.5 * 1.6)
    assert cost(None, MINI) == 0.0
    calls = [[{"role": "user", "content": "x" * 4000}], [{"role": "user", "content": "é" * 3}] * 2]  # 1000, 3 tokens
    each = [(1000 * 0.4 + 500 * 1.6) / 1e6, (3 * 0.4 + 500 * 1.6) / 1e6]
    assert forecast(calls, MINI, 500) == pytest.approx(each)
    assert forecast([], MINI, 500) == []


def test_a_budget_counts_what_is_in_flight():
    budget = Budget(Price(input=1.0, cached=1.0, output=1.0), dearest=0.1, max_cost=1.0)
    assert budget.stop(9) is None
    assert "max_cost" in budget.stop(10)
    budget.add({"prompt_tokens": 50_000, "cached_tokens": 0, "completion_tokens": 0})
    assert (budget.spent, budget.calls) == (0.05, 1)
    assert budget.stop(8) is None
    assert "$0.0500 spent" in budget.stop(9)
    budget.add({"prompt_tokens": 400_000, "cached_tokens": 0, "completion_tokens": 0})  # dearer than was thought
    assert budget.stop(0) is None
    assert "max_cost" in budget.stop(1)


def test_a_budget_counts_calls_and_may_be_without_limits():
    budget = Budget(MINI, max_requests=3)
    budget.add(None)
    assert budget.stop(1) is None
    assert "max_requests" in budget.stop(2)
    assert Budget(MINI, dearest=9.0).stop(10**6) is None
    assert "max_cost" in Budget(MINI, dearest=0.1, max_cost=0.05).stop(0)
