"""`adapter check`: what is wrong with the folder of an adapter, whoever made it, before anything of it is loaded.

Reads the folder, and the headers of its base where that is given or shipped; writes nothing and imports no torch. A
file that is not known is not opened, and no tensor is read before the header of its file has been checked.

    rlhf-trl adapter check downloads/some-adapter --base models/some-base
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from rlhf_trl.adapters.shapes import ADAPTER as ADAPTER
from rlhf_trl.adapters.shapes import check_base, check_tensors
from rlhf_trl.recipe.errors import Problem, RecipeError, UserError
from rlhf_trl.run.safetensors import Tensor, hash_file, hash_weights, is_finite, read_header, read_weights
from rlhf_trl.text.display import visible

# The files of an export.
CONFIG, LINEAGE, EVIDENCE, PROBE = "adapter_config.json", "lineage.json", "evidence.json", "probe.json"
CARD, FIGURE, TEMPLATE, BASE = "README.md", "pareto.png", "chat_template.jinja", "base"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.model", TEMPLATE)  # fmt: skip
KNOWN = {ADAPTER, CONFIG, LINEAGE, *TOKENIZER, PROBE, EVIDENCE, CARD, FIGURE,
         ".gitattributes"}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BASE_FILES = re.compile(
    r"base/(config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)"
)
# What `hf download --local-dir` leaves beside the files; nothing of it is loaded, or uploaded.
DOWNLOAD = ".cache/huggingface"
# What an export does not list of itself; the Hub adds the second one to every repository.
NOT_LISTED = {LINEAGE, ".gitattributes"}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
CODE = (".py", ".so", ".pyc", ".sh", ".dll", ".ipynb")
# Settings that make a loader import what they name.
IMPORTS = ("auto_mapping", "megatron_config", "auto_map")
# Settings that change the base when an adapter is loaded.
CHANGES = {"layer_replication": "repeats layers of", "kasa_config": "cuts off small singular values of"}
MAX_JSON = 20_000_000
MAX_RANK = 4096
# What `peft` saves whole for a classifier, under either name.
HEADS = {"score", "classifier"}
REVISION = re.compile(r"\w[\w./-]*")
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

    Returns:
        The problems, with every character of the adapter's that acts on a terminal spelt out.

    Raises:
        UserError: there is no such folder, or no such base.
    """
    for path in (folder, base):
        if path is not None and not path.is_dir():
            raise UserError(str(path), "there is no such folder", "give the folder of an adapter, or of its base")
    return [Problem(*(visible(part).replace("\n", " ") for part in problem)) for problem in _check(folder, base)]


def list_files(folder: Path) -> list[Path]:
    """List the files of an adapter, without those that a download has left beside them."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if not path.relative_to(folder).as_posix().startswith(f"{DOWNLOAD}/")]


def _check(folder: Path, base: Path | None) -> list[Problem]:
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
        elif path.suffix.lower() in PICKLES:
            yield Problem(name, "a pickle, or a file that may hold one: loading it can run any code", FETCH)
        elif path.suffix.lower() in CODE:
            yield Problem(name, "a program; an adapter is numbers and settings", FETCH)
        elif name not in KNOWN and not BASE_FILES.fullmatch(name):
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
    yield from _check_types(config)
    if config.get("bias") != "none":
        yield Problem(CONFIG, f"bias is {config.get('bias')!r}: it would replace biases of the base", FETCH)
    if not keeps_base(config.get("init_lora_weights", True)):
        problem = f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base when it is loaded"
        yield Problem(CONFIG, problem, "ask its author for plain LoRA weights")
    for key, what in CHANGES.items():
        if config.get(key) is not None:
            yield Problem(CONFIG, f"{key} {what} the base", "ask its author for plain LoRA weights")
    whole = config.get("modules_to_save") or []
    heads = HEADS if config.get("task_type") == "SEQ_CLS" else set()
    if not isinstance(whole, list) or any(name not in heads for name in map(str, whole)):
        problem = f"modules_to_save is {whole!r}: an adapter may replace no module of its base but the reward head"
        yield Problem(CONFIG, problem, FETCH)


def keeps_base(start: Any) -> bool:
    """Tell whether LoRA that starts so (`init_lora_weights`) leaves the weights of its base as they are; others,
    such as PiSSA, change them when an adapter is loaded."""
    return start in (True, False, "gaussian") and type(start) in (bool, str)


def _check_types(config: dict[str, Any]) -> Iterator[Problem]:
    """Find numbers and patterns that are none."""
    wrong = []
    if not _is_rank(config.get("r")):
        wrong.append(("r", f"a whole number from 1 to {MAX_RANK}"))
    if not _is_number(config.get("lora_alpha")):
        wrong.append(("lora_alpha", "a finite number"))
    if not _is_pattern(config.get("rank_pattern", {}), _is_rank):
        wrong.append(("rank_pattern", f"names with whole numbers from 1 to {MAX_RANK}"))
    if not _is_pattern(config.get("alpha_pattern", {}), _is_number):
        wrong.append(("alpha_pattern", "names with finite numbers"))
    revision = config.get("revision")
    if revision is not None and not (
        isinstance(revision, str) and REVISION.fullmatch(revision) and ".." not in revision
    ):
        wrong.append(("revision", "a branch, a tag or a commit"))
    for key, what in wrong:
        yield Problem(CONFIG, f"{key} is {config.get(key)!r}, not {what}", "fetch the adapter again")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK  # `true` is no number


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    if not isinstance(value, dict) or not all(map(is_right, value.values())):
        return False
    try:
        for key in value:
            re.compile(key)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _check_settings(folder: Path, documents: dict[str, dict[str, Any]]) -> Iterator[Problem]:
    """Find what an adapter would have a loader import or open outside its folder."""
    config = documents[CONFIG]
    name = config.get("base_model_name_or_path")
    shipped = name == f"./{BASE}" and (folder / BASE).is_dir()
    if not shipped and (not isinstance(name, str) or is_path(name) or not _is_repository(name)):
        problem = f"base_model_name_or_path is {name!r}: a place on somebody's machine, not a public model"
        yield Problem(CONFIG, problem, "write the OWNER/NAME of the base there, and check with --base")
    for file, document in documents.items():
        yield from _check_imports(file, document)
    for key, value in documents.get("tokenizer_config.json", {}).items():
        if key.endswith(("_file", "_path")) and isinstance(value, str) and is_path(value):
            yield Problem("tokenizer_config.json", f"{key} is {value!r}, a place outside the folder", FETCH)


def _check_imports(file: str, document: dict[str, Any]) -> Iterator[Problem]:
    for key in IMPORTS:
        if document.get(key):
            yield Problem(file, f"{key} makes the loader import code that the adapter names", FETCH)


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
    here = {path.relative_to(folder).as_posix() for path in list_files(folder)}
    for name in sorted(here - set(files) - NOT_LISTED):
        yield Problem(name, "is not in the lineage: it was not exported", FETCH)
    for name in sorted(set(files) - here):
        yield Problem(name, "is missing: the lineage names it", "fetch the adapter again")
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
        found = {
            file: _read_object(folder / file)
            for file in (f"{BASE}/config.json", f"{BASE}/generation_config.json", f"{BASE}/{INDEX}")
            if (folder / file).exists()
        }
        files = {file.name: read_header(file) for file in sorted((folder / BASE).glob("*.safetensors"))}
    except UserError as error:
        yield from error.problems
        return
    if f"{BASE}/config.json" not in found:
        yield Problem(f"{BASE}/config.json", "is missing", "fetch the adapter again")
    for file, document in found.items():
        yield from _check_imports(file, document)
        if document.get("quantization_config") is not None:
            yield Problem(file, "quantization_config would have the loader rewrite the weights", FETCH)
    yield from _check_shards(files, found.get(f"{BASE}/{INDEX}"))
    for file, tensors in files.items():
        for key, tensor in tensors.items():
            if tensor.is_empty or not is_finite(tensor):
                what = "is empty" if tensor.is_empty else "holds NaN or infinity"
                yield Problem(f"{BASE}/{file}", f"the tensor {key} of the base {what}", FETCH)


def _check_shards(files: dict[str, dict[str, Tensor]], index: dict[str, Any] | None) -> Iterator[Problem]:
    """Find weights that one loader would read and another would not.

    Args:
        files: name of each file of weights -> what it holds.
    """
    if SINGLE in files:
        if len(files) > 1 or index is not None:
            yield Problem(BASE, "holds the weights in one file and in several: which are loaded is not known", FETCH)
        return
    held = [(key, file) for file, tensors in files.items() for key in tensors]
    if index is None or len(dict(held)) < len(held) or index.get("weight_map") != dict(held):
        problem = "does not name the file of every tensor that lies beside it, and no other"
        yield Problem(f"{BASE}/{INDEX}", problem, "fetch the adapter again")


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
