"""Random inputs to every reader: recipes, rows, replies, servers, state files, adapters; a part of `make chaos`.

An input is a sound document with a few changes. Its random numbers come from the seed, the part and its own number, so
`--only PART:NUMBER` repeats it.
"""

import asyncio
import copy
import gzip
import io
import json
import logging
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from conftest import RECIPE, ROOT, plain_recipe
from fake_openai import FakeOpenAI, completion
from safetensors.numpy import save_file

from rlhf_trl.adapters.check import check_adapter, notes
from rlhf_trl.cli.run import steps_to_run
from rlhf_trl.cli.tables import plan_table, status_table
from rlhf_trl.data.preprocess import prepare
from rlhf_trl.judge.client import OpenAIClient, Request
from rlhf_trl.judge.questions import parse_verdict
from rlhf_trl.judge.replies import JudgeCache
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.recipe.library import CLASSES, read_options
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.checkpoints import seal, set_aside_damaged
from rlhf_trl.run.documents import Done, read_document
from rlhf_trl.run.files import read_json, read_jsonl, write_json
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.states import step_states

LIMIT = 10  # seconds, after which an input counts as a hang
VALUES = (None, True, False, -1, 0, 1, 3, 0.5, 10**400, 1e308, float("nan"), float("inf"), 2**63, "", " ", "x", "no",
          "1e5", "\x1b]0;x\x07", "\ud800", "\u202e", "2026-13-45", "../..", "(a+)+$", "[[A]]", "{{ 'x' * 10**9 }}",
          "<think>", [], [[]], [None], [1, "a"], {}, {"": {}}, {"a": [1]}, "y" * 10**5, [[[[[[]]]]]])  # fmt: skip
BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\t", b'"', b"{", b"]", b":", b"- ", b"\xed\xa0\x80", b"&a *a",
         b"[" * 3000, b"<think>", b"[[B]]", b"NaN", b"1e999", b"\xe2\x80\xa8", b"PK\x03\x04", b"---\n")  # fmt: skip


class Hang(BaseException):
    """An input took longer than `LIMIT`."""


class Wrong(Exception):
    """A result that is not what the input says: a silent difference."""


class Lost(Exception):
    """A verdict that was given is not there."""


@dataclass
class Tally:
    """What became of the inputs of one part."""

    part: str
    seed: int
    only: int | None = None
    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    shown: set[str] = field(default_factory=set)

    def numbers(self, count: int) -> Iterator[tuple[int, random.Random]]:
        for number in range(count) if self.only is None else [self.only]:
            yield number, random.Random(f"{self.seed} {self.part} {number}")

    @contextmanager
    def attempt(self, name: object, many: int = 1, limit: float = LIMIT) -> Iterator[None]:
        """Count an input by how it ends: read, refused as documented, or one of the four faults."""
        began, kind, place = time.monotonic(), "", ""
        self.inputs += many
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            yield
        except UserError:
            self.refused += 1
        except (Exception, Hang) as error:
            kinds = {Wrong: "silent", Lost: "lost", Hang: "hangs"}
            kind = kinds.get(type(error), "tracebacks")
            frames = traceback.extract_tb(error.__traceback__)
            where = (f" < {Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-7:-1])
            place = f"{type(error).__name__}: {error}"[:300] + "".join(where)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.slowest = max(self.slowest, time.monotonic() - began)
        if kind:
            self.faults[kind] += 1
            if place.partition(" < ")[2] not in self.shown:  # each place once
                self.shown.add(place.partition(" < ")[2])
                print(f"  --seed {self.seed} --only {self.part}:{name}: {kind}: {place}", flush=True)


def ring(*_: object) -> None:
    raise Hang("it takes too long")


def mutate(rng: random.Random, value: Any, keys: tuple[str, ...] = ()) -> Any:
    """Change, drop, add or move something, at any depth."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return copy.deepcopy(rng.choice(VALUES))
    changed = copy.deepcopy(value)
    key: Any = rng.choice(list(changed) if isinstance(changed, dict) else range(len(changed)))
    match rng.randrange(8):
        case 0:
            del changed[key]
        case 1 if isinstance(changed, dict):
            new = rng.choice((*keys, *changed, "new", ""))
            changed[new] = copy.deepcopy(rng.choice((*VALUES, *changed.values())))
        case 1:
            changed.insert(key, copy.deepcopy(rng.choice((*VALUES, *changed))))
        case 2:
            other = rng.choice(list(changed) if isinstance(changed, dict) else range(len(changed)))
            changed[key], changed[other] = changed[other], changed[key]
        case _:
            changed[key] = mutate(rng, changed[key], keys)
    return changed


def scramble(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, drop, repeat or insert bytes, once to three times."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 10, 100)))
        flipped = bytes([data[at] ^ 1 << rng.randrange(8)]) if at < len(data) else b""
        pieces = (flipped + data[at + 1 :], b"", data[end:], data[at:end] + data[at:], rng.choice(BYTES) + data[at:])
        data = data[:at] + rng.choice(pieces)
    return data


# --- recipes ---------------------------------------------------------------------------------------------------------


def recipes(tally: Tally, count: int, folder: Path) -> None:
    from ruamel.yaml import YAML

    from rlhf_trl.train.check import check_stages

    texts = [RECIPE, *(file.read_text() for file in sorted((ROOT / "recipes").glob("*.yaml")))]
    trees = [YAML(typ="safe", pure=True).load(text) for text in texts]
    options = tuple(dict.fromkeys(name for kind in CLASSES for name in read_options(kind)))
    keys = (*options, *Recipe.model_fields, "trainer", "init", "reward", "sweep", "health", "args", "half", "kind")
    numbers = (0, 1, 2, 3, 64, 0.5, -1, 1e-9, 1e9)
    path = folder / "fuzzed.yaml"
    for number, rng in tally.numbers(count):
        with tally.attempt(number):
            which = rng.randrange(len(texts))
            tree = trees[which]
            for _ in range(rng.choice((1, 1, 1, 3))):
                if rng.random() < 0.3 or not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
                    tree = mutate(rng, tree, keys)
                    continue
                # An option of a trainer, with a value that it may well take.
                tree = copy.deepcopy(tree)
                stage = rng.choice([*tree["stages"].values()] or [None])
                args = stage.get("args") if isinstance(stage, dict) else None
                if isinstance(args, dict) and stage.get("trainer") in [*CLASSES]:
                    name, option = rng.choice([*read_options(stage["trainer"]).items()])
                    args[name] = rng.choice(option.choices or (*numbers, True, False, None, "x", {}))
            text = json.dumps(tree).encode()
            path.write_bytes(text if rng.random() < 0.7 else scramble(rng, texts[which].encode()))
            place = ".".join(rng.choice(keys) for _ in range(rng.choice((1, 2, 4))))
            override = rng.choice((f"stages.dpo.args.{place}", place, "stages.dpo", "data"))
            value = (
                json.dumps(rng.choice(VALUES)) if rng.random() < 0.5 else scramble(rng, b"[a, b]").decode("latin-1")
            )
            recipe = load_recipe(path, [f"{override}={value}"] if rng.random() < 0.2 else [])
            if Recipe.model_validate_json(json.dumps(recipe.model_dump())) != recipe:
                raise Wrong("the recorded recipe is another")
            if recipe.data.source == "builtin:demo" and "builtin:tiny" in recipe.source_names:
                _ = [recipe.fingerprint(step) for step in recipe.plan]
                if number % 3 == 0:
                    check_stages(recipe, RunDir(folder / "none"), 1)


# --- rows ------------------------------------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "Tell me of the sea, please."}]
SHAPES: tuple[dict[str, Any], ...] = (
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes, indeed.", "rejected": "\n\nHuman: Hi\n\nAssistant: Not at all."},
    {"prompt": "Name a colour.", "chosen": "Blue is one.", "rejected": "I would rather not.", "score_chosen": 2},
    {"prompt": TALK, "chosen": [{"role": "assistant", "content": "It is deep."}], "rejected": [{"role": "assistant",
     "content": [{"type": "text", "text": "It is very, very wet."}]}]},
    {"chosen": json.dumps([*TALK, {"role": "assistant", "content": "Waves"}]), "rejected": str([*TALK, {"role":
     "assistant", "content": "Salt and sand"}])},
    {"instruction": "Add.", "input": "1 and 2", "chosen": "It is 3, I think.", "rejected": "Four.", "system": "Sum."},
    {"question": "Where?", "history": [["Who?", "Me."]], "chosen": "Here, in this place.", "rejected": "Over there."},
    {"chosen": [{"from": "human", "value": "Go?"}, {"from": "gpt", "value": "Left"}],
     "rejected": [{"from": "human", "value": "Go?"}, {"from": "gpt", "value": "Right you are"}]},
)  # fmt: skip
COLUMNS = ("prompt", "chosen", "rejected", "history", "system", "input", "tools", "images", "subset", "role", "from",
           "content", "value", "type", "text", "messages", "score_rejected", "columns", "data")  # fmt: skip


def rows(tally: Tally, count: int, folder: Path) -> None:
    """Files of 25 rows through `prepare`: each row is kept or in quarantine, and sound ones beside others are kept."""
    run = RunDir(folder / "rows")
    run.replace("prepare")
    prepare(plain_recipe(data={"source": "builtin:demo", "max_rows": 40}), run)  # imports, the base
    for number, rng in tally.numbers(count // 25):
        many = [copy.deepcopy(rng.choice(SHAPES)) | {"subset": f"s{rng.randrange(3)}"} for _ in range(25)]
        sound = [index for index in range(25) if rng.random() < 0.3]
        for index in {*range(25)} - {*sound}:
            many[index] = mutate(rng, many[index], COLUMNS)
        for index in sound:
            many[index] = {"prompt": f"Question {number} {index}?", "chosen": f"Answer {index}", "rejected": "Never!"}
        lines = "".join(json.dumps(row) + "\n" for row in many)
        forms = {"a.jsonl": lines, "a.json": json.dumps(many, indent=1), "a.ndjson": lines.replace("\n", "\r\n"),
                 "b.csv": "chosen,rejected\n" + lines, "b.tsv": "chosen\trejected\n" + lines.replace(",", "\t"),
                 "b.json": json.dumps({"train": many}), "a.jsonl.gz": lines}  # fmt: skip
        name = rng.choice([*forms, "b.parquet"])
        content = forms[name].encode() if name in forms else _parquet([many[at] for at in sound])
        content = gzip.compress(content, 1) if name.endswith(".gz") else content
        harmed = rng.random() < 0.3 or name == "b.parquet"
        path = folder / name
        path.write_bytes(scramble(rng, content) if harmed else content)
        with tally.attempt(number, 25):
            data = {"source": str(path), "max_dropped_fraction": 1, "max_length": rng.choice((64, 128)),
                    "test_fraction": 0.3}  # fmt: skip
            recipe = plain_recipe(data=data)
            run.replace("prepare")
            prepare(recipe, run)
            kept = [pair for split in ("train", "test") for pair in read_jsonl(run.pairs(split))]
            dropped, summary = read_jsonl(run.quarantine), read_json(run.summary)
            if sorted(row["row"] for row in (*kept, *dropped)) != [*range(summary["rows_in"])]:
                raise Wrong(f"{len(kept)} rows kept and {len(dropped)} dropped of {summary['rows_in']}")
            if name[0] == "a" and not harmed:
                there = {(pair["row"], pair["prompt"][-1]["content"], pair["chosen"]) for pair in kept}
                if missing := {(at, many[at]["prompt"], many[at]["chosen"]) for at in sound} - there:
                    raise Wrong(f"sound rows were not kept as they are: {missing}")


def _parquet(rows: list[Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"chosen": [row["chosen"] for row in rows]}), file)
    return file.getvalue()


# --- the judge -------------------------------------------------------------------------------------------------------

WORDS = ("[[A]]", "[[B]]", "[[ c ]]", "[[tie]]", "<think>", "</think>", '{"winner": "A"}', "{" * 300, "\n", " if ",
         "\u2028", "\ud800", "A is better.", "**[[B]]**", "[[A", "]]", "x" * 10**4)  # fmt: skip


def replies(tally: Tally, count: int, folder: Path) -> None:
    """Texts through the reader of verdicts; and a cache in which sound lines must survive the harm of others."""
    for number, rng in tally.numbers(count):
        with tally.attempt(number):
            text = "".join(rng.choice(WORDS) for _ in range(rng.randrange(30)))
            if parse_verdict(text) not in (None, 0.0, 0.5, 1.0):
                raise Wrong(f"{parse_verdict(text)} of {text!r}")
            told = text.replace("think", "thank") + "\n\n[[B]]\n"
            if parse_verdict(told) != 0.0 or parse_verdict("<think>" + told) is not None:
                raise Lost(f"{parse_verdict(told)} of {told!r}")
            path, line = folder / "judge.jsonl", {"status": "ok", "usage": None, "model": "m", "again": None}
            lines = [line | {"key": f"k{at}", "reply": f"{at} [[A]]"} for at in range(4)]
            harmed = rng.randrange(4)
            changed = json.dumps(mutate(rng, lines[harmed], ("detail", "key", "status", "reply"))).encode()
            texts = [json.dumps(line).encode() for line in lines]
            texts[harmed] = changed if rng.random() < 0.7 else scramble(rng, texts[harmed]).replace(b"\n", b"")
            whole = rng.random() < 0.8
            path.write_bytes(b"\n".join(texts) + b"\n" * whole)
            with JudgeCache(path) as cache:
                for at, line in enumerate(lines[: 3 + whole]):
                    if at != harmed and (cache.get(f"k{at}") or {}).get("reply") not in (
                        line["reply"],
                        *_replies(changed),
                    ):
                        raise Lost(f"line {at} of {path.read_bytes()[:2000]!r}")
            path.unlink()


def _replies(line: bytes) -> list[Any]:
    """What a changed line says under the key of another."""
    value = json.loads(line)
    return [value.get("reply")] if isinstance(value, dict) else []


HEADERS = ("Retry-After", "retry-after-ms", "Content-Type", "Content-Encoding", "Location", "Transfer-Encoding")
ODD = ("-1", "1e400", "nan", "x", "", "gzip", "text/html", "http://127.0.0.1:1/", "Sat, 01 Jan 0000 00:00:00 GMT")
ERROR = {"error": {"message": "no", "type": "a", "code": "b", "param": None}}


def bodies(tally: Tally, count: int, folder: Path) -> None:
    """Answers of a server: broken, odd, hostile; and sound ones, before which half of the calls meet a 429."""
    calls: Counter[int] = Counter()

    def act(handler: Any, body: dict[str, Any]) -> None:
        number = int(body["messages"][0]["content"])
        rng = random.Random(f"{tally.seed} bodies {number}")
        if number % 4 == 0:  # sound, after some refusals
            calls[number] += 1
            busy = random.Random(f"{tally.seed} {number} {calls[number]}").random() < 0.5
            handler.answer(ERROR if busy else completion(f"{number}. [[A]]"), 429 if busy else 200)
            return
        content = mutate(rng, rng.choice((completion("[[B]]"), ERROR)), ("choices", "usage", "message", "code"))
        data = json.dumps(content).encode()
        data = scramble(rng, data) if rng.random() < 0.4 else data
        names = [name for name in HEADERS if rng.random() < 0.15]
        headers = {name: rng.choice(ODD) for name in names}
        if rng.random() < 0.1:
            handler.close_connection = True
            handler.wfile.write(scramble(rng, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + data))
            return
        status = rng.choice((200, 200, 200, 200, 204, 102, 302, 400, 401, 404, 408, 413, 422, 429, 500, 503, 599, 999))
        handler.send(status, data, headers)
        handler.close_connection = True

    requests = [Request(str(number), [{"role": "user", "content": str(number)}]) for number, _ in tally.numbers(count)]
    path = folder / "bodies.jsonl"

    async def ask(client: OpenAIClient, request: Request, cache: JudgeCache) -> Any:
        began = time.monotonic()
        try:
            reply = await client.complete(request.messages)
        finally:
            tally.slowest = max(tally.slowest, time.monotonic() - began)
        if time.monotonic() - began > LIMIT:
            raise Hang(f"more than {LIMIT} s")
        cache.append({"key": request.key, "reply": reply.text, "status": reply.status, "usage": reply.usage,
                      "model": reply.model, "detail": reply.detail})  # fmt: skip
        return reply

    async def ask_all(client: OpenAIClient, cache: JudgeCache) -> list[Any]:
        client._pause = lambda seconds: asyncio.sleep(0.001)
        turn = asyncio.Semaphore(16)
        async with client:

            async def one(request: Request) -> Any:
                async with turn:
                    return await ask(client, request, cache)

            return await asyncio.gather(*map(one, requests), return_exceptions=True)

    with FakeOpenAI(then=act) as server, JudgeCache(path) as cache:
        client = OpenAIClient("judge", api_key="EMPTY", base_url=server.url, timeout=2, attempts=5)
        answers = asyncio.run(ask_all(client, cache))
    with JudgeCache(path) as cache:
        for request, answer in zip(requests, answers, strict=True):
            with tally.attempt(request.key):
                if isinstance(answer, BaseException):
                    raise answer
                line = cache.latest(request.key)
                if line is None or (line["status"], line["reply"]) != (answer.status, answer.text):
                    raise Lost(f"{answer} is {line} in the cache")
                if int(request.key) % 4 == 0 and answer.status not in ("ok", "rate_limit"):
                    raise Wrong(f"a sound answer is {answer}")
                if answer.status == "ok":
                    parse_verdict(answer.text)


# --- state files -----------------------------------------------------------------------------------------------------


def states(tally: Tally, count: int, folder: Path) -> None:
    """Changed state files: `status` and `run` say so, and a step that counts as done vouches for all its files."""
    stages = {"rm": {"trainer": "reward"}, "dpo": {"trainer": "dpo"}}
    recipe, run = plain_recipe(stages=stages), RunDir(folder / "small")
    for step in recipe.plan:
        run.replace(step)
        place = run.adapter(step) / "adapter_model.safetensors" if step in stages else run.step(step) / "report.html"
        place = run.winrate if step == "judge" else place
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {"status": "complete", "evaluation": recipe.fingerprint("evaluate"), "reason": None})
        if step in stages:
            write_json(run.training_stats(step), {"max_steps": 4, "history": [{"step": 1, "seconds": 0.5, "loss": 1}]})
        run.mark_done(recipe, step, 1.0)
    time.sleep(0.2)  # what was written just now is not remembered
    run.write_provenance(recipe)
    assert steps_to_run(recipe, RunDir(run.root)) == []
    write_json(run.started("dpo"), {"fingerprint": recipe.fingerprint("dpo")})
    checkpoint = run.checkpoints("dpo") / "checkpoint-3"
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"):
        checkpoint.mkdir(parents=True, exist_ok=True)
        write_json(checkpoint / name, {})
    seal(checkpoint)
    files = [run.recipe, run.env, run.winrate, run.started("dpo"), run.known_hashes, checkpoint / "manifest.json",
             *(run.training_stats(stage) for stage in stages), *map(run.done, recipe.plan)]  # fmt: skip
    originals = {path: path.read_bytes() for path in files}
    outputs = {step: read_json(run.done(step))["outputs"] for step in recipe.plan}
    for number, rng in tally.numbers(count):
        chosen = rng.sample(files, rng.choice((1, 1, 2)))
        for path in chosen:
            text = json.dumps(mutate(rng, json.loads(originals[path]), ("step", "plan", "outputs"))).encode()
            path.write_bytes(text if rng.random() < 0.6 else scramble(rng, originals[path]))
        with tally.attempt(number):
            run = RunDir(run.root)
            waiting = steps_to_run(recipe, run)
            told = step_states(recipe, run)
            assert json.dumps([state.as_dict() for state in told]) and plan_table(told, waiting) and status_table(told)
            for step in {*recipe.plan} - {*waiting}:
                done, _ = read_document(run.done(step), Done)
                changed = {str(path.relative_to(run.root)) for path in chosen if path.read_bytes() != originals[path]}
                if done is None or done.outputs != outputs[step] or changed & outputs[step].keys():
                    raise Wrong(f"{step} counts as done with {changed} changed: {done}")
            manifest = checkpoint / "manifest.json"
            same = manifest.read_bytes() == originals[manifest] or _equal(manifest.read_bytes(), originals[manifest])
            if not set_aside_damaged(run.checkpoints("dpo"), "dpo") and not same:
                raise Wrong(f"a checkpoint with the manifest {manifest.read_bytes()[:300]!r} is whole")
            status_table(step_states(run.recorded_recipe(), run))
        for aside in run.checkpoints("dpo").glob(".unusable-*"):
            aside.rename(checkpoint)
        for path in chosen:
            path.write_bytes(originals[path])


def _equal(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except (ValueError, RecursionError):
        return False


# --- adapters --------------------------------------------------------------------------------------------------------

CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "./base", "r": 2, "bias": "none",
          "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "peft_version": "0.21.2"}  # fmt: skip
BASE = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 4, "vocab_size": 8}
TOKENIZER = {"eos_token": "</s>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}


def adapters(tally: Tally, count: int, folder: Path) -> None:
    """Settings, headers and templates of an adapter that ships its base."""
    from peft import LoraConfig

    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qv"]
    shapes = {"A": (2, 4), "B": (4, 2)}
    home = folder / "adapter"
    (home / "base").mkdir(parents=True)
    save_file({f"{name}.weight": np.ones((4, 4), "f4") for name in names}, home / "base" / "model.safetensors")
    lora = {f"base_model.model.{name}.lora_{end}.weight": np.ones(shapes[end], "f4") for name in names for end in "AB"}
    save_file(lora, home / "adapter_model.safetensors")
    for name, content in (("adapter_config", CONFIG), ("base/config", BASE), ("tokenizer_config", TOKENIZER)):
        write_json(home / f"{name}.json", content)
    files = [file for file in home.rglob("*") if file.is_file()]
    originals = {file: file.read_bytes() for file in files}
    keys = (*LoraConfig.__dataclass_fields__, *BASE, "auto_map", "_attn_implementation", "quantization_config")
    for number, rng in tally.numbers(count):
        file = home / "adapter_config.json" if rng.random() < 0.6 else rng.choice(files)
        harmed = scramble(rng, originals[file])
        if file.suffix == ".json" and rng.random() < 0.8:
            harmed = json.dumps(mutate(rng, json.loads(originals[file]), keys)).encode()
        file.write_bytes(harmed)
        with tally.attempt(number):
            if check_adapter(home):
                tally.refused += 1
            else:
                notes(home)
                LoraConfig.from_pretrained(home)
        file.write_bytes(originals[file])


PARTS: dict[str, tuple[Callable[[Tally, int, Path], None], int]] = {
    "recipes": (recipes, 2000), "rows": (rows, 2500), "replies": (replies, 2000), "bodies": (bodies, 1500),
    "states": (states, 1500), "adapters": (adapters, 1000),
}  # fmt: skip


def fuzz(tally: Tally, folder: Path, share: float = 1.0) -> None:
    """Run one part; `share` makes it smaller."""
    logging.disable(logging.WARNING)
    act, count = PARTS[tally.part]
    act(tally, round(count * share), folder)
    logging.disable(logging.NOTSET)
