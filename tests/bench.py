"""What the project costs beside the plain way: `make bench`, with ../shared and nothing else running.

Each part prints rows of what was measured, the bar, and whether it holds; all rows go to `docs/bench.json`, and as a
table to `docs/bench.md`. MODEL is the folder of a causal model; without it, one of SmolLM2-135M's shape is made, with
random weights: times do not depend on what was learned.

    make bench                                    # every part
    make bench ARGS="--only steps,prepare"        # some parts; the rows of the others stay as they are
    make bench ARGS="--only million,reward"       # the long ones, which run only when they are named: an hour
"""

import argparse
import asyncio
import contextlib
import ctypes
import gzip
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from unittest import mock

import bench_evaluate
import bench_ppo
import psutil
from bench_evaluate import SHARED
from conftest import RECIPE, ROOT

# `steps` is last: the peak memory of a child counts what its parent held when it was started.
PARTS = ("commands", "judge", "prepare", "report", "processes", "ppo", "evaluate", "steps")
LONG = ("million", "reward", "tcmalloc")
TCMALLOC = "libtcmalloc_minimal.so.4"  # apt install libtcmalloc-minimal4
REPLY = {"choices": [{"message": {"content": "A reason.\n[[A]]"}, "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 500, "completion_tokens": 5}}  # fmt: skip
TRL = """
import json, sys, trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
base, tokens, rows, out = sys.argv[1:]
data = [json.loads(line) for line in open(rows)]
talk = lambda text: [{"role": "assistant", "content": text}]
data = [{"prompt": row["prompt"], "chosen": talk(row["chosen"]), "rejected": talk(row["rejected"])} for row in data]
args = trl.DPOConfig(out, max_steps=20, per_device_train_batch_size=8, learning_rate=1e-3, bf16=False, use_cpu=True,
                     gradient_checkpointing=False, save_strategy="no", logging_steps=1, report_to=[])
lora = dict(use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules="all-linear")
lora = trl.get_peft_config(trl.ModelConfig(**lora))
trainer = trl.DPOTrainer(AutoModelForCausalLM.from_pretrained(base), args=args, train_dataset=Dataset.from_list(data),
                         processing_class=AutoTokenizer.from_pretrained(tokens), peft_config=lora)
trainer.train()
trainer.save_model(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--only", default=",".join(PARTS))
    given = parser.parse_args()
    path = ROOT / "docs" / "bench.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model or make_model(folder / "model")
        for part in (part for part in (*LONG, *PARTS) if part in given.only.split(",")):
            rows[part] = []
            for what, value, bar, holds in globals()[part](folder, model):
                row = {"what": what, "measured": value, "bar": bar, "holds": holds, "date": str(date.today())}
                rows[part].append(row)
                print(f"{part}: {what}: {value} (bar {bar}: {'holds' if holds else 'MISSED'})", flush=True)
            path.write_text(json.dumps(rows, indent=1) + "\n")
    write_table(rows)


def write_table(rows) -> None:
    """Write the page that shows the rows."""
    head = (
        f"# What it costs\n\nMeasured by `make bench` on {os.cpu_count()} cores ({platform.machine()}, no GPU); a row "
        "keeps the date of its measurement. Where it says CPU, CPU seconds are compared, in "
        "the order A B B A, or (evaluation, PPO) both ways at once, on a core each.\n\n"
        "| what | measured | bar | | date |\n|---|---|---|---|---|\n"
    )
    lines = [f"| {row['what']} | {row['measured']} | {row['bar']} | {'holds' if row['holds'] else 'missed'} "
             f"| {row['date']} |\n" for part in (*PARTS, *LONG) for row in rows.get(part, [])]  # fmt: skip
    (ROOT / "docs" / "bench.md").write_text(head + "".join(lines))


def make_model(folder: Path) -> str:
    """A model of SmolLM2-135M's shape with the tokenizer of GPT-2 and random weights."""
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
AutoTokenizer.from_pretrained({str(SHARED / "gpt2-tokenizer")!r}).save_pretrained({str(folder)!r})
AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50257, hidden_size=576, intermediate_size=1536,
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=50256,
    eos_token_id=50256, max_position_embeddings=2048)).save_pretrained({str(folder)!r})"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return str(folder)


def spent(*command: str) -> dict[str, float]:
    """Run a command: wall and CPU seconds, and the peak memory of all its processes in GB, shared pages once."""
    start, held = time.perf_counter(), [0]
    with tempfile.TemporaryFile() as error:
        child = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=error, cwd=ROOT)
        while child.status() != psutil.STATUS_ZOMBIE:
            with contextlib.suppress(psutil.NoSuchProcess):
                held.append(sum(one.memory_full_info().pss for one in (child, *child.children(recursive=True))))
            time.sleep(0.2)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            error.seek(0)
            raise SystemExit(f"{command}\n{error.read().decode()}")
    cpu, wall = usage.ru_utime + usage.ru_stime, time.perf_counter() - start
    return {"wall": wall, "cpu": cpu, "gb": max(held) / 1e9}


def alternate(ours, theirs, rounds: int) -> tuple[float, float]:
    """The medians of two measurements, in the order A B B A."""
    found = {ours: [], theirs: []}
    for turn in range(rounds):
        for way in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            found[way].append(way())
    return statistics.median(found[ours]), statistics.median(found[theirs])


def program(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "rlhf_trl", *arguments)


def commands(*_):
    trl = str(Path(sys.executable).with_name("trl"))
    own, other = alternate(lambda: spent(*program("--help"))["cpu"], lambda: spent(trl, "--help")["cpu"], 4)
    yield "`rlhf-trl --help`, CPU of `trl --help`", f"{own / other:.2f} ×", "2 ×", own <= 2 * other
    load = (sys.executable, "-c", "from trl import SFTConfig, RewardConfig, DPOConfig, GRPOConfig")
    own, other = alternate(lambda: spent(*program("validate"))["cpu"], lambda: spent(*load)["cpu"], 4)
    text = f"{own:.1f} s, the import of TRL's configs {other:.1f} s"
    yield "`rlhf-trl validate`, CPU", text, "import + 1 s", own <= other + 1


async def answer(reader, writer) -> None:
    """Serve verdicts after 100 ms each."""
    body = json.dumps(REPLY).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    while not reader.at_eof():
        try:
            lines = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:  # the client has closed
            break
        length = next(int(line[15:]) for line in lines.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        await asyncio.sleep(0.1)
        writer.write(head + body)


async def serve() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def judge(folder, _):
    from rlhf_trl.judge.client import Budget, OpenAIClient, Request, run_all
    from rlhf_trl.judge.replies import JudgeCache
    from rlhf_trl.recipe.schema import Price

    calls, workers, latency = 2000, 32, 0.1
    server = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
    requests = [Request(f"{n}", [{"role": "user", "content": f"pair {n} " + "x" * 2000}]) for n in range(calls)]
    start = time.perf_counter()
    with JudgeCache(folder / "replies.jsonl") as cache:

        def store(request, reply):
            line = {"key": request.key, "status": reply.status, "reply": reply.text, "usage": reply.usage}
            cache.append(line)

        client = OpenAIClient("model", api_key="EMPTY", base_url=address)
        asyncio.run(run_all(requests, client, workers, Budget(Price()), store))
    seconds, least = time.perf_counter() - start, calls * latency / workers
    server.kill()
    text = f"{seconds / least:.2f} × calls × latency / workers"
    yield f"judge, {calls:,} calls, {workers} workers, 100 ms latency", text, "1.2 ×", seconds <= 1.2 * least


def write_pairs(path: Path, size: int) -> None:
    """Write HH's rows over and over, each time with another number in front and five words replaced on both sides."""
    rows, draw = [], random.Random(0)
    for name in ("harmless-base", "helpful-base"):
        with gzip.open(SHARED / "hh-rlhf" / f"{name}.jsonl.gz", "rt") as file:
            rows += map(json.loads, file)
    words = [[*set(re.findall(r"\b[a-z]{4,}\b", row["chosen"]))] for row in rows]
    every = sorted(set().union(*words))
    with path.open("w") as file:
        for number in range(size):
            place = number % len(rows)
            chosen, rejected = (rows[place][side].replace("Human: ", f"Human: ({number}) ", 1)
                                for side in ("chosen", "rejected"))  # fmt: skip
            for word in draw.sample(words[place], min(5, len(words[place]))):
                other = draw.choice(every)
                chosen, rejected = chosen.replace(word, other), rejected.replace(word, other)
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")


def prepare(folder, model, sizes=(10_000, 20_000, 40_000)):
    found = {"explore": [], "prepare": []}
    for size in sizes:
        source, recipe = folder / f"{size}.jsonl", folder / f"{size}.yaml"
        write_pairs(source, size)
        stage = "stages: {rm: {trainer: reward, args: {max_length: 512}}}"
        recipe.write_text(f"name: n{size}\nmodel: {{model_name_or_path: {model}}}\ndata: {{source: {source}, "
                          f"max_length: 512, max_dropped_fraction: 1.0}}\n{stage}\n")  # fmt: skip
        for step, results in found.items():
            results.append(spent(*program(step, str(recipe), "--runs", str(folder / "runs"))))
            print(f"{step} of {size:,} pairs: {results[-1]}", flush=True)
        shutil.rmtree(folder / "runs")
        source.unlink()
    for step, results in found.items():
        _, two, four = results
        speed = (sizes[2] - sizes[1]) / (four["cpu"] - two["cpu"])
        walls, peaks = (" / ".join(f"{result[key]:.{digits}f}" for result in results)
                        for key, digits in (("wall", 0), ("gb", 2)))  # fmt: skip
        yield (
            f"`{step}` of {' / '.join(f'{size:,}' for size in sizes)} HH pairs",
            f"{speed:,.0f} rows a CPU second; {walls} s; peak of all processes {peaks} GB",
            "1,500 rows a CPU second; 2 GB, and constant",
            speed >= 1500 and four["gb"] <= min(2, 1.1 * two["gb"]),
        )


def report(folder, _):
    """The page of a run with 8 policies."""
    from report_fixtures import STAGES, write_run

    stages = {**STAGES, "dpo": {**STAGES["dpo"], "sweep": {"beta": [0.01, 0.03, 0.1, 0.2, 0.3]}}}
    results = []
    for prompts in (250, 500, 1000):
        recipe, _ = write_run(folder / f"of-{prompts}", stages, count=prompts, judge="good")
        path = folder / f"{prompts}.yaml"
        path.write_text(json.dumps(recipe.model_dump()))
        results.append(spent(*program("report", str(path), "--runs", str(folder))))
    seconds = [result["cpu"] for result in results]
    yield (
        "`report`, 250 / 500 / 1,000 prompts × 8 policies",
        f"{' / '.join(f'{value:.1f}' for value in seconds)} CPU s",
        "10 s",
        seconds[-1] <= 10,
    )


def million(folder, model):
    yield from prepare(folder, model, (250_000, 500_000, 1_000_000))


def steps(folder, model):
    """The step of our trainer and of TRL's, in one process and in turn, on the same batches."""
    from train.test_equal_losses import trl_trainer

    from rlhf_trl.data.preprocess import prepare as prepare_data
    from rlhf_trl.recipe.load import load_recipe
    from rlhf_trl.run.layout import RunDir
    from rlhf_trl.train.step import build_stage_config, build_trainer

    path = folder / "steps.yaml"
    path.write_text(f"""
name: steps
model: {{model_name_or_path: {model}, dtype: bfloat16, use_peft: true, lora_dropout: 0.0}}
data: {{source: {SHARED / "hh-rlhf"}, max_length: 256, max_rows: 400, max_dropped_fraction: 1.0}}
stages:
  rm: {{trainer: reward, args: {{max_length: 256, per_device_train_batch_size: 4, bf16: true}}}}
  dpo: {{trainer: dpo, args: {{max_length: 256, per_device_train_batch_size: 4, bf16: true}}}}
""")
    recipe = load_recipe(path)
    run = RunDir(folder / "steps")
    prepare_data(recipe, run)
    for stage in ("rm", "dpo"):
        ours = build_trainer(recipe, run, stage, build_stage_config(recipe, run, stage))
        theirs = trl_trainer(recipe, run, stage, build_stage_config(recipe, run, stage), ours)
        batches = {trainer: iter(trainer.get_train_dataloader()) for trainer in (ours, theirs)}

        def step(trainer, batches=batches):
            start = time.process_time()
            trainer.training_step(trainer.model, next(batches[trainer]))
            return time.process_time() - start

        for trainer in (ours, theirs):
            trainer.create_optimizer_and_scheduler(100)
            trainer.current_gradient_accumulation_steps = 1
            trainer.model.train()
            step(trainer)
        own, other = alternate(lambda: step(ours), lambda: step(theirs), 8)  # noqa: B023
        text, place = f"{own / other:.3f} × TRL's", "SmolLM2-135M's shape, bfloat16"
        yield f"a step of `{stage}`, {place}, CPU", text, "1.03 ×", own <= 1.03 * other


def reward(folder, model):
    """Reward training by the shipped recipe and with TRL's defaults: the same pairs, once, at one learning rate."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    from rlhf_trl.data.preprocess import prepare as prepare_data
    from rlhf_trl.models.rewards import RewardModel, measure_reward_model
    from rlhf_trl.recipe.load import load_recipe
    from rlhf_trl.run.files import read_jsonl
    from rlhf_trl.run.layout import RunDir
    from rlhf_trl.train.step import build_stage_config, build_trainer

    settings = {"model.model_name_or_path": model, "data.source": SHARED / "hh-rlhf", "data.subsets": "[]",
                "data.max_rows": 800, "data.test_fraction": 0.4, "stages.rm.args.save_strategy": "no"}  # fmt: skip
    overrides = [f"{key}={value}" for key, value in settings.items()]
    torch.set_num_threads(os.cpu_count())
    recipe, run = load_recipe(ROOT / "recipes" / "hh_smollm2_135m.yaml", overrides), RunDir(folder / "reward")
    prepare_data(recipe, run)
    ours = build_trainer(recipe, run, "rm", build_stage_config(recipe, run, "rm"))
    talk = lambda pair, side: [*pair["prompt"], {"role": "assistant", "content": pair[side]}]  # noqa: E731
    data = [{side: talk(pair, side) for side in ("chosen", "rejected")} for pair in read_jsonl(run.pairs("train"))]
    alike = ("num_train_epochs", "max_length", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
             "warmup_steps")  # fmt: skip
    args = trl.RewardConfig(str(folder / "trl"), use_cpu=True, report_to=[],
                            **{key: getattr(ours.args, key) for key in alike})  # fmt: skip
    lora = trl.ModelConfig(use_peft=True, lora_r=16, lora_target_modules="all-linear", lora_task_type="SEQ_CLS")
    theirs = trl.RewardTrainer(AutoModelForSequenceClassification.from_pretrained(model, num_labels=1), args=args,
                               train_dataset=Dataset.from_list(data), processing_class=ours.processing_class,
                               peft_config=trl.get_peft_config(lora))  # fmt: skip
    seconds, accuracy = [], []
    for trainer in (ours, theirs):
        start = time.process_time()
        trainer.train()
        seconds.append(time.process_time() - start)
        judged = measure_reward_model(
            RewardModel(trainer.model, ours.processing_class), read_jsonl(run.pairs("test")), 8
        )
        accuracy.append("{mean:.3f} [{low:.3f}, {high:.3f}]".format(**judged["accuracy"]))
        print(trainer.args.output_dir, seconds, accuracy, flush=True)
    ratio = seconds[0] / seconds[1]
    text = f"{ratio:.2f} × ({seconds[0]:.0f} s and {seconds[1]:.0f} s); held-out accuracy {' and '.join(accuracy)}"
    yield (
        f"reward training of SmolLM2-135M on {len(data)} HH pairs, CPU of TRL's defaults",
        text,
        "0.6 ×",
        ratio <= 0.6,
    )


def processes(folder, _):
    """Whole processes on the tiny model: `rlhf-trl train` beside a script with TRL's trainer."""
    recipe, runs = folder / "small.yaml", folder / "small"
    recipe.write_text(RECIPE.replace("max_steps: 4", "max_steps: 20"))
    without = [word for stage in ("grpo", "ppo", "rm") for word in ("--set", f"stages.{stage}=null")]
    options = ["--runs", str(runs), *without, "--set", "evaluation.reward=null"]
    for command in (("prepare", str(recipe)), ("train", str(recipe), "sft")):
        spent(*program(*command, *options))
    run = runs / "small"
    script = (sys.executable, "-c", TRL, str(run / "sft" / "model"), str(run / "data" / "tokenizer"),
              str(run / "data" / "train.jsonl"), str(folder / "trl"))  # fmt: skip

    def ours() -> float:
        subprocess.run(["rm", "-rf", str(run / "dpo")], check=True)
        return spent(*program("train", str(recipe), "dpo", *options))["cpu"]

    own, other = alternate(ours, lambda: spent(*script)["cpu"], 4)
    text = f"{own / other:.2f} × ({own:.1f} s and {other:.1f} s)"
    yield "a process of DPO, 20 steps of the tiny model, CPU, beside a script", text, "1.05 ×", own <= 1.05 * other


def ppo(_, model):
    for dtype, ratio in bench_ppo.main(model).items():
        memory = {"float32": 0.5, "bfloat16": 0.65}[dtype]
        yield (
            f"PPO, peak memory of stock, {dtype}",
            f"{ratio['peak_mb']:.3f} ×",
            f"{memory} ×",
            ratio["peak_mb"] <= memory,
        )
        seconds = ratio["seconds_per_update"]
        yield f"PPO, CPU of an update of stock, {dtype}", f"{seconds:.2f} ×", "0.9 ×", seconds <= 0.9


def tcmalloc(folder, model):
    """PPO and stock once more, both with another memory allocator than glibc's."""
    ctypes.CDLL(TCMALLOC)  # OSError where it is not installed: the loader would only warn
    with mock.patch.dict(os.environ, LD_PRELOAD=TCMALLOC):
        for what, *rest in ppo(folder, model):
            yield f"{what}, both with tcmalloc", *rest


def evaluate(_, model):
    ratio = bench_evaluate.main(model, 64, 32, 16)
    for key, what in (("seconds", "CPU"), ("peak_gb", "peak memory")):
        yield f"evaluation of 3 policies, {what} of the plain way", f"{ratio[key]:.2f} ×", "0.4 ×", ratio[key] <= 0.4


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        asyncio.run(serve())
    else:
        main()
