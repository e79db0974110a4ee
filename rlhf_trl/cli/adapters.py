"""The commands `adapter export, merge, check, push, list`, `chat` and `score`; each imports what it needs inside."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from rlhf_trl.cli import options
from rlhf_trl.cli.tables import show, table
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import write_jsonl
from rlhf_trl.run.layout import RunDir
from rlhf_trl.text.display import visible

adapter_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Share adapters: export, merge, check, push and list them."
)


@adapter_app.command("export")
def export_command(
    run: Annotated[Path, Argument(metavar="RUN", help="The folder of a run, such as runs/demo.")],
    stage: Annotated[str, Argument(metavar="STAGE", help="The name of a stage.")],
    out: options.Out,
    base_id: Annotated[str | None, Option(metavar="ID", help="Public id of a base that is a path here.")] = None,
    revision: Annotated[str | None, Option(metavar="REV", help="Commit, branch or tag of --base-id.")] = None,
    with_base: Annotated[bool, Option("--with-base", help="Ship the base with the adapter.")] = False,
) -> None:
    """Write a stage's adapter with its lineage, evidence and card. It is verified in a fresh process."""
    from rlhf_trl.adapters.export import export

    check = export(RunDir(run), stage, out, base_id, revision, with_base)["verification"]
    print(f"{out}: {check['outputs']} outputs of a fresh process equal the adapter's within {check['difference']:.2g}")


@adapter_app.command("merge")
def merge_command(folder: options.Folder, out: options.Out, base: options.Base = None) -> None:
    """Merge an adapter into its base, and compare the outputs. In full precision."""
    from rlhf_trl.adapters.export import merge

    check = merge(folder, out, base)
    equal = f"outputs equal the adapter's within {check['difference']:.2g}"
    print(f"{out}: {equal}, at outputs up to {check['largest']:.3g}")


@adapter_app.command("check")
def check_command(folder: options.Folder, base: options.Base = None) -> None:
    """Find everything that is wrong with an adapter, without loading it."""
    from rlhf_trl.adapters.check import check_adapter, notes

    problems = check_adapter(folder, base)
    if problems:
        print(*problems, sep="\n")
        raise typer.Exit(1)
    print(f"{folder}: no problem found")
    for note in notes(folder):
        print(f"note: {note}")


@adapter_app.command("push")
def push_command(
    folder: options.Folder,
    repository: Annotated[str, Argument(metavar="REPO", help="OWNER/NAME on the Hub.")],
    public: Annotated[bool, Option("--public", help="Let everybody read it.")] = False,
    yes: Annotated[bool, Option("--yes", help="Upload; without it, say what would be uploaded.")] = False,
) -> None:
    """Upload an export to a private repository of the Hub. Shows first what would go where."""
    from rlhf_trl.adapters.hub import plan, push

    files = plan(folder, repository)
    for name, size in files.items():
        print(f"{size:>14,}  {name}")
    whom = "public: everybody can read it" if public else "private"
    print(f"{len(files)} files, {sum(files.values()) / 1e6:.1f} MB, to {repository} ({whom})")
    print(push(folder, repository, files, not public) if yes else "nothing was uploaded; add --yes to do it")


@adapter_app.command("list")
def list_command(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The folder that holds exports.")] = Path(),
) -> None:
    """Show the exports below a folder side by side."""
    from rlhf_trl.adapters.hub import COLUMNS, list_exports

    rows = list_exports(folder)
    show(table(COLUMNS, rows) if rows else f"{folder}: no export")


def chat(
    folder: options.Folder,
    compare: Annotated[Path | None, Option(metavar="DIR", help="Another adapter, to answer beside it.")] = None,
    base: options.Base = None,
    stage: options.Stage = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
) -> None:
    """Talk to a policy, or to two side by side. A line is a turn, /new starts again, /exit ends."""
    from rlhf_trl.adapters.load import load_policy

    policies = {str(folder): load_policy(folder, base, stage=stage)}
    policies |= {str(compare): load_policy(compare, base)} if compare else {}
    talks: dict[str, list[dict[str, str]]] = {name: [] for name in policies}
    while True:
        if sys.stdin.isatty():
            print("you> ", end="", flush=True)
        line = sys.stdin.readline()
        said = line.strip()
        if not line or said == "/exit":
            return
        for name, talk in talks.items():
            if said == "/new":
                talk.clear()
            elif said:
                talk.append({"role": "user", "content": said})
                reply = policies[name].answer(talk, max_new_tokens, temperature, seed)
                talk.append({"role": "assistant", "content": reply})
                print(f"{name}> {visible(reply)}", flush=True)


def answer(
    folder: options.Folder,
    file: options.File,
    out: Annotated[Path, Option(metavar="FILE", help="Where to write the answers.")],
    base: options.Base = None,
    stage: options.Stage = None,
    base_only: Annotated[bool, Option("--base-only", help="Answer without the adapter.")] = False,
    form: Annotated[str, Option("--format", help="Or alpaca_eval, arena_hard, mt_bench.")] = "jsonl",
    name: Annotated[str | None, Option(help="Of the model, in the answers; DIR's by default.")] = None,
    max_new_tokens: Annotated[int | None, Option(min=1, help="1024, or half of the positions of the model.")] = None,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 16,
) -> None:
    """Answer a file of prompts with a policy. A second start goes on where the first one ended."""
    from rlhf_trl.adapters.answer import FORMS, answer_file
    from rlhf_trl.adapters.load import load_policy
    from rlhf_trl.models.base import positions, prompt_room

    if form not in FORMS:
        raise UserError("--format", f"there is no format {form!r}", f"give one of: {', '.join(FORMS)}")
    policy = load_policy(folder, base, stage=stage)
    name = name or (stage or folder.resolve().name) + ("-base" if base_only else "")
    tokens = max_new_tokens or min(1024, (positions(policy.model) or 2048) // 2)
    prompt_room(policy.model, tokens)  # refused before anything is written
    with policy.without_adapter() if base_only else contextlib.nullcontext():
        done = answer_file(policy, file, out, form, name, batch_size, max_new_tokens=tokens,
                           temperature=temperature, seed=seed)  # fmt: skip
    print(f"{out}: {done['rows']} rows, {done['kept']} of them from an earlier start", file=sys.stderr)


def score(
    folder: options.Folder,
    file: options.File,
    out: Annotated[Path | None, Option(metavar="FILE", help="Write the scores here, not to the terminal.")] = None,
    base: options.Base = None,
    stage: options.Stage = None,
    batch_size: options.BatchSize = 16,
) -> None:
    """Score pairs or single answers with a reward adapter."""
    from rlhf_trl.adapters.load import load_reward_model
    from rlhf_trl.adapters.score import score_file, summarise

    rows = score_file(load_reward_model(folder, base, stage), file, batch_size)
    if out is not None:
        write_jsonl(out, rows)
    for row in rows if out is None else ():
        print(json.dumps(row))
    print(summarise(rows), file=sys.stderr)
