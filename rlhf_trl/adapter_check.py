"""`adapter check`: what is wrong with the folder of an adapter, whoever made it, before anything of it is loaded.

Reads the folder, and the headers of its base where that is given or shipped; writes nothing and imports no torch. A
file that is not known is not opened, and no tensor is read before the header of its file has been checked.

    rlhf-trl adapter check downloads/some-adapter --base models/some-base
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from rlhf_trl.adapter_shapes import check_base, check_tensors
from rlhf_trl.recipe import Problem, RecipeError, UserError
from rlhf_trl.weights import hash_file, hash_weights, read_header, read_weights

ADAPTER, CONFIG, LINEAGE = "adapter_model.safetensors", "adapter_config.json", "lineage.json"
TEMPLATE, BASE = "chat_template.jinja", "base"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.model", TEMPLATE)  # fmt: skip
KNOWN = {ADAPTER, CONFIG, LINEAGE, *TOKENIZER, "probe.json", "evidence.json", "README.md", "pareto.png",
         ".gitattributes"}  # fmt: skip
BASE_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
CODE = (".py", ".so", ".pyc", ".sh", ".dll", ".ipynb")
# Settings that make a loader import what they name.
IMPORTS = ("auto_mapping", "megatron_config", "auto_map")
MAX_JSON = 20_000_000
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FETCH = "do not load it; ask its author for a clean one"


class AdapterError(RecipeError):
    """Everything that is wrong with one adapter."""


def require_sound(folder: Path, base: Path | None = None) -> None:
    """Refuse an adapter with any problem.

    Args:
        base: the folder of its base; without it, the one that it ships, if it does.

    Raises:
        AdapterError: with every problem.
    """
    if problems := check_adapter(folder, base):
        raise AdapterError(problems)


def check_adapter(folder: Path, base: Path | None = None) -> list[Problem]:
    """Find everything that is wrong with an adapter; as `require_sound`.

    Raises:
        UserError: there is no such folder, or no such base.
    """
    for path in (folder, base):
        if path is not None and not path.is_dir():
            raise UserError(str(path), "there is no such folder", "give the folder of an adapter, or of its base")
    problems = list(_check_files(folder))
    if problems:
        return problems  # what is linked, packed or executable is not looked into
    documents: dict[str, dict[str, Any]] = {}
    for name in (CONFIG, LINEAGE, "tokenizer_config.json"):
        if (folder / name).exists():
            try:
                documents[name] = _read_object(folder / name)
            except UserError as error:
                problems += error.problems
    if CONFIG in documents:
        problems += _check_config(documents[CONFIG])
    if problems:
        return problems
    problems += _check_settings(folder, documents)
    try:
        tensors = read_header(folder / ADAPTER)
    except UserError as error:
        return problems + list(error.problems)
    config, lineage = documents[CONFIG], documents.get(LINEAGE)
    problems += check_tensors(config, tensors)
    base = base or (folder / BASE if (folder / BASE).is_dir() else None)
    if lineage is not None:
        problems += _check_lineage(folder, lineage)
    if base is not None and not problems:
        problems += _check_base(config, lineage, tensors, base)
        problems += _check_template(folder, lineage, base)
    return problems


def _check_files(folder: Path) -> Iterator[Problem]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            inside = path.resolve().is_relative_to(folder.resolve())
            where = "within the folder" if inside else "out of the folder"
            remedy = "fetch real files, such as with `hf download REPO --local-dir DIR`"
            yield Problem(name, f"a symbolic link {where}: what is loaded is not what lies here", remedy)
        elif path.is_dir():
            if name != BASE:
                yield Problem(name, "a folder that no adapter has", FETCH)
        elif not path.is_file():
            yield Problem(name, "is no ordinary file", FETCH)
        elif path.suffix.lower() in PICKLES:
            yield Problem(name, "a pickle, or a file that may hold one: loading it can run any code", FETCH)
        elif path.suffix.lower() in CODE:
            yield Problem(name, "a program; an adapter is numbers and settings", FETCH)
        elif not (name in KNOWN or (path.parent.name == BASE and BASE_FILES.fullmatch(path.name))):
            yield Problem(name, "a file that is no part of an adapter", "remove it, if you know what it is")
    for name in (CONFIG, ADAPTER):
        if not (folder / name).exists():
            yield Problem(name, "is missing", "fetch the adapter again")


def _read_object(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_JSON:
        raise UserError(file.name, f"is larger than {MAX_JSON / 1e6:.0f} MB", FETCH)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deep
        raise UserError(file.name, "is not JSON", "fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(file.name, "is not a JSON object", "fetch the file again")
    return value


def _check_config(config: dict[str, Any]) -> Iterator[Problem]:
    """Find what makes a configuration none of a LoRA adapter for text."""
    if config.get("peft_type") != "LORA":
        yield Problem(CONFIG, f"peft_type is {config.get('peft_type')!r}, not 'LORA'", "use a LoRA adapter")
    if config.get("task_type") not in ("CAUSAL_LM", "SEQ_CLS"):
        problem = f"task_type is {config.get('task_type')!r}: the adapter is of neither a policy nor a reward model"
        yield Problem(CONFIG, problem, "ask its author what it is for")
    targets = config.get("target_modules")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    ):
        yield Problem(CONFIG, "target_modules is neither a pattern nor a list of names", "fetch the adapter again")


def _check_settings(folder: Path, documents: dict[str, dict[str, Any]]) -> Iterator[Problem]:
    """Find what an adapter would have a loader import or open outside its folder."""
    config = documents[CONFIG]
    name = config.get("base_model_name_or_path")
    shipped = name == f"./{BASE}" and (folder / BASE).is_dir()
    if not shipped and (not isinstance(name, str) or is_path(name) or not _is_repository(name)):
        problem = f"base_model_name_or_path is {name!r}: a place on somebody's machine, not a public model"
        yield Problem(CONFIG, problem, "write the OWNER/NAME of the base there, and check with --base")
    for file, document in documents.items():
        for key in IMPORTS:
            if document.get(key):
                yield Problem(file, f"{key} makes the loader import code that the adapter names", FETCH)
    for key, value in documents.get("tokenizer_config.json", {}).items():
        if key.endswith(("_file", "_path")) and isinstance(value, str) and is_path(value):
            yield Problem("tokenizer_config.json", f"{key} is {value!r}, a place outside the folder", FETCH)


def is_path(text: str) -> bool:
    """Tell whether a text is the path of a file, on any system, or climbs out of a folder."""
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return absolute or text.startswith(("~", ".")) or "\\" in text or ".." in PurePosixPath(text).parts


def _is_repository(name: str) -> bool:
    return bool(REPOSITORY.fullmatch(name)) or bool(re.fullmatch(r"[\w-][\w.-]*", name))


def _check_lineage(folder: Path, lineage: dict[str, Any]) -> Iterator[Problem]:
    files, base = lineage.get("files"), lineage.get("base")
    if not isinstance(files, dict) or not isinstance(base, dict) or not {"id", "revision", "weights"} <= set(base):
        yield Problem(LINEAGE, "does not say what the base and the files are", "fetch the adapter again")
        return
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(set(files) - here):
        yield Problem(name, "is missing: the lineage names it", "fetch the adapter again")
    for name in sorted(set(files) & here):
        if hash_file(folder / name) != files[name]:
            what = "the weights are" if name == ADAPTER else "the chat template is" if name == TEMPLATE else "it is"
            yield Problem(name, f"{what} not what was exported: the hash in the lineage differs", FETCH)


def _check_base(
    config: dict[str, Any], lineage: dict[str, Any] | None, tensors: dict[str, Any], base: Path
) -> Iterator[Problem]:
    try:
        weights = read_weights(base)
    except UserError as error:
        yield from error.problems
        return
    settings = _read_object(base / "config.json") if (base / "config.json").exists() else {}
    # The shapes of quantised weights are those of their packing.
    shapes = [] if settings.get("quantization_config") else list(check_base(config, tensors, weights))
    yield from shapes
    if not shapes and lineage is not None and hash_weights(weights) != lineage["base"]["weights"]:
        problem = "the weights of this base are not those that the adapter was exported for, though their shapes fit"
        remedy = f"use {lineage['base']['id'] or 'the base that it ships'}, revision {lineage['base']['revision']}"
        yield Problem(str(base), problem, remedy)


def _check_template(folder: Path, lineage: dict[str, Any] | None, base: Path) -> Iterator[Problem]:
    """Compare the chat templates of an adapter without lineage and of its base: which one it was trained with is not
    known."""
    own, other = folder / TEMPLATE, base / TEMPLATE
    if lineage is None and own.exists() and other.exists() and hash_file(own) != hash_file(other):
        problem = "the chat template differs from that of the base, and nothing says which one it was trained with"
        yield Problem(TEMPLATE, problem, "ask its author, and remove the wrong one")
