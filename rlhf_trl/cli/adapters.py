"""The commands `adapter export, merge, check, push, list`, `chat` and `score`; each imports what it needs inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from rlhf_trl.cli.tables import show, table
from rlhf_trl.recipe.errors import UserError

adapter_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Share adapters: export, merge, check, push and list them."
)

FolderArg = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of an adapter.")]
BaseOption = Annotated[
    Optional[Path],  # noqa: UP045 (typer on Python 3.10)
    typer.Option("--base", metavar="PATH", help="A folder with the base, instead of the one that the adapter names."),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0, help="0 takes the most likely token.")]


@adapter_app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, such as runs/demo.")],
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="The name of a stage.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    base_id: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--base-id", metavar="ID", help="Public id of a base that the recipe knows by a path."),
    ] = None,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--revision", metavar="REV", help="Commit, branch or tag of --base-id."),
    ] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Ship the base with the adapter.")] = False,
) -> None:
    """Write a stage's adapter with its lineage, evidence and card. It is verified in a fresh process."""
    from rlhf_trl.adapters.export import export
    from rlhf_trl.run.layout import RunDir

    found = export(RunDir(run), stage, out, base_id, revision, with_base)["verification"]
    print(f"{out}: {found['outputs']} outputs of a fresh process equal the adapter's within {found['difference']:.2g}")


@adapter_app.command("merge")
def merge_command(
    folder: FolderArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    base: BaseOption = None,
) -> None:
    """Merge an adapter into its base, and compare the outputs. In full precision."""
    from rlhf_trl.adapters.merge import merge

    found = merge(folder, out, base)
    print(
        f"{out}: outputs equal the adapter's within {found['difference']:.2g}, at outputs up to {found['largest']:.3g}"
    )


@adapter_app.command("check")
def check_command(folder: FolderArg, base: BaseOption = None) -> None:
    """Find everything that is wrong with an adapter, without loading it."""
    from rlhf_trl.adapters.check import check_adapter

    problems = check_adapter(folder, base)
    for problem in problems:
        print(problem)
    if problems:
        raise typer.Exit(1)
    print(f"{folder}: no problem found")


@adapter_app.command("push")
def push_command(
    folder: FolderArg,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it, say what would be uploaded.")] = False,
) -> None:
    """Upload an export to a private repository of the Hub. Shows first what would go where."""
    from rlhf_trl.adapters.hub import plan, push

    upload = plan(folder, repository, public)
    for name, size in upload.files.items():
        print(f"{size:>14,}  {name}")
    whom = "private" if upload.private else "public: everybody can read it"
    print(f"{len(upload.files)} files, {sum(upload.files.values()) / 1e6:.1f} MB, to {repository} ({whom})")
    print(push(folder, upload) if yes else "nothing was uploaded; add --yes to do it")


@adapter_app.command("list")
def list_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that holds exports.")] = Path(),
) -> None:
    """Show the exports below a folder side by side."""
    from rlhf_trl.adapters.hub import list_exports

    rows = list_exports(folder)
    if not rows:
        print(f"{folder}: no export")
        return
    show(table([*rows[0]], [[*row.values()] for row in rows]))


def chat(
    folder: FolderArg,
    compare: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--compare", metavar="DIR", help="A second adapter, whose answers stand beside the first's."),
    ] = None,
    base: BaseOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed and talk give the same answers.")] = 0,
) -> None:
    """Talk to a policy, or to two side by side. A line is a turn, /new starts again, /exit ends."""
    from rlhf_trl.adapters.chat import Conversation
    from rlhf_trl.adapters.load import load_policy

    talks = {
        str(path): Conversation(load_policy(path, base), max_new_tokens, temperature, seed)
        for path in (folder, compare)
        if path is not None
    }
    shown = sys.stdin.isatty()
    while True:
        if shown:
            print("you> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip() == "/new":
            for talk in talks.values():
                talk.forget()
        elif line.strip():
            for name, talk in talks.items():
                print(f"{name}> {talk.reply(line.strip())}", flush=True)


def score(
    folder: FolderArg,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON lines of pairs, or of prompt and completion.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", metavar="FILE", help="Write the scores here instead of to the terminal."),
    ] = None,
    base: BaseOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts at once.")] = 16,
) -> None:
    """Score pairs or single answers with a reward adapter."""
    from rlhf_trl.adapters.load import load_reward_model
    from rlhf_trl.adapters.score import score_file, summarise
    from rlhf_trl.run.files import write_jsonl

    if not file.is_file():
        raise UserError(str(file), "there is no such file", "give a file of JSON lines")
    rows = score_file(load_reward_model(folder, base), file, batch_size)
    if out is None:
        for row in rows:
            print(json.dumps(row))
    else:
        write_jsonl(out, rows)
    print(summarise(rows), file=sys.stderr)
