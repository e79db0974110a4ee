"""`answer`: what a policy says to a file of prompts, in the form that a benchmark of policies reads.

Reads JSON lines, or another file format of `data.files`: texts, or rows with `prompt`, `instruction` (and `input`),
`question`, `messages`, or `turns` of several questions. Keeps what is done in `OUT.partial`, and goes on there; writes
OUT when all is done.

    rlhf-trl answer shared/demo-grpo prompts.jsonl --out answers.jsonl
"""

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf_trl.adapters.load import Policy
from rlhf_trl.adapters.score import read_rows
from rlhf_trl.models.tokenizer import Messages
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.files import write_json, write_jsonl
from rlhf_trl.text.display import has_lone_surrogate

# Batches that are lost at most when the program ends.
BATCHES = 4
ASKED = ("turns", "messages", "prompt", "instruction", "question")
FORMS = ("jsonl", "alpaca_eval", "arena_hard", "mt_bench")
IDS = {"arena_hard": "uid", "mt_bench": "question_id"}  # what a benchmark finds an answer by


def answer_file(
    policy: Policy, path: Path, out: Path, form: str, name: str, batch_size: int, **how: Any
) -> dict[str, int]:
    """Answer every line of a file, each question of a row after the other; the same seed gives the same answers.

    `form` is one of `FORMS`, `name` that of the model, as the benchmark shows it; `how` goes to `Policy.answer_all`.
    Returns the number of `rows`, and of those that were `kept` from an earlier start; a UserError says that a line
    cannot be read, or that the earlier start was another one.
    """
    rows = [(raw, *_read(raw, f"{path}:{number}", IDS.get(form))) for number, raw in read_rows(path)]
    partial = out.with_name(f"{out.name}.partial")
    begun = hashlib.sha256(f"{hash_file(path)}{name}{policy.made}{sorted(how.items())}".encode()).hexdigest()
    lines = partial.read_text(encoding="utf-8").split("\n") if partial.exists() else [begun, ""]
    if lines[0] != begun:
        remedy = "give the same file, model and options, or remove it"
        raise UserError(str(partial), "holds answers of another file, model, or way of sampling", remedy)
    done = [json.loads(line) for line in lines[1:-1]]  # without a line that the earlier start was ended in
    kept = len(done)
    partial.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    with partial.open("a", encoding="utf-8") as file:
        for first in tqdm(range(kept, len(rows), size := BATCHES * batch_size), f"answers, {size} at a time"):
            talks = [(list(start), turns) for _, start, turns in rows[first : first + size]]
            answers = _answer(policy, talks, batch_size, how)
            file.write("".join(json.dumps(one) + "\n" for one in answers))
            file.flush()
            done += answers
    written = [_write(form, raw, turns, answers, name) for (raw, _, turns), answers in zip(rows, done, strict=True)]
    (write_json if form == "alpaca_eval" else write_jsonl)(out, written)
    partial.unlink()
    return {"rows": len(rows), "kept": kept}


def _answer(
    policy: Policy, talks: list[tuple[Messages, list[str]]], batch_size: int, how: Mapping[str, Any]
) -> list[list[str]]:
    answers: list[list[str]] = [[] for _ in talks]
    for turn in range(max(len(turns) for _, turns in talks)):
        asked = [place for place, (_, turns) in enumerate(talks) if turn < len(turns)]
        for place in asked:
            talks[place][0].append({"role": "user", "content": talks[place][1][turn]})
        found = policy.answer_all([talks[place][0] for place in asked], batch_size=batch_size, **how)
        for place, text in zip(asked, found, strict=True):
            talks[place][0].append({"role": "assistant", "content": text})
            answers[place].append(text)
    return answers


def _read(raw: Any, place: str, id: str | None) -> tuple[Messages, list[str]]:
    """Return the messages before the first question of a row, and its questions."""
    row = {"prompt": raw} if isinstance(raw, str) else raw if isinstance(raw, dict) else {}
    if id is not None and row.get(id) is None:
        raise UserError(place, f"there is no {id!r} in the line", "give the file of questions of the benchmark itself")
    if has_lone_surrogate(json.dumps(row, ensure_ascii=False)):
        raise UserError(place, "there is a lone surrogate in the line, which no text can hold", "leave the row out")
    asked = next((row[key] for key in ASKED if row.get(key)), None)
    if isinstance(asked, str):
        return [], [f"{asked}\n\n{row['input']}" if row.get("input") and "instruction" in row else asked]
    if isinstance(asked, list) and all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in asked):
        if asked[-1].get("role", "user") == "user" and any("role" in one for one in asked):
            return [{"role": one["role"], "content": one["content"]} for one in asked[:-1]], [asked[-1]["content"]]
        asked = [one["content"] for one in asked if "role" not in one]
    if not isinstance(asked, list) or not asked or not all(isinstance(one, str) for one in asked):
        problem = "there is no prompt in the line"
        raise UserError(place, problem, f"give a text, or a row with one of: {', '.join(ASKED)}")
    return [], asked


def _write(form: str, raw: Any, turns: Sequence[str], answers: Sequence[str], name: str) -> dict[str, Any]:
    """Write a row as a benchmark reads it; all are JSON lines, but for that of AlpacaEval, which is one list."""
    row = raw if isinstance(raw, dict) else {"prompt": raw}
    if form == "jsonl":
        return {**row, "model": name, "answer": answers[0] if len(answers) == 1 else answers}
    if form == "alpaca_eval":
        kept = {key: row[key] for key in ("dataset",) if key in row}
        return {"instruction": turns[0], "output": answers[0], "generator": name, **kept}
    id = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([name, row, answers])).hex  # the same file, the same bytes
    if form == "mt_bench":
        return {"question_id": row["question_id"], "answer_id": id, "model_id": name,
                "choices": [{"index": 0, "turns": answers}]}  # fmt: skip
    talk = [{"role": "user", "content": turns[0]}, {"role": "assistant", "content": {"answer": answers[0]}}]
    return {"uid": row["uid"], "ans_id": id, "model": name, "messages": talk}
