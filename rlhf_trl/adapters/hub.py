"""`adapter push` and `adapter list`: exports on the Hub, and on this machine.

rlhf-trl adapter push shared/demo-grpo me/demo-grpo          # says what would be uploaded
rlhf-trl adapter push shared/demo-grpo me/demo-grpo --yes    # uploads it to a private repository
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlhf_trl.adapters.check import BASE, EVIDENCE, LINEAGE, REPOSITORY, list_files, require_sound
from rlhf_trl.models.tokenizer import ABSENT
from rlhf_trl.recipe.errors import UserError
from rlhf_trl.run.files import read_json
from rlhf_trl.text.display import first_line, visible
from rlhf_trl.text.format import format_estimate

COLUMNS = ("folder", "run", "stage", "trainer", "base", "gain", "KL", "win rate", "accuracy", "MB")


def plan(folder: Path, repository: str) -> dict[str, int]:
    """Check an export and the repository's name; return the files that would be uploaded, and the bytes of each."""
    if not REPOSITORY.fullmatch(repository):
        raise UserError("REPO", f"{repository!r} is not the name of a repository", "give OWNER/NAME")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError("REPO", f"the Hub takes no such name: {first_line(error)}", "give OWNER/NAME") from error
    require_sound(folder)
    if not (folder / LINEAGE).exists():
        raise UserError(str(folder), "there is no lineage.json: it was not exported", "use `rlhf-trl adapter export`")
    return {name: file.stat().st_size for name, file in list_files(folder).items()}


def push(folder: Path, repository: str, files: Iterable[str], private: bool) -> str:
    """Upload what was planned, in one commit, and return its address.

    UserError where the upload fails, or the repository is there, and public though it is to be private."""
    api, message = HfApi(), f"Export of {read_json(folder / LINEAGE)['stage']}"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            problem = "the repository is there, and everybody can read it"
            raise UserError(repository, problem, "choose another name, or say --public")
        commit = api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(files),
                                   commit_message=message)  # fmt: skip
    except (*ABSENT, RuntimeError) as error:  # of the card, and of the storage, too
        problem = f"the upload failed: {' '.join(visible(str(error)).split())}"
        raise UserError(repository, problem, "check the network, and log in with `hf auth login`") from error
    return str(commit.commit_url)


def list_exports(folder: Path) -> list[list[str]]:
    """Describe the exports below a folder, a row of `COLUMNS` for each: what was not measured is empty, the `run` of
    one that is damaged is `unreadable`."""
    if not folder.is_dir():
        raise UserError(str(folder), "there is no such folder", "give the folder that holds exports")
    rows = []
    for export in sorted(path.parent for path in folder.rglob(LINEAGE) if (path.parent / EVIDENCE).exists()):
        name = export.relative_to(folder).as_posix()
        try:
            rows.append([visible(value) for value in (name, *_describe(export))])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # damaged, wherever
            rows.append([visible(name), "unreadable", *[""] * (len(COLUMNS) - 2)])
    return rows


def _describe(folder: Path) -> list[str]:
    lineage, evidence = read_json(folder / LINEAGE), read_json(folder / EVIDENCE)
    policy, judge, analysis = evidence.get("policy") or {}, evidence.get("judge"), evidence.get("analysis")
    gain = next((key for key in ("gold_gain", "reward_gain") if key in policy), None)
    return [
        *(lineage[key] for key in ("run", "stage", "trainer")),
        lineage["base"]["id"] or f"{BASE}/",
        f"{_print(policy[gain], '+')} {gain.partition('_')[0]}" if gain else "",
        _print(policy.get("kl")),
        _print(judge["rate"]["win_rate"] if judge else None, percent=True),
        _print(analysis["overall"]["accuracy"] if analysis else None, percent=True),
        f"{sum(file.stat().st_size for file in list_files(folder).values()) / 1e6:.1f}",
    ]


def _print(estimate: Mapping[str, Any] | None, sign: str = "", percent: bool = False) -> str:
    return format_estimate(estimate, sign, percent) if estimate and estimate["mean"] is not None else ""
