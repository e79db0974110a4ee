"""`adapter check`: find what is wrong with the folder of an adapter, whoever made it, before anything of it is loaded.

Reads the folder, and the headers of its base where that is given or shipped; writes nothing and imports no torch. A
file that is not known is not opened, and no tensor is read before the header of its file has been checked.

    rlhf-trl adapter check downloads/some-adapter --base models/some-base
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from rlhf_trl.adapters import files, rules
from rlhf_trl.adapters.files import AGAIN, BASE, BASE_CONFIG, CLEAN
from rlhf_trl.adapters.rules import Tensors, check_base, check_model, check_tensors
from rlhf_trl.adapters.settings import IMPORTS, check_settings
from rlhf_trl.recipe.errors import Problem, RecipeError, UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.safetensors import hash_weights, is_finite, read_header, read_weights
from rlhf_trl.text.display import visible

BASE_SETTINGS = f"{BASE}/generation_config.json"
BASE_SINGLE, BASE_INDEX = f"{BASE}/model.safetensors", f"{BASE}/model.safetensors.index.json"
RENDER = Path(__file__).with_name("render_program.py")
MODEL_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
MAX_JSON = 20_000_000

Settings = dict[str, Any]


class AdapterError(RecipeError):
    """Everything that is wrong with one adapter."""


def require_sound(folder: Path, base: Path | None = None) -> None:
    """Refuse an adapter with any problem by an AdapterError that names them all; as `check_adapter`."""
    if problems := check_adapter(folder, base):
        raise AdapterError(problems)


def check_adapter(folder: Path, base: Path | None = None) -> list[Problem]:
    """Find everything that is wrong with an adapter.

    Args:
        base: the folder of its base; without it, the one that it ships, if it does.

    Returns:
        The problems, with every character of the adapter's that acts on a terminal spelt out.
    """
    for path in (folder, base):
        if path is not None and not path.is_dir():
            raise UserError(str(path), "there is no such folder", "give the folder of an adapter, or of its base")
    problems: list[Problem] = []
    try:
        _collect(folder, base, problems)
    except UserError as error:  # of a file that cannot be read
        problems += error.problems
    lines = [[visible(text).replace("\n", " ") for text in (one.place, one.problem, one.remedy)] for one in problems]
    return [Problem(place, problem, remedy) for place, problem, remedy in lines]


def notes(folder: Path) -> list[str]:
    """Say what whoever uses a sound adapter should know of it."""
    config, tensors = _read_objects(folder, (files.CONFIG,))[files.CONFIG], read_header(folder / files.ADAPTER)
    return list(rules.notes(config, tensors))


def _collect(folder: Path, base: Path | None, problems: list[Problem]) -> None:
    problems += files.check_files(folder)
    if problems:
        return  # what is linked, packed or executable is not looked into
    documents = _read_objects(folder, (files.CONFIG, files.LINEAGE, files.TOKENIZER_CONFIG))
    config, lineage = documents[files.CONFIG], documents.get(files.LINEAGE)
    problems += (Problem(files.CONFIG, text, CLEAN) for text in check_settings(config))
    if problems:
        return
    problems += _check_places(folder, documents)
    problems += _check_template(folder, documents.get(files.TOKENIZER_CONFIG, {}))
    tensors = read_header(folder / files.ADAPTER)
    problems += (Problem(files.ADAPTER, text, f"do not use it; {AGAIN}") for text in check_tensors(config, tensors))
    if lineage is not None:
        problems += _check_lineage(folder, lineage)
    if (folder / BASE).is_dir():
        problems += _check_shipped(folder, config, lineage)
        base = base or folder / BASE
    if base is not None and not problems:
        problems += _check_against(folder, base, config, lineage, tensors)


def _read_objects(folder: Path, names: Iterable[str]) -> dict[str, Settings]:
    """Read those JSON files of a folder that are there: name -> content. Raises UserError where one is none."""
    objects = {}
    for name in names:
        if (folder / name).exists():
            if (folder / name).stat().st_size > MAX_JSON:
                raise UserError(name, f"is larger than {MAX_JSON / 1e6:.0f} MB", CLEAN)
            try:
                objects[name] = json.loads((folder / name).read_text(encoding="utf-8"))
            except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested too deep
                raise UserError(name, "is not JSON", AGAIN) from None
            if not isinstance(objects[name], dict):
                raise UserError(name, "is not a JSON object", AGAIN)
    return objects


def _check_places(folder: Path, documents: dict[str, Settings]) -> Iterator[Problem]:
    """Find what an adapter would have a loader import or open outside its folder."""
    name = documents[files.CONFIG].get("base_model_name_or_path")
    shipped = name == f"./{BASE}" and (folder / BASE).is_dir()
    if not shipped and (not isinstance(name, str) or is_path(name) or not MODEL_ID.fullmatch(name)):
        problem = f"base_model_name_or_path is {name!r}: a place on somebody's machine, not a public model"
        yield Problem(files.CONFIG, problem, "write the OWNER/NAME of the base there, and check with --base")
    yield from _check_imports(documents)
    for key, value in documents.get(files.TOKENIZER_CONFIG, {}).items():
        if key.endswith(("_file", "_path")) and isinstance(value, str) and is_path(value):
            yield Problem(files.TOKENIZER_CONFIG, f"{key} is {value!r}, a place outside the folder", CLEAN)


def _check_template(folder: Path, settings: Settings) -> Iterator[Problem]:
    """Render the chat template of a tokenizer once, in a process with limits on time and memory."""
    file = folder / files.TEMPLATE
    if not file.exists() and not settings.get("chat_template"):
        return
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else None
    if why := _render(json.dumps({"text": text, "settings": settings})):
        yield Problem(files.TEMPLATE, f"the chat template cannot be rendered: {why}", CLEAN)


@functools.cache  # an adapter is checked alone, then with its base; a merge loads it twice
def _render(given: str) -> str | None:
    done = subprocess.run(
        [sys.executable, "-I", str(RENDER)], input=given, capture_output=True, text=True, check=False
    )
    return (done.stderr.strip() or "it takes too long").splitlines()[-1] if done.returncode else None


def _check_imports(documents: dict[str, Settings]) -> Iterator[Problem]:
    for file, document in documents.items():
        for key in dict.fromkeys(key for key, value in rules.walk(document) if key in IMPORTS and value):
            yield Problem(file, f"{key} makes the loader import code that the adapter names", CLEAN)


def is_path(text: str) -> bool:
    """Tell whether a text is the path of a file, on any system, or climbs out of a folder."""
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return absolute or text.startswith(("~", ".")) or "\\" in text or ".." in PurePosixPath(text).parts


def _check_lineage(folder: Path, lineage: Settings) -> Iterator[Problem]:
    listed, base = lineage.get("files"), lineage.get("base")
    if not isinstance(listed, dict) or not isinstance(base, dict) or not {"id", "revision", "weights"} <= set(base):
        yield Problem(files.LINEAGE, "does not say what the base and the files are", AGAIN)
        return
    here = files.list_files(folder)
    for name in sorted(set(here) - set(listed) - files.NOT_LISTED):
        yield Problem(name, "is not in the lineage: it was not exported", CLEAN)
    for name, exported in sorted(listed.items()):
        if name not in here:
            yield Problem(name, "is missing: the lineage names it", AGAIN)
        elif hash_file(here[name]) != exported:
            what = {files.ADAPTER: "the weights are", files.TEMPLATE: "the chat template is"}.get(name, "it is")
            yield Problem(name, f"{what} not what was exported: the hash in the lineage differs", CLEAN)


def _check_shipped(folder: Path, config: Settings, lineage: Settings | None) -> Iterator[Problem]:
    """Find what is wrong with a base that lies in the folder: whoever made the adapter has made it too."""
    name, said = config.get("base_model_name_or_path"), (lineage or {}).get("base")
    if name != f"./{BASE}":
        yield Problem(BASE, f"a model lies here, and the adapter's base is {name!r}", "remove it")
        return
    if lineage is not None and not (isinstance(said, dict) and said.get("shipped") is True):
        yield Problem(BASE, "a model lies here, and the lineage does not say that the base is shipped", CLEAN)
        return
    settings = _read_objects(folder, (BASE_CONFIG, BASE_SETTINGS, BASE_INDEX))
    weights = {f"{BASE}/{file.name}": read_header(file) for file in sorted((folder / BASE).glob("*.safetensors"))}
    if BASE_CONFIG not in settings:
        yield Problem(BASE_CONFIG, "is missing", AGAIN)
    yield from _check_imports(settings)
    for file in settings:
        if settings[file].get("quantization_config") is not None:
            yield Problem(file, "quantization_config would have the loader rewrite the weights", CLEAN)
    index, held = settings.get(BASE_INDEX), [(key, file) for file, tensors in weights.items() for key in tensors]
    places = {key: file.removeprefix(f"{BASE}/") for key, file in held}
    if BASE_SINGLE in weights:
        if len(weights) > 1 or index is not None:
            yield Problem(BASE, "holds the weights in one file and in several: which are loaded is not known", CLEAN)
    elif index is None or len(places) < len(held) or index.get("weight_map") != places:
        yield Problem(BASE_INDEX, "does not name the file of every tensor that lies beside it, and no other", AGAIN)
    for key, file in held:
        if weights[file][key].is_empty or not is_finite(weights[file][key]):
            what = "is empty" if weights[file][key].is_empty else "holds NaN or infinity"
            yield Problem(file, f"the tensor {key} of the base {what}", CLEAN)


def _check_against(
    folder: Path, base: Path, config: Settings, lineage: Settings | None, tensors: Tensors
) -> Iterator[Problem]:
    """Check an adapter against its base: shapes, the hash of the weights, and the chat template."""
    weights = read_weights(base)
    settings = _read_objects(base, ("config.json",)).get("config.json", {})
    packed = settings.get("quantization_config")
    yield from (Problem(f"{base.name}/config.json", text, CLEAN) for text in check_model(settings, weights))
    if not (folder / files.TOKENIZER_CONFIG).exists():
        yield from _check_template(
            base, _read_objects(base, (files.TOKENIZER_CONFIG,)).get(files.TOKENIZER_CONFIG, {})
        )
    # The shapes of quantised weights are those of their packing.
    if unfit := None if packed else next(check_base(config, tensors, weights), None):
        yield Problem(files.ADAPTER, unfit, f"use the base that it was trained on, or {AGAIN}")
    elif lineage is not None and hash_weights(weights) != lineage["base"]["weights"]:
        problem = "the weights of this base are not those that the adapter was exported for, though their shapes fit"
        remedy = f"use {lineage['base']['id'] or 'the base that it ships'}, revision {lineage['base']['revision']}"
        yield Problem(str(base), problem, remedy)
    own, other = folder / files.TEMPLATE, base / files.TEMPLATE
    if lineage is None and own.exists() and other.exists() and hash_file(own) != hash_file(other):
        problem = "the chat template differs from that of the base, and nothing says which one it was trained with"
        yield Problem(files.TEMPLATE, problem, "ask its author, and remove the wrong one")
