"""The files of an exported adapter: their names, and what is wrong with a folder by its listing alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_trl.recipe.errors import Problem, UserError

ADAPTER, CONFIG, LINEAGE = "adapter_model.safetensors", "adapter_config.json", "lineage.json"
EVIDENCE, PROBE, CARD, FIGURE, BASE = "evidence.json", "probe.json", "README.md", "pareto.png", "base"
BASE_CONFIG = f"{BASE}/config.json"
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
TOKENIZER = {"tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.model", TEMPLATE}  # fmt: skip
NOT_LISTED = {LINEAGE, ".gitattributes"}  # by a lineage; the Hub adds the second one to every repository
KNOWN = {ADAPTER, CONFIG, PROBE, EVIDENCE, CARD, FIGURE} | TOKENIZER | NOT_LISTED
BASE_FILES = re.compile(
    r"base/((config|generation_config|model\.safetensors\.index)\.json|model(-\d+-of-\d+)?\.safetensors)"
)
# Written by `hf download --local-dir`; ignored by every loader, and never uploaded.
DOWNLOAD = ".cache/huggingface"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Suffixes of files that are never opened.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
CODE = (".py", ".so", ".pyc", ".sh", ".dll", ".ipynb")
# Remedies.
AGAIN = "fetch the adapter again, or ask its author"
CLEAN = "do not load it; ask its author for a clean one"


def list_files(folder: Path) -> dict[str, Path]:
    """List the files of an adapter, without what a download has left beside them: name in the folder -> path."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if not name.startswith(f"{DOWNLOAD}/")}


def require_new(out: Path) -> None:
    """Refuse, by a UserError, to write over what is there; make the folder around it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "this is there already", "name a folder that does not exist")
    out.parent.mkdir(parents=True, exist_ok=True)


def check_files(folder: Path) -> Iterator[Problem]:
    """Find links, folders, programs, pickles and other files that no adapter has, and files that are missing."""
    for path in sorted(folder.rglob("*")):
        name, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
        if name.startswith(f"{DOWNLOAD}/"):
            continue
        if path.is_symlink():
            where = "within" if path.resolve().is_relative_to(folder.resolve()) else "out of"
            problem = f"a symbolic link {where} the folder: what is loaded is not what lies here"
            yield Problem(name, problem, "fetch real files, such as with `hf download REPO --local-dir DIR`")
        elif path.is_dir():
            if name not in (BASE, ".cache", DOWNLOAD):
                yield Problem(name, "a folder that no adapter has", CLEAN)
        elif not path.is_file():
            yield Problem(name, "is no ordinary file", CLEAN)
        elif suffix in PICKLES:
            yield Problem(name, "a pickle, or a file that may hold one: loading it can run any code", CLEAN)
        elif suffix in CODE:
            yield Problem(name, "a program; an adapter is numbers and settings", CLEAN)
        elif name not in KNOWN and not BASE_FILES.fullmatch(name):
            yield Problem(name, "a file that is no part of an adapter", "remove it, if you know what it is")
    yield from (Problem(name, "is missing", AGAIN) for name in (CONFIG, ADAPTER) if not (folder / name).exists())
