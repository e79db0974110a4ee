"""The file of judge replies: what is a hit, what a kill leaves behind, and two processes."""

import json
import signal
import subprocess
import sys

import pytest

from rlhf_trl.judge.replies import FAULTS, JudgeCache
from rlhf_trl.recipe.errors import UserError


def line_of(name: str, status: str = "ok", **values) -> dict:
    return {"key": name, "status": status, "reply": "[[A]]"} | values


def test_what_is_written_is_found_again_and_what_may_pass_is_no_hit(tmp_path):
    path = tmp_path / "judge" / "gpt.jsonl"
    lines = [
        line_of("a", reply="größer\u2028 \n [[B]]", more=1),
        *(line_of(of, of, reply=None) for of in FAULTS if of != "ok"),
    ]
    with JudgeCache(path) as cache:
        for line in lines:
            cache.append(line)
    for _ in range(2):
        with JudgeCache(path) as cache:
            assert (cache.get("a"), cache.get("z")) == (lines[0], None)
            hits = {name for name in FAULTS if cache.get(name)}
            assert hits == {"refusal", "content_filter", "length", "null_content", "context_length"}
            assert all(cache.latest(line["key"]) == line for line in lines)
    assert path.read_text(encoding="utf-8").count("\n") == len(lines)


def test_a_failure_gives_way_to_a_reply_and_a_reply_to_nothing(tmp_path):
    with JudgeCache(tmp_path / "x.jsonl") as cache:
        for status in ("timeout", "rate_limit"):
            cache.append(line_of("a", status))
        assert (cache.get("a"), cache.latest("a")["status"]) == (None, "rate_limit")
        for status in ("ok", "quota", "refusal"):
            cache.append(line_of("a", status))
        assert cache.get("a") == cache.latest("a") == line_of("a")


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


USAGE = {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1}
WRONG = [{"key": 1}, {"status": "unknown"}, {"reply": None}, {"reply": ["[[A]]"]}, {"usage": 3}, {"model": 4},
         *({"usage": USAGE | {"prompt_tokens": count}} for count in (10**400, -1, None))]  # fmt: skip


@pytest.mark.parametrize(
    "damage", [b"\x00\x00\x00", b"{", b"[]", b"\xff", *(json.dumps(line_of("b") | wrong).encode() for wrong in WRONG)]
)
def test_damage_in_the_middle_costs_only_its_own_line(tmp_path, caplog, damage):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([json.dumps(line_of("a")).encode(), damage, json.dumps(line_of("c")).encode(), b""]))
    before = path.read_bytes()
    with JudgeCache(path) as cache:
        assert [bool(cache.latest(name)) for name in "abc"] == [True, False, True]
    assert path.read_bytes() == before
    assert f"{path}:2" in caplog.text


def test_a_second_process_is_refused_until_the_first_lets_go(tmp_path):
    path = tmp_path / "x.jsonl"
    code = "import sys; from pathlib import Path; from rlhf_trl.judge.replies import JudgeCache\n"
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
