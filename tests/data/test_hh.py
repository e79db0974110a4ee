"""Rows of every source and shape, broken ones above all."""

import csv
import gzip
import json
import random

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from rlhf_trl.data.hh import normalise
from rlhf_trl.data.pair import Pair, Reason, RowError
from rlhf_trl.data.sources import read_rows
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.schema import Data

H, A = "\n\nHuman: ", "\n\nAssistant: "
USER = {"role": "user", "content": "Q"}
SAID = {"role": "assistant", "content": "so"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "Be kind."}


def hh(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": f"{H}Q{A}{chosen}", "rejected": f"{H}Q{A}{rejected}"}


BROKEN = [
    ("not an object", "just a line", "malformed"),
    ("a list", [1, 2], "malformed"),
    ("no transcript", {"chosen": "Hello", "rejected": "Bye"}, "malformed"),
    ("text before the first turn", {"chosen": f"Intro{H}Q{A}yes", "rejected": f"Intro{H}Q{A}no"}, "malformed"),
    ("prompt with text before", {"prompt": f"Intro{H}Q", "chosen": "yes", "rejected": "no"}, "malformed"),
    ("assistant opens", {"chosen": [SAID, USER, YES], "rejected": [SAID, USER, NO]}, "malformed"),
    ("system inside", {"chosen": [USER, SYSTEM, YES], "rejected": [USER, SYSTEM, NO]}, "malformed"),
    ("no rejected", {"chosen": f"{H}Q{A}yes"}, "missing_field"),
    ("no content", {"prompt": [{"role": "user"}], "chosen": "yes", "rejected": "no"}, "missing_field"),
    ("null chosen", {"chosen": None, "rejected": f"{H}Q{A}no"}, "null_field"),
    ("NaN chosen", {"chosen": float("nan"), "rejected": f"{H}Q{A}no"}, "null_field"),
    ("null content", {"prompt": "Q", "chosen": [{**YES, "content": None}], "rejected": [NO]}, "null_field"),
    ("null prompt", {"prompt": None, "chosen": "yes", "rejected": "no"}, "null_field"),
    ("a number", {"chosen": 17, "rejected": f"{H}Q{A}no"}, "not_text"),
    ("texts in a list", {"prompt": "Q", "chosen": ["yes"], "rejected": ["no"]}, "not_text"),
    ("parts, not text", {"prompt": "Q", "chosen": [{**YES, "content": [{}]}], "rejected": [NO]}, "not_text"),
    ("lone surrogate", hh("yes \ud83d", "no"), "invalid_unicode"),
    ("tools", {"tools": [{"name": "f"}], "prompt": "Q", "chosen": "yes", "rejected": "no"}, "tools"),
    ("tool calls", {"prompt": "Q", "chosen": [{**YES, "tool_calls": [{"id": 0}]}], "rejected": [NO]}, "tools"),
    ("images", {"images": ["a.png"], "prompt": "Q", "chosen": "yes", "rejected": "no"}, "media"),
    ("an image part", {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
     "media"),
    ("two prompts", {"prompt": "Q", "instruction": "R", "chosen": "yes", "rejected": "no"}, "several_prompts"),
    ("two systems", {"system": "A", "system_prompt": "B", "prompt": "Q", "chosen": "yes", "rejected": "no"},
     "several_prompts"),
    ("unknown role", {"prompt": [{"role": "poet", "content": "Q"}], "chosen": "yes", "rejected": "no"},
     "unknown_role empty_prompt"),
    ("messages as text, cut off", {"prompt": "Q", "chosen": "[{'role': 'assistant', 'content': 'y", "rejected": "no"},
     "malformed"),
    ("history of texts", {"history": ["P"], "prompt": "Q", "chosen": "yes", "rejected": "no"}, "not_text"),
    ("system, then a transcript", {"prompt": "Be kind.\nHuman: Q\nAssistant:", "chosen": "yes", "rejected": "no"},
     "malformed"),
    ("tool turn", {"chosen": [USER, {"role": "tool", "content": "1"}, YES], "rejected": [USER, NO]},
     "tools"),
    ("human has the last word", hh(f"yes{H}Thanks", f"no{H}Thanks"), "ends_on_human"),
    ("one human has the last word", hh(f"yes{H}Thanks", "no"), "ends_on_human"),
    ("no answer", {"chosen": f"{H}Q", "rejected": f"{H}Q{A}no"}, "ends_on_human"),
    ("other question", {"chosen": f"{H}Q{A}yes", "rejected": f"{H}R{A}no"}, "prompts_differ"),
    ("marker in one answer", hh(f"yes{A}more", "no"), "prompts_differ consecutive_roles"),
    ("marker in the rejected answer", hh("yes", f"no{A}more"), "prompts_differ"),
    ("not the prompt field", {"prompt": "Z", "chosen": [USER, YES], "rejected": [USER, NO]}, "prompts_differ"),
    ("empty chosen", hh(" ", "no"), "empty_chosen"),
    ("no chosen text at all", {"chosen": "", "rejected": f"{H}Q{A}no"}, "empty_chosen"),
    ("no chosen messages", {"prompt": "Q", "chosen": [], "rejected": [NO]}, "empty_chosen"),
    ("empty rejected", {"chosen": f"{H}Q{A}yes", "rejected": f"{H}Q\n\nAssistant:"}, "empty_rejected"),
    ("both empty", {"prompt": "Q", "chosen": "", "rejected": " \n"}, "empty_chosen empty_rejected"),
    ("empty question", {"chosen": f"{H}{A}yes", "rejected": f"{H}{A}no"}, "empty_prompt"),
    ("blank prompt", {"prompt": "  ", "chosen": "yes", "rejected": "no"}, "empty_prompt"),
    ("only a system message", {"prompt": [SYSTEM], "chosen": [YES], "rejected": [NO]}, "empty_prompt"),
    ("two questions", {"chosen": f"{H}P{H}Q{A}yes", "rejected": f"{H}P{H}Q{A}no"}, "consecutive_roles"),
    ("half an answer", {"prompt": f"{H}Q{A}Well,", "chosen": "yes", "rejected": "no"}, "consecutive_roles"),
    ("identical", hh("yes ", " yes"), "identical"),
    ("two faults", {"chosen": f"{H}P{H}Q{A}a", "rejected": f"{H}P{H}Q{A}a"}, "consecutive_roles identical"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "reasons"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_broken_row_has_exactly_these_reasons(raw, reasons):
    with pytest.raises(RowError) as error:
        normalise(raw)
    assert [reason.value for reason in error.value.reasons] == reasons.split()
    if reasons == "empty_chosen empty_rejected":
        assert error.value.pair == Pair([USER], "", "")  # what can be read is kept


def test_every_reason_of_a_row_is_in_the_table():
    found = {reason for *_, reasons in BROKEN for reason in reasons.split()}
    by_prepare = {"too_short", "tie", "control_tokens", "duplicate", "near_duplicate", "too_long"}
    assert found | by_prepare == {reason.value for reason in Reason}


PLAIN = Pair([USER], "yes", "no")
LONGER = Pair([SYSTEM, {"role": "user", "content": "P"}, SAID, USER], "yes", "no")
TALK = f"{H}P{A}so{H}Q{A}"
TALKED = Pair(LONGER.prompt[1:], "yes", "no")
ANSWERS = {"chosen": "yes", "rejected": "no"}
LINES = "Human: P\nAssistant: so\nHuman: Q\nAssistant:"
NULLS = {"tool_calls": None, "images": [None], "from": None}
SHAPES = [
    ("transcripts", hh("yes", "no"), PLAIN),
    ("transcripts without the first newlines", {"chosen": f"Human: Q{A}yes", "rejected": f"Human: Q{A}no"}, PLAIN),
    ("several turns", {"chosen": f"{TALK}yes", "rejected": f"{TALK}no"}, TALKED),
    ("transcript prompt", {"prompt": TALK, "chosen": " yes", "rejected": "no "}, TALKED),
    ("transcript prompt without marker", {"prompt": f"{H}Q", "chosen": "yes", "rejected": "no"}, PLAIN),
    ("transcript prompt repeated", {"prompt": f"{H}Q{A}", **hh("yes", "no")}, PLAIN),
    ("plain", {"prompt": "Q", "chosen": "yes", "rejected": "no"}, PLAIN),
    ("plain prompt, transcripts", {"prompt": "Q", "chosen": f"{TALK}yes", "rejected": f"{TALK}no"}, TALKED),
    ("messages with their prompt", {"chosen": [*TALKED.prompt, YES], "rejected": [*TALKED.prompt, NO]}, TALKED),
    ("UltraFeedback", {"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 9}, PLAIN),
    ("UltraFeedback with history", {"prompt": "Q", "chosen": [*LONGER.prompt, YES],
                                    "rejected": [*LONGER.prompt, NO]}, LONGER),
    ("prompt messages", {"prompt": LONGER.prompt, "chosen": [YES], "rejected": [NO]}, LONGER),
    ("prompt messages repeated", {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}, PLAIN),
    ("prompt messages, plain answers", {"prompt": [USER], "chosen": "yes", "rejected": "no"}, PLAIN),
    ("single messages", {"prompt": "Q", "chosen": YES, "rejected": NO}, PLAIN),
    ("from and value", {"chosen": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "yes"}],
                        "rejected": [{"from": "Human", "value": "Q"}, {"from": "GPT", "value": "no"}]}, PLAIN),
    ("LLaMA-Factory", {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "yes"},
                       "rejected": {"from": "gpt", "value": "no"}}, PLAIN),
    ("system column", {"system": "Be kind.", "prompt": LONGER.prompt[1:], "chosen": "yes", "rejected": "no"}, LONGER),
    ("turns after the prompt", {"prompt": LONGER.prompt[:2], "chosen": [*LONGER.prompt, YES],
                                "rejected": [*LONGER.prompt, NO]}, LONGER),
    ("CRLF", {side: text.replace("\n", "\r\n") for side, text in hh("yes", "no").items()}, PLAIN),
    ("single newlines", {side: f"{LINES} {text}" for side, text in ANSWERS.items()}, TALKED),
    ("paragraphs of two lines", {side: f"Human: P\nAssistant: so\n\nHuman: Q\nAssistant: {text}"
                                 for side, text in ANSWERS.items()}, TALKED),
    ("prompt of single newlines", {"prompt": LINES, **ANSWERS}, TALKED),
    ("prompt of CRLF without marker", {"prompt": "Human: P\r\n\r\nAssistant: so\r\n\r\nHuman: Q", **ANSWERS}, TALKED),
    ("question", {"question": "Q", "system": "", **ANSWERS}, PLAIN),
    ("instruction", {"instruction": "Q", "input": "", **ANSWERS}, PLAIN),
    ("instruction and input", {"instruction": "Do", "input": "it", **ANSWERS},
     Pair([{"role": "user", "content": "Do\n\nit"}], "yes", "no")),
    ("one prompt twice, one null", {"prompt": "Q", "question": "Q", "instruction": None, **ANSWERS}, PLAIN),
    ("history of pairs", {"history": [["P", "so"]], "prompt": "Q", **ANSWERS}, TALKED),
    ("history of messages", {"history": LONGER.prompt[1:3], "question": "Q", "system_prompt": "Be kind.", **ANSWERS},
     LONGER),
    ("history as text", {"history": "[['P', 'so']]", "prompt": "Q", "tools": "[]", **ANSWERS}, TALKED),
    ("developer", {"prompt": [{"role": "developer", "content": "Be kind."}, *LONGER.prompt[1:]], **ANSWERS}, LONGER),
    ("nulls of a union", {"prompt": [{**USER, **NULLS}], "chosen": [{**YES, **NULLS}], "rejected": [NO], **NULLS},
     PLAIN),
    ("text parts", {"prompt": [{**USER, "content": [{"type": None, "text": "Q", "image_url": None}]}], **ANSWERS},
     PLAIN),
    ("JSON text", {"prompt": "Q", "chosen": json.dumps([USER, YES]), "rejected": json.dumps([USER, NO])}, PLAIN),
    ("JSON text of one message", {"prompt": "Q", "chosen": json.dumps(YES), "rejected": "no"}, PLAIN),
    ("JSON text in JSON text", {"prompt": "Q", "chosen": json.dumps(json.dumps([YES])), "rejected": "no"}, PLAIN),
    ("a list under a name", {"prompt": "Q", "chosen": {"messages": [USER, YES]},
                             "rejected": json.dumps({"messages": [USER, NO]})}, PLAIN),
    ("Python tuple", {"prompt": "Q", "chosen": str((YES,)), "rejected": str((NO,))}, PLAIN),
    ("marker before the answers", {"prompt": "Human: Q", "chosen": "Assistant: yes", "rejected": "Assistant: no"},
     PLAIN),
    ("Python text", {"prompt": str([USER]), "chosen": str([{**YES, "name": None}]), "rejected": str([NO])}, PLAIN),
    ("numpy's text", {"chosen": f"[{USER}\n {YES}]", "rejected": f"[{USER}\n {NO}]"}, PLAIN),
    ("markers inside a paragraph", hh("Human: me?\nAssistant: you.", "See\n\nHumans: a species"),
     Pair([USER], "Human: me?\nAssistant: you.", "See\n\nHumans: a species")),
    ("JSON that is an answer", {"prompt": "Q", "chosen": '{"role": "x"}', "rejected": '[{"a": {"role": 1}}]'},
     Pair([USER], '{"role": "x"}', '[{"a": {"role": 1}}]')),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "pair"), [row[1:] for row in SHAPES], ids=[row[0] for row in SHAPES])
def test_shape(raw, pair):
    before = json.dumps(raw)
    assert normalise(raw) == pair
    assert json.dumps(raw) == before


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("What is two plus two?", "What is two plus two? 4", "What is two plus two?\n5", ("4", "5")),
        ("What is two plus two?", "What is two plus two? 4", "5", ("What is two plus two? 4", "5")),
        ("Go to the", "Go to the shop", "Go to theatres", ("Go to the shop", "Go to theatres")),
        ("Yes", "Yes sir", "Yes no", ("Yes sir", "Yes no")),
    ],
)
def test_repeated_plain_prompt_is_cut_only_where_it_is_no_part_of_the_answers(prompt, chosen, rejected, expected):
    pair = normalise({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (pair.chosen, pair.rejected) == expected


# --- sources ---------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"Question {i}, “ünï”?", "chosen": f"yes,\n{i}", "rejected": f'no "{i}"'} for i in range(7)]


def write_csv(path, rows, encoding="utf-8-sig", **form):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), **form)
        writer.writeheader()
        writer.writerows(rows)


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


WRITERS = {
    "data.jsonl": lambda path, rows: path.write_text(lines(rows)),
    "data.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows).encode())),
    "data.json": lambda path, rows: path.write_text("\n " + json.dumps(rows, indent=1)),
    "lines.json": lambda path, rows: path.write_text(lines(rows)),
    "lines.ndjson": lambda path, rows: path.write_text(lines(rows), encoding="utf-16"),
    "pretty.jsonl": lambda path, rows: path.write_text("\n".join(json.dumps(row, indent=1) for row in rows)),
    "one_line.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "splits.json": lambda path, rows: path.write_text(json.dumps({"train": rows[:3], "test": rows[3:]})),
    "columns.json": lambda path, rows: path.write_text(pd.DataFrame(rows).to_json(orient="columns")),
    "lists.json": lambda path, rows: path.write_text(json.dumps(pd.DataFrame(rows).to_dict(orient="list"))),
    "semicolons.csv": lambda path, rows: write_csv(path, rows, delimiter=";"),
    "tabs.tsv": lambda path, rows: write_csv(path, rows, "utf-16", delimiter="\t"),
    "data.parquet": lambda path, rows: pa.parquet.write_table(pa.Table.from_pylist(rows), path),
    "data.csv": write_csv,
}


def read(source, seed=0, **settings):
    return list(read_rows(Data(source=str(source), **settings), seed))


@pytest.mark.parametrize("name", WRITERS)
def test_formats_give_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    expected = [(i, name.split(".")[0], row) for i, row in enumerate(ROWS)]
    assert read(tmp_path / name) == read(tmp_path) == expected


def test_folder_has_a_subset_for_each_file_or_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "a.jsonl").write_text(lines(ROWS[:2]))
    (tmp_path / "b" / "test.jsonl").write_text(lines(ROWS[2:3]))
    (tmp_path / "b" / "train.jsonl").write_text(lines([*ROWS[3:4], {**ROWS[4], "subset": "own"}]))
    assert [(row, subset) for row, subset, _ in read(tmp_path)] == [(0, "a"), (1, "a"), (2, "b"), (3, "b"), (4, "own")]
    assert [row for row, *_ in read(tmp_path, subsets=["own", "b"])] == [2, 3, 4]
    with pytest.raises(UserError, match=r"no subset 'c'[\s\S]*a, b, own"):
        read(tmp_path, subsets=["a", "c"])


def test_lines_that_are_no_json_objects_are_rows(tmp_path):
    broken = [b"{not json", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100_000, b"",
              b'{"chosen": NaN, "rejected": "\\ud800"}']  # fmt: skip
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([lines(ROWS[:1]).strip().encode(), *broken]))
    rows = [raw for _, _, raw in read(tmp_path / "x.jsonl")]
    assert rows[1:5] == ["{not json", [1], "text", "\udcff\udcfe"]
    assert len(rows) == 7
    assert rows[6] == {"chosen": None, "rejected": "\ud800"}


def test_one_odd_row_does_not_spoil_its_file(tmp_path):
    rows = [ROWS[0], {"prompt": "Q?", "chosen": ["yes"], "rejected": ["no"]}, {"other": 1}]
    rows += [{"columns": [{}], "data": [1]}, {**ROWS[1], "data": [[1]]}]
    (tmp_path / "x.jsonl").write_text(lines(rows))
    assert [raw for *_, raw in read(tmp_path / "x.jsonl")] == rows


def test_csv_line_with_too_many_cells_is_malformed(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\nQ,yes,no\nQ,yes, but,no\nQ,yes\n")
    reasons = []
    for _, _, raw in read(tmp_path / "x.csv")[1:]:
        with pytest.raises(RowError) as error:
            normalise(raw)
        reasons.append(error.value.reasons[0].value)
    assert reasons == ["malformed", "null_field"]


def test_saved_dataset_is_read_and_what_describes_or_hides_is_not(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / ".cache").mkdir()
    for name in (".cache/old.jsonl", "dataset_infos.json"):
        (tmp_path / "saved" / name).write_text(lines(ROWS))
    assert read(tmp_path / "saved") == [(i, "saved", row) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("name", [*WRITERS, "data.txt"])
def test_damaged_file_is_the_users_error(tmp_path, name):
    content = gzip.compress(lines(ROWS).encode())[:-20] if name.endswith("gz") else b"[PAR1\xff\x00\n" * 3
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert error.value.problems[0].remedy


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [("x.jsonl", b"", "no rows"), ("x.jsonl", b"\n\n", "no rows"), ("x.jsonl", b"x\ny\n", "the first is 'x'"),
     ("x.jsonl", b'{"question": 1, "answer": 2}\n', "answer, question"),
     ("notes.txt", b"", r"no data files; it holds notes\.txt"),
     ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", r"Git LFS pointer[\s\S]*git lfs pull"),
     ("x.json", b"<!DOCTYPE html>", "a web page"),
     ("x.jsonl", gzip.compress(b"{}", mtime=0), r"compressed with gzip[\s\S]*add .gz"),
     ("x.csv", "prompt,chosen,rejected\nQ,café,no\n".encode("latin-1"), r"not UTF-8[\s\S]*byte 0xe9[\s\S]*iconv")],
)  # fmt: skip
def test_unusable_source_is_the_users_error(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read(tmp_path)


@pytest.mark.parametrize(
    "source", ["./nothing", "missing.jsonl", "~/data", "/no/such/folder", "builtin:other", "a/b/c"]
)
def test_missing_source_is_the_users_error(source):
    with pytest.raises(UserError, match="no such file"):
        read(source)


def test_unreachable_hub_is_the_users_error(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        read("nobody/no-such-preferences", subsets=["helpful-base"])
    assert error.value.problems[0].place == "nobody/no-such-preferences/helpful-base"


def test_hub_rows_come_from_the_folders_and_both_splits(monkeypatch, tmp_path):
    """The real loader on a local copy of the repository's layout."""
    for subset, first in (("one", 0), ("two", 3)):
        (tmp_path / "hub" / subset).mkdir(parents=True)
        (tmp_path / "hub" / subset / "train.jsonl").write_text(lines(ROWS[first : first + 2]))
        (tmp_path / "hub" / subset / "test.jsonl").write_text(lines(ROWS[first + 2 : first + 3]))
    load = datasets.load_dataset
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda _, data_dir, revision: load(str(tmp_path / "hub"), data_dir=data_dir, cache_dir=cache),
    )
    assert read("owner/name", subsets=["two"]) == [(i, "two", ROWS[i + 3]) for i in range(3)]
    assert {(subset, len(raw)) for _, subset, raw in read("owner/name")} == {("name", 3)}
    with pytest.raises(UserError, match="owner/name/three: the dataset cannot be loaded"):
        read("owner/name", subsets=["three"])
    (tmp_path / "hub" / "two" / "train-1.jsonl").write_text(lines([{"prompt": {"text": "Q"}, "extra": 1}]))
    with pytest.raises(UserError, match=r"cannot be loaded: An error occurred.*(cast|columns)"):
        read("owner/name", subsets=["two"])
    only = {"validation_x": datasets.Dataset.from_list(ROWS)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: only)
    with pytest.raises(UserError, match="only the splits validation_x"):
        read("owner/name")


def test_max_rows_does_not_depend_on_the_order(tmp_path):
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    (tmp_path / "x.jsonl").write_text(lines(ROWS))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "x.jsonl").write_text(lines(shuffled))
    picked = read(tmp_path / "x.jsonl", max_rows=3)
    assert [row for row, *_ in picked] == sorted(row for row, *_ in picked)
    assert len(picked) == 3
    again = read(tmp_path / "y" / "x.jsonl", max_rows=3)
    assert {json.dumps(raw) for *_, raw in picked} == {json.dumps(raw) for *_, raw in again}
    assert any(read(tmp_path / "x.jsonl", max_rows=3, seed=seed) != picked for seed in range(1, 5))
    assert len(read(tmp_path / "x.jsonl", max_rows=99)) == 7
