"""The YAML document of a recipe: plain values, the line of every key, overrides, and the errors that name them.

Reads one file; imports neither torch nor the libraries that the recipe is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from rlhf_trl.recipe.errors import SECRET, Kind, Problem, RecipeError, UserError
from rlhf_trl.recipe.library import nearest, show

MAX_BYTES = 200_000
MAX_DEPTH = 20
TAG = "tag:yaml.org,2002:"
# Part of the YAML reader's message -> what to do.
SYNTAX_REMEDIES = {
    "'\\t'": "use spaces, not tabs",
    "mapping values": "put a space after the colon of a key, and quotes around a text that holds a colon",
    "could not find expected ':'": "write `key: value`, with a space after the colon",
    "<block": "indent the keys of one section by the same number of spaces",
    "another document": "a recipe is one document: remove the `---`",
    "undefined alias": "put quotes around a text that begins with `*`",
    "cannot start any token": "put quotes around the text",
    "',' or": "close the bracket, and put a comma between two items",
    "is not allowed": "remove the character that does not show in an editor",
    "end of stream": "close the quote or bracket",
}


@dataclass
class Document:
    """What a recipe file and its overrides say, before it is judged."""

    path: Path
    raw: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    """Dotted key -> line number."""
    problems: list[Problem] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)
    constructor: Any = field(default_factory=lambda: YAML(typ="safe", pure=True).constructor, repr=False)

    def override(self, text: str) -> None:
        """Lay a `path.to.key=value` over the document; the value is read as YAML."""
        key, equals, value = text.partition("=")
        key = key.strip()
        place = f"--set {key if equals else text}"
        if not equals or not all(key.split(".")):
            self._refuse(place, "not of the form path.to.key=value", "e.g. --set stages.dpo.args.beta=0.3")
            return
        stages = self.raw.get("stages")
        names = [str(name) for name in stages] if isinstance(stages, dict) else []
        # The name of a stage may hold dots itself.
        stage = max((name for name in names if f"{key}.".startswith(f"stages.{name}.")), key=len, default=None)
        parts = key.split(".") if stage is None else ["stages", stage, *key[len(f"stages.{stage}") :].split(".")[1:]]
        if parts[0] == "stages" and len(parts) > 1 and names and stage is None:
            near = nearest(parts[1], names)
            remedy = f"did you mean {near!r}?" if near else f"the stages are: {', '.join(names)}"
            self._refuse(place, f"there is no stage {parts[1]!r}", remedy)
            return
        if parts[0] in names and parts[0] not in self.raw:
            self._refuse(
                place,
                f"{parts[0]!r} is a stage",
                f"begin the key with stages.{parts[0]}.args. (an option of its trainer)",
            )
            return
        try:
            new = _plain(self, YAML(typ="safe", pure=True).compose(value), key)
        except (YAMLError, RecursionError):
            self._refuse(
                place, f"{show(value)} is not valid YAML", "put quotes around the value, and around all of KEY=VALUE"
            )
            return
        node = self.raw
        for part in parts[:-1]:
            if node.get(part) is None:
                node[part] = {}
            if not isinstance(node[part], dict):
                self._refuse(
                    place, f"{part!r} is a value, not a section", "check the path of the key; a list is given whole"
                )
                return
            node = node[part]
        node[parts[-1]] = new
        self.overridden.append(key)

    def find_secrets(self) -> None:
        """Note every text that looks like an access token."""
        for place, text in _texts(self.raw):
            if SECRET.search(text):
                self._refuse(
                    place, "holds what looks like an access token", "keep tokens in the environment (see .env.example)"
                )

    def _refuse(self, place: str, problem: str, remedy: str) -> None:
        self.problems.append(Problem(place, problem, remedy))

    def error(self, later: Sequence[Problem]) -> RecipeError:
        """Build the error from the document's own problems and later ones, each once and with its line.

        Left out are problems of a place that the document refused already, of a section that holds such a place, and
        of a key that is absent because it is misspelt.
        """
        own = [problem.place for problem in self.problems]
        misspelt = {problem.meant_place for problem in later} - self.lines.keys() - set(self.overridden)
        rest = [
            problem
            for problem in later
            if problem.place not in {*own, *misspelt}
            and (problem.kind is Kind.UNKNOWN_KEY or not any(place.startswith(f"{problem.place}.") for place in own))
        ]
        return RecipeError(self._locate(problem) for problem in dict.fromkeys([*self.problems, *rest]))

    def _locate(self, problem: Problem) -> Problem:
        if problem.place.startswith("--set"):
            return problem
        if any(f"{problem.place}.".startswith(f"{key}.") for key in self.overridden):
            return replace(problem, place=f"--set {problem.place}")
        for key in self.overridden:
            if key.startswith(f"{problem.place}.") and problem.place not in self.lines:
                return replace(problem, place=f"--set {key}")
        parts = problem.place.split(".")
        for end in range(len(parts), 0, -1):
            key = ".".join(parts[:end])
            if key in self.lines:
                return replace(problem, place=f"{self.path}:{self.lines[key]}: {problem.place}")
        return replace(problem, place=f"{self.path}: {problem.place}")


def read_document(path: Path) -> Document:
    """Read a YAML mapping; smaller problems are kept in the document.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a mapping.
    """
    place = str(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(place, "there is no such file", _near_file(path)) from None
    except OSError as error:
        raise UserError(place, f"cannot read the recipe: {error.strerror}", "give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(place, "the recipe is not UTF-8 text", "save it as UTF-8") from None
    if len(text) > MAX_BYTES:
        raise UserError(
            place, f"the file is larger than {MAX_BYTES} bytes", "give the path of a recipe: a page of YAML"
        )
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except YAMLError as error:
        raise _syntax_error(place, text, error) from None
    except RecursionError:
        raise UserError(
            place, f"sections lie more than {MAX_DEPTH} deep", "bring them to the depth of the README's"
        ) from None
    if not isinstance(node, MappingNode):
        what = "is empty" if node is None else "is not made of `key: value` lines"
        raise UserError(place, f"the recipe {what}", "begin with `name:`, `model:`, `data:` and `stages:`")
    document = Document(path)
    document.raw = _plain(document, node, "") or {}
    return document


def _near_file(path: Path) -> str:
    others = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = nearest(path.name, sorted(others))
    return f"did you mean {str(path.parent / near)!r}?" if near else "give the path of a YAML file"


def _syntax_error(place: str, text: str, error: YAMLError) -> UserError:
    if isinstance(error, ReaderError):
        line, reason = (
            text.count("\n", 0, error.position) + 1,
            f"the character {chr(error.character)!r} is not allowed",
        )
    elif isinstance(error, MarkedYAMLError) and error.problem_mark:
        line, reason = error.problem_mark.line + 1, str(error.problem).removeprefix("but ")
        if error.context_mark and error.context_mark.line + 1 != line:
            reason += f" (in what begins on line {error.context_mark.line + 1})"
    else:
        line, reason = 1, str(error)
    remedy = next((remedy for part, remedy in SYNTAX_REMEDIES.items() if part in reason), "mend the line")
    return UserError(f"{place}:{line}", f"not valid YAML: {reason}", remedy)


def _plain(document: Document, node: Node | None, place: str, depth: int = 0) -> Any:
    """Turn a YAML node into plain values, noting the line of every key and what a recipe cannot hold."""
    if node is None:
        return None
    problem: tuple[str, str] | None = None
    if node.anchor:
        problem = ("anchors (&) and aliases (*) are not read", "write the values out")
    elif depth > MAX_DEPTH:
        problem = (f"lies more than {MAX_DEPTH} sections deep", "bring it to the depth of the README's recipe")
    elif isinstance(node, MappingNode) and node.tag == TAG + "map":
        return _plain_mapping(document, node, place, depth)
    elif isinstance(node, SequenceNode) and node.tag == TAG + "seq":
        items = [(f"{place}.{index}", item) for index, item in enumerate(node.value)]
        document.lines.update((path, item.start_mark.line + 1) for path, item in items)
        return [_plain(document, item, path, depth + 1) for path, item in items]
    elif node.tag in (TAG + "str", TAG + "timestamp"):  # a date is as good a name as any
        return node.value
    elif node.tag in [TAG + kind for kind in ("null", "bool", "int", "float")]:
        try:
            value = document.constructor.construct_object(node)
        except ValueError:
            problem = (f"{node.value[:40]!r} is not a number", "give a number")
        else:
            if not isinstance(value, float) or math.isfinite(value):
                return value
            problem = (f"{node.value} is not a finite number", "give a finite number")
    else:
        problem = (f"the tag {str(node.tag).replace(TAG, '!!')} is not read", "write a plain value")
    document.problems.append(Problem(place, *problem))
    return None


def _plain_mapping(document: Document, node: MappingNode, place: str, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, item in node.value:
        name = str(key.value) if isinstance(key, ScalarNode) else "?"
        path, line = f"{place}.{name}".lstrip("."), key.start_mark.line + 1
        before = document.lines.get(path)
        document.lines[path] = line
        problem: tuple[str, str] | None = None
        if key.tag == TAG + "merge":
            problem = ("merge keys (<<) are not read", "write the values out")
        elif node.flow_style and isinstance(item, ScalarNode) and item.tag == TAG + "null" and not item.value:
            remedy = "write `key: value`; a list stands in brackets [a, b], a decimal number has a point"
            problem = (f"{name!r} has no value", "put a space after the colon" if ":" in name else remedy)
        elif key.tag not in (TAG + "str", TAG + "timestamp"):
            problem = (f"the key {name} is not a text", "put quotes around it")
        elif name in values:
            problem = (f"the key {name!r} stands twice, first on line {before}", "remove one of the two")
        if problem:
            document.problems.append(Problem(path, *problem))
        else:
            values[name] = _plain(document, item, path, depth + 1)
    return values


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every key and every text below a value, each with its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            path = f"{place}.{key}".lstrip(".")
            yield path, key
            yield from _texts(item, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{place}.{index}")
    elif isinstance(value, str):
        yield place, value
