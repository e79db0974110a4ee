"""`adapter check`: find what is wrong with the folder of an adapter, whoever made it, before anything of it is loaded.

Reads the folder, and the headers of its base where that is given or shipped; writes nothing. A file that is not known
is not opened, and no tensor is read before the header of its file has been checked.

    rlhf-trl adapter check downloads/some-adapter --base models/some-base
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_trl.adapters import rules
from rlhf_trl.adapters.rules import IMPORTS, Tensors, check_settings
from rlhf_trl.recipe.errors import Problem, RecipeError, UserError
from rlhf_trl.recipe.fingerprint import hash_file
from rlhf_trl.run.layout import RunDir
from rlhf_trl.run.safetensors import hash_weights, is_finite, read_header, read_weights
from rlhf_trl.text.display import visible

# The files of an exported adapter.
ADAPTER, CONFIG, LINEAGE = "adapter_model.safetensors", "adapter_config.json", "lineage.json"
EVIDENCE, PROBE, CARD, FIGURE, BASE = "evidence.json", "probe.json", "README.md", "pareto.png", "base"
TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
TOKENIZER = {"tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.model", TEMPLATE}  # fmt: skip
NOT_LISTED = {LINEAGE, ".gitattributes"}  # by a lineage; the Hub adds the second one to every repository
BASE_CONFIG, BASE_INDEX = f"{BASE}/config.json", f"{BASE}/model.safetensors.index.json"
BASE_SETTINGS, BASE_SINGLE = f"{BASE}/generation_config.json", f"{BASE}/model.safetensors"
KNOWN = {ADAPTER, CONFIG, PROBE, EVIDENCE, CARD, FIGURE, BASE_CONFIG, BASE_INDEX, BASE_SETTINGS, BASE_SINGLE}
KNOWN |= TOKENIZER | NOT_LISTED
SHARD = re.compile(r"base/model-\d+-of-\d+\.safetensors")
# Written by `hf download --local-dir`; ignored by every loader, and never uploaded.
DOWNLOAD = ".cache/huggingface"
# Suffixes of files that are never opened -> what such a file is.
NEVER = dict.fromkeys((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"),
                      "a pickle, or a file that may hold one: loading it can run any code")  # fmt: skip
NEVER |= dict.fromkeys((".py", ".so", ".pyc", ".sh", ".dll", ".ipynb"), "a program, which no adapter needs")
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MODEL_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
PATH = re.compile(r"^[~.]|[/\\:]")  # on any system
RENDER = Path(__file__).with_name("render_program.py")
MAX_JSON = 20_000_000
# Remedies.
AGAIN = "fetch the adapter again, or ask its author"
CLEAN = "do not load it; ask its author for a clean one"
FETCH = "fetch real files, such as with `hf download REPO --local-dir DIR`"

Settings = dict[str, Any]


class AdapterError(RecipeError):
    """Everything that is wrong with one adapter."""


def require_sound(folder: Path, base: Path | None = None) -> None:
    """Refuse an adapter with any problem by an AdapterError that names them all; as `check_adapter`."""
    if problems := check_adapter(folder, base):
        raise AdapterError(problems)


def check_adapter(folder: Path, base: Path | None = None, here: bool = False) -> list[Problem]:
    """Find everything that is wrong with an adapter, and with its base: the given folder, or what it ships.

    One that was made `here`, on this machine, may name its base by a path. Every character of the adapter's that acts
    on a terminal is spelt out.
    """
    for path in (folder, base):
        if path is not None and not path.is_dir():
            raise UserError(str(path), "there is no such folder", "give the folder of an adapter, or of its base")
    if RunDir(folder).recipe.is_file() and not (folder / CONFIG).exists():
        remedy = "name a stage of it with --stage, or export one: rlhf-trl adapter export RUN STAGE OUT"
        raise UserError(str(folder), "is a run, and no adapter", remedy)
    problems: list[Problem] = []
    try:
        _collect(folder, base, problems, here)
    except UserError as error:  # of a file that cannot be read
        problems += error.problems
    lines = [[visible(text).replace("\n", " ") for text in (one.place, one.problem, one.remedy)] for one in problems]
    return [Problem(place, problem, remedy) for place, problem, remedy in lines]


def notes(folder: Path) -> list[str]:
    """Say what whoever uses a sound adapter should know of it."""
    return list(rules.notes(_read_objects(folder, (CONFIG,))[CONFIG], read_header(folder / ADAPTER)))


def list_files(folder: Path) -> dict[str, Path]:
    """List the files of an adapter, without what a download has left beside them: name in the folder -> path."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if not name.startswith(f"{DOWNLOAD}/")}


def run_isolated(program: Path, *arguments: str, given: str, **environment: str) -> str | None:
    """Run a program without the directory, PYTHONPATH and packages of the user; return its last words if it fails."""
    done = subprocess.run([sys.executable, "-I", str(program), *arguments], input=given, env=os.environ | environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    return (done.stderr.strip() or "it takes too long").splitlines()[-1] if done.returncode else None


def _collect(folder: Path, base: Path | None, problems: list[Problem], here: bool) -> None:
    problems += _check_files(folder)
    if problems:
        return  # what is linked, packed or executable is not looked into
    documents = _read_objects(folder, (CONFIG, LINEAGE, TOKENIZER_CONFIG))
    config, lineage = documents[CONFIG], documents.get(LINEAGE)
    problems += (Problem(CONFIG, text, CLEAN) for text in check_settings(config))
    if problems:
        return
    problems += _check_places(folder, documents, here)
    problems += _check_template(folder, documents.get(TOKENIZER_CONFIG, {}))
    tensors = read_header(folder / ADAPTER)
    problems += (Problem(ADAPTER, text, f"do not use it; {AGAIN}") for text in rules.check_tensors(config, tensors))
    if lineage is not None:
        problems += _check_lineage(folder, lineage)
    if (folder / BASE).is_dir():
        problems += _check_shipped(folder, config, lineage)
        base = base or folder / BASE
    if base is not None and not problems:
        problems += _check_against(folder, base, lineage, tensors)


def _check_files(folder: Path) -> Iterator[Problem]:
    """Find links, folders, programs, pickles and other files that no adapter has, and files that are missing."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(f"{DOWNLOAD}/"):
            continue
        if path.is_symlink():
            where = "within" if path.resolve().is_relative_to(folder.resolve()) else "out of"
            yield Problem(name, f"a symbolic link {where} the folder: what is loaded is not what lies here", FETCH)
        elif path.is_dir():
            if name not in (BASE, ".cache", DOWNLOAD):
                yield Problem(name, "a folder that no adapter has", CLEAN)
        elif not path.is_file():
            yield Problem(name, "is no ordinary file", CLEAN)
        elif path.suffix.lower() in NEVER:
            yield Problem(name, NEVER[path.suffix.lower()], CLEAN)
        elif name not in KNOWN and not SHARD.fullmatch(name):
            yield Problem(name, "a file that is no part of an adapter", "remove it, if you know what it is")
    yield from (Problem(name, "is missing", AGAIN) for name in (CONFIG, ADAPTER) if not (folder / name).exists())


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


def _check_places(folder: Path, documents: Mapping[str, Settings], here: bool) -> Iterator[Problem]:
    """Find what an adapter would have a loader import or open outside its folder."""
    name = documents[CONFIG].get("base_model_name_or_path")
    shipped = name == f"./{BASE}" and (folder / BASE).is_dir()
    if not (shipped or here) and not (isinstance(name, str) and MODEL_ID.fullmatch(name)):
        problem = f"base_model_name_or_path is {name!r}: a place on somebody's machine, not a public model"
        yield Problem(CONFIG, problem, "write the OWNER/NAME of the base there, and check with --base")
    yield from _check_imports(documents)
    for key, value in documents.get(TOKENIZER_CONFIG, {}).items():
        if key.endswith(("_file", "_path")) and isinstance(value, str) and PATH.search(value):
            yield Problem(TOKENIZER_CONFIG, f"{key} is {value!r}, a place outside the folder", CLEAN)


def _check_imports(documents: Mapping[str, Settings]) -> Iterator[Problem]:
    for file, document in documents.items():
        for key in dict.fromkeys(key for key, value in rules.walk(document) if key in IMPORTS and value):
            yield Problem(file, f"{key} makes the loader import code that the adapter names", CLEAN)


def _check_template(folder: Path, settings: Settings) -> Iterator[Problem]:
    """Render the chat template of a tokenizer once, in a process with limits on time and memory."""
    file = folder / TEMPLATE
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else None
    if (text is not None or settings.get("chat_template")) and (why := _render(json.dumps([text, settings]))):
        yield Problem(TEMPLATE, f"the chat template cannot be rendered: {why}", CLEAN)


@functools.cache  # an adapter is checked alone, then with its base; a merge loads it twice
def _render(given: str) -> str | None:
    return run_isolated(RENDER, given=given)


def _check_lineage(folder: Path, lineage: Settings) -> Iterator[Problem]:
    listed, base = lineage.get("files"), lineage.get("base")
    if not isinstance(listed, dict) or not isinstance(base, dict) or not {"id", "revision", "weights"} <= set(base):
        yield Problem(LINEAGE, "does not say what the base and the files are", AGAIN)
        return
    here = list_files(folder)
    for name in sorted(set(here) - set(listed) - NOT_LISTED):
        yield Problem(name, "is not in the lineage: it was not exported", CLEAN)
    for name, exported in sorted(listed.items()):
        if name not in here:
            yield Problem(name, "is missing: the lineage names it", AGAIN)
        elif hash_file(here[name]) != exported:
            yield Problem(name, "is not what was exported: its hash in the lineage differs", CLEAN)


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
    if BASE_CONFIG not in settings:
        yield Problem(BASE_CONFIG, "is missing", AGAIN)
    yield from _check_imports(settings)
    for file in settings:
        if settings[file].get("quantization_config") is not None:
            yield Problem(file, "quantization_config would have the loader rewrite the weights", CLEAN)
    files = sorted((folder / BASE).glob("*.safetensors"))
    weights = [(file.name, *one) for file in files for one in read_header(file).items()]
    index, places = settings.get(BASE_INDEX), {key: file for file, key, _ in weights}
    if (folder / BASE_SINGLE).exists():
        if index is not None or set(places.values()) != {Path(BASE_SINGLE).name}:
            yield Problem(BASE, "holds the weights in one file and in several: which are loaded is not known", CLEAN)
    elif index is None or len(places) < len(weights) or index.get("weight_map") != places:
        yield Problem(BASE_INDEX, "does not name the file of every tensor that lies beside it, and no other", AGAIN)
    for file, key, tensor in weights:
        if tensor.is_empty or not is_finite(tensor):
            yield Problem(f"{BASE}/{file}", f"the tensor {key} of the base is empty, or holds NaN or infinity", CLEAN)


def _check_against(folder: Path, base: Path, lineage: Settings | None, tensors: Tensors) -> Iterator[Problem]:
    """Check an adapter against its base: modules, the hash of the weights, and the chat template."""
    weights = read_weights(base)
    documents = _read_objects(base, ("config.json", TOKENIZER_CONFIG))
    settings = documents.get("config.json", {})
    if unsafe := [Problem(f"{base.name}/config.json", text, CLEAN) for text in rules.check_model(settings, weights)]:
        yield from unsafe
        return  # what is built from them could be of any size
    if not (folder / TOKENIZER_CONFIG).exists():
        yield from _check_template(base, documents.get(TOKENIZER_CONFIG, {}))
    if unfit := rules.check_base(folder, base, tensors):
        yield Problem(ADAPTER, unfit, f"use the base that it was trained on, or {AGAIN}")
    elif lineage is not None and hash_weights(weights) != lineage["base"]["weights"]:
        problem = "the weights of this base are not those that the adapter was exported for, though their shapes fit"
        remedy = f"use {lineage['base']['id'] or 'the base that it ships'}, revision {lineage['base']['revision']}"
        yield Problem(str(base), problem, remedy)
    own, other = folder / TEMPLATE, base / TEMPLATE
    if lineage is None and own.exists() and other.exists() and hash_file(own) != hash_file(other):
        problem = "the chat template differs from that of the base, and nothing says which one it was trained with"
        yield Problem(TEMPLATE, problem, "ask its author, and remove the wrong one")
