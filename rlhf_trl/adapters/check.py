"""`adapter check`: find what is wrong with the folder of an adapter, whoever made it, before anything of it is loaded.

Reads the folder, and the headers of its base where that is given or shipped; writes nothing and imports no torch. A
file that is not known is not opened, and no tensor is read before the header of its file has been checked.

    rlhf-trl adapter check downloads/some-adapter --base models/some-base
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_trl.adapters.files import (
    ADAPTER,
    BASE,
    BASE_CONFIG,
    BASE_FILES,
    BASE_GENERATION,
    BASE_INDEX,
    BASE_SINGLE,
    CONFIG,
    DOWNLOAD,
    KNOWN,
    LINEAGE,
    NOT_LISTED,
    TEMPLATE,
    TOKENIZER_CONFIG,
    list_files,
)
from rlhf_trl.adapters.settings import AGAIN, FETCH, check_config, check_imports, check_settings
from rlhf_trl.adapters.shapes import check_base, check_tensors
from rlhf_trl.recipe.errors import Problem, RecipeError, UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.safetensors import Tensor, hash_weights, is_finite, read_header, read_weights
from rlhf_trl.text.display import visible

# Suffixes of files that are never opened, and why.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
CODE = (".py", ".so", ".pyc", ".sh", ".dll", ".ipynb")
FORBIDDEN = {
    **dict.fromkeys(PICKLES, "a pickle, or a file that may hold one: loading it can run any code"),
    **dict.fromkeys(CODE, "a program; an adapter is numbers and settings"),
}
MAX_JSON = 20_000_000


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

    Returns:
        The problems, with every character of the adapter's that acts on a terminal spelt out.

    Raises:
        UserError: there is no such folder, or no such base.
    """
    for path in (folder, base):
        if path is not None and not path.is_dir():
            raise UserError(str(path), "there is no such folder", "give the folder of an adapter, or of its base")
    problems = [(found.place, found.problem, found.remedy) for found in _check(folder, base)]
    lines = [[visible(part).replace("\n", " ") for part in parts] for parts in problems]
    return [Problem(place, problem, remedy) for place, problem, remedy in lines]


def _check(folder: Path, base: Path | None) -> list[Problem]:
    problems = list(_check_files(folder))
    if problems:
        return problems  # what is linked, packed or executable is not looked into
    documents: dict[str, dict[str, Any]] = {}
    for name in (CONFIG, LINEAGE, TOKENIZER_CONFIG):
        if (folder / name).exists():
            try:
                documents[name] = _read_object(folder / name)
            except UserError as error:
                problems += error.problems
    if CONFIG in documents:
        problems += check_config(documents[CONFIG])
    if problems:
        return problems
    problems += check_settings(folder, documents)
    try:
        tensors = read_header(folder / ADAPTER)
    except UserError as error:
        return problems + list(error.problems)
    config, lineage = documents[CONFIG], documents.get(LINEAGE)
    problems += check_tensors(config, tensors)
    if lineage is not None:
        problems += _check_lineage(folder, lineage)
    if (folder / BASE).is_dir():
        problems += _check_shipped(folder, config, lineage)
        base = base or folder / BASE
    if base is not None and not problems:
        problems += _check_base(config, lineage, tensors, base)
        problems += _check_template(folder, lineage, base)
    return problems


def _check_files(folder: Path) -> Iterator[Problem]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(f"{DOWNLOAD}/"):
            continue
        if path.is_symlink():
            inside = path.resolve().is_relative_to(folder.resolve())
            where = "within the folder" if inside else "out of the folder"
            remedy = "fetch real files, such as with `hf download REPO --local-dir DIR`"
            yield Problem(name, f"a symbolic link {where}: what is loaded is not what lies here", remedy)
        elif path.is_dir():
            if name not in (BASE, ".cache", DOWNLOAD):
                yield Problem(name, "a folder that no adapter has", FETCH)
        elif not path.is_file():
            yield Problem(name, "is no ordinary file", FETCH)
        elif (suffix := path.suffix.lower()) in FORBIDDEN:
            yield Problem(name, FORBIDDEN[suffix], FETCH)
        elif name not in KNOWN and not BASE_FILES.fullmatch(name):
            yield Problem(name, "a file that is no part of an adapter", "remove it, if you know what it is")
    for name in (CONFIG, ADAPTER):
        if not (folder / name).exists():
            yield Problem(name, "is missing", AGAIN)


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


def _check_lineage(folder: Path, lineage: dict[str, Any]) -> Iterator[Problem]:
    files, base = lineage.get("files"), lineage.get("base")
    if not isinstance(files, dict) or not isinstance(base, dict) or not {"id", "revision", "weights"} <= set(base):
        yield Problem(LINEAGE, "does not say what the base and the files are", AGAIN)
        return
    here = {path.relative_to(folder).as_posix() for path in list_files(folder)}
    for name in sorted(here - set(files) - NOT_LISTED):
        yield Problem(name, "is not in the lineage: it was not exported", FETCH)
    for name in sorted(set(files) - here):
        yield Problem(name, "is missing: the lineage names it", AGAIN)
    for name in sorted(set(files) & here):
        if hash_file(folder / name) != files[name]:
            what = "the weights are" if name == ADAPTER else "the chat template is" if name == TEMPLATE else "it is"
            yield Problem(name, f"{what} not what was exported: the hash in the lineage differs", FETCH)


def _check_shipped(folder: Path, config: dict[str, Any], lineage: dict[str, Any] | None) -> Iterator[Problem]:
    """Find what is wrong with a base that lies in the folder: whoever made the adapter has made it too."""
    name = config.get("base_model_name_or_path")
    if name != f"./{BASE}":
        yield Problem(BASE, f"a model lies here, and the adapter's base is {name!r}", "remove it")
        return
    if lineage is not None and not (isinstance(lineage.get("base"), dict) and lineage["base"].get("shipped") is True):
        yield Problem(BASE, "a model lies here, and the lineage does not say that the base is shipped", FETCH)
        return
    try:
        settings = {
            file: _read_object(folder / file)
            for file in (BASE_CONFIG, BASE_GENERATION, BASE_INDEX)
            if (folder / file).exists()
        }
        files = {f"{BASE}/{file.name}": read_header(file) for file in sorted((folder / BASE).glob("*.safetensors"))}
    except UserError as error:
        yield from error.problems
        return
    if BASE_CONFIG not in settings:
        yield Problem(BASE_CONFIG, "is missing", AGAIN)
    for file, document in settings.items():
        yield from check_imports(file, document)
        if document.get("quantization_config") is not None:
            yield Problem(file, "quantization_config would have the loader rewrite the weights", FETCH)
    yield from _check_shards(files, settings.get(BASE_INDEX))
    for file, tensors in files.items():
        for key, tensor in tensors.items():
            if tensor.is_empty or not is_finite(tensor):
                what = "is empty" if tensor.is_empty else "holds NaN or infinity"
                yield Problem(file, f"the tensor {key} of the base {what}", FETCH)


def _check_shards(files: dict[str, dict[str, Tensor]], index: dict[str, Any] | None) -> Iterator[Problem]:
    """Find weights that one loader would read and another would not.

    Args:
        files: path of each file of weights -> what it holds.
    """
    if BASE_SINGLE in files:
        if len(files) > 1 or index is not None:
            yield Problem(BASE, "holds the weights in one file and in several: which are loaded is not known", FETCH)
        return
    held = [(key, file.removeprefix(f"{BASE}/")) for file, tensors in files.items() for key in tensors]
    if index is None or len(dict(held)) < len(held) or index.get("weight_map") != dict(held):
        problem = "does not name the file of every tensor that lies beside it, and no other"
        yield Problem(BASE_INDEX, problem, AGAIN)


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
