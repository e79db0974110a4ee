"""The YAML document of a recipe: plain values, the line of every key, overrides, and the errors that name them."""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from rlhf_trl.recipe.errors import Problem, RecipeError, UserError
from rlhf_trl.recipe.library import show, suggest
from rlhf_trl.text.display import has_lone_surrogate
from rlhf_trl.text.redact import redact

MAX_BYTES = 200_000
TAG = "tag:yaml.org,2002:"
CONSTRUCTOR = YAML(typ="safe", pure=True).constructor
TEXTS = (TAG + "str", TAG + "timestamp")  # a date is as good a name as any
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
    """What a recipe file and its overrides say, before it is checked."""

    path: Path
    raw: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)  # of each dotted key
    problems: list[Problem] = field(default_factory=list)
    overridden: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # stages

    # Nodes, not ruamel's round-trip loader: that stops at the first duplicate key, and follows anchors and merge keys.
    def plain(self, node: Node | None, place: str) -> Any:
        """Turn a YAML node into plain values, noting the line of every key and what a recipe cannot hold."""
        if node is None:
            return None
        problem = f"the tag {str(node.tag).replace(TAG, '!!')} is not read", "write a plain value"
        if node.anchor:
            problem = "anchors (&) and aliases (*) are not read", "write the values out"
        elif isinstance(node, MappingNode) and node.tag == TAG + "map":
            return {name: self.plain(item, path) for name, path, item in self._items(node, place)}
        elif isinstance(node, SequenceNode) and node.tag == TAG + "seq":
            items = [(f"{place}.{index}", item) for index, item in enumerate(node.value)]
            self.lines.update((path, item.start_mark.line + 1) for path, item in items)
            return [self.plain(item, path) for path, item in items]
        elif node.tag in TEXTS:
            if not (fault := _fault(node.value)):
                return node.value
            problem = fault
        elif node.tag in [TAG + kind for kind in ("null", "bool", "int", "float")]:
            with contextlib.suppress(ValueError):
                value = CONSTRUCTOR.construct_object(node)
                if not isinstance(value, (int, float)) or abs(value) <= sys.float_info.max:
                    return value
            problem = f"{node.value[:40]} is not a finite number", "give a finite number"
        self.problems.append(Problem(place, *problem))
        return None

    def _items(self, node: MappingNode, place: str) -> Iterator[tuple[str, str, Node]]:
        """The name, place and value of each key that a recipe may hold."""
        names: set[str] = set()
        for key, item in node.value:
            name = str(key.value) if isinstance(key, ScalarNode) else "?"
            path = f"{place}.{name}".lstrip(".")
            before, self.lines[path] = self.lines.get(path), key.start_mark.line + 1
            empty = isinstance(item, ScalarNode) and item.tag == TAG + "null" and not item.value
            problem = _fault(name)
            if key.tag == TAG + "merge":
                problem = "merge keys (<<) are not read", "write the values out"
            elif node.flow_style and empty:
                remedy = "put a space after the colon: `key: value`; lists stand in brackets [a, b]"
                problem = f"{name!r} has no value", remedy
            elif key.tag not in TEXTS:
                problem = f"the key {name} is not a text", "put quotes around it"
            elif name in names:
                problem = f"the key {name!r} stands twice, first on line {before}", "remove one of the two"
            if problem:
                self.problems.append(Problem(path, *problem))
            else:
                names.add(name)
                yield name, path, item

    def override(self, text: str) -> Problem | None:
        """Lay a `path.to.key=value` over the document; the value is read as YAML. Returns what is wrong with it."""
        key, equals, value = text.partition("=")
        key = key.strip()
        place = f"--set {key if equals else text}"
        if not equals or not all(key.split(".")):
            return Problem(place, "not of the form path.to.key=value", "e.g. --set stages.dpo.args.beta=0.3")
        if fault := _fault(key):
            return Problem(place, *fault)
        stages = self.raw.get("stages")
        names = [str(name) for name in stages] if isinstance(stages, dict) else []
        # The name of a stage may hold dots itself.
        stage = max((name for name in names if f"{key}.".startswith(f"stages.{name}.")), key=len, default=None)
        parts = key.split(".") if stage is None else ["stages", stage, *key[len(f"stages.{stage}") :].split(".")[1:]]
        if parts[0] == "stages" and len(parts) > 1 and names and stage is None:
            remedy = suggest(parts[1], names, f"the stages are: {', '.join(names)}")
            return Problem(place, f"there is no stage {parts[1]!r}", remedy)
        if parts[0] in names and parts[0] not in self.raw:
            remedy = f"begin the key with stages.{parts[0]}.args. (an option of its trainer)"
            return Problem(place, f"{parts[0]!r} is a stage", remedy)
        try:
            new = self.plain(YAML(typ="safe", pure=True).compose(value), key)
        except (YAMLError, RecursionError):
            remedy = "put quotes around the value, and around all of KEY=VALUE"
            return Problem(place, f"{show(value)} is not valid YAML", remedy)
        node = self.raw
        for part in parts[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                remedy = "check the path of the key; a list is given whole"
                return Problem(place, f"{part!r} is a value, not a section", remedy)
        if stage is not None and len(parts) == 2 and value.strip() == "null":
            self.left_out.append(stage)
            return None
        node[parts[-1]] = new
        self.overridden.append(key)
        return None

    def leave_out(self) -> None:
        """Remove the stages that are left out; `evaluation` and `comparison` go on without them."""
        sections = {key: value for key, value in self.raw.items() if isinstance(value, dict)}
        evaluation, comparison = sections.get("evaluation", {}), sections.get("comparison", {})
        kept = {key: stage for key, stage in sections.get("stages", {}).items()
                if key not in self.left_out and isinstance(stage, dict)}  # fmt: skip
        for name in self.left_out:
            own = re.compile(rf"{re.escape(name)}(-\w+=.*)?")  # itself, or what its sweep expands to
            starts = {key: [str(stage.get("init")), str(stage.get("reward"))] for key, stage in kept.items()}
            if readers := [key for key, names in starts.items() if any(map(own.fullmatch, names))]:
                remedy = "leave out these, too: " + " ".join(f"--without {key}" for key in readers)
                problem = f"{', '.join(readers)} cannot be trained without it"
                self.problems.append(Problem(f"--without {name}", problem, remedy))
                continue
            sections["stages"].pop(name, None)
            for key in [key for key in ("reward", "gold") if own.fullmatch(str(evaluation.get(key)))]:
                del evaluation[key]
                if key == "gold" and sections.get("judge", {}).get("kind") == "reward":  # that judge is the gold model
                    self.raw.pop("judge", None)
            if isinstance(given := comparison.get("stages"), list):
                comparison["stages"] = [other for other in given if not own.fullmatch(str(other))]

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
            and (problem.meant is not None or not any(place.startswith(f"{problem.place}.") for place in own))
        ]
        problems = dict.fromkeys([*self.problems, *rest])
        return RecipeError(replace(problem, place=self._locate(problem.place)) for problem in problems)

    def _locate(self, place: str) -> str:
        """A place with its file and line, or with the option that it comes from."""
        if place.startswith("--"):
            return place
        for key in self.overridden:
            if f"{place}.".startswith(f"{key}."):
                return f"--set {place}"
        for key in self.overridden:
            if key.startswith(f"{place}.") and place not in self.lines:
                return f"--set {key}"
        parts = place.split(".")
        sections = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        line = next((f":{self.lines[key]}" for key in sections if key in self.lines), "")
        return f"{self.path}{line}: {place}"


def read_document(path: Path, overrides: Sequence[str]) -> Document:
    """Read a YAML mapping (else UserError) and lay the overrides over it; problems are kept in the document."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
        node = YAML(typ="safe", pure=True).compose(text if len(text) <= MAX_BYTES else "")
        what = "is empty" if node is None else "is not made of `key: value` lines"
        problem = f"the recipe {what}", "begin with `name:`, `model:`, `data:` and `stages:`"
        if len(text) > MAX_BYTES:
            problem = f"the file is larger than {MAX_BYTES} bytes", "give the path of a recipe: a page of YAML"
    except OSError as error:
        problem = f"cannot read the recipe: {error.strerror}", "give the path of a YAML file"
    except UnicodeDecodeError:
        problem = "the recipe is not UTF-8 text", "save it as UTF-8"
    except YAMLError as error:
        raise _syntax_error(path, text, error) from None
    except RecursionError:
        problem = "sections lie too deep in one another", "bring them to the depth of the README's recipe"
    else:
        if isinstance(node, MappingNode):
            document = Document(path)
            document.raw = document.plain(node, "") or {}
            document.problems += filter(None, map(document.override, overrides))
            document.leave_out()
            return document
    raise UserError(str(path), *problem)


def _syntax_error(path: Path, text: str, error: YAMLError) -> UserError:
    line, reason = 1, str(error)
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        reason = f"the character {chr(error.character)!r} is not allowed"
    elif isinstance(error, MarkedYAMLError) and error.problem_mark:
        line, reason = error.problem_mark.line + 1, str(error.problem).removeprefix("but ")
        if error.context_mark and error.context_mark.line + 1 != line:
            reason += f" (in what begins on line {error.context_mark.line + 1})"
    remedy = next((remedy for part, remedy in SYNTAX_REMEDIES.items() if part in reason), "mend the line")
    return UserError(f"{path}:{line}", f"not valid YAML: {reason}", remedy)


def _fault(text: str) -> tuple[str, str] | None:
    """Say what is wrong with a key or a text: it looks like an access token, or no file can hold it."""
    if redact(text) != text:
        return "holds what looks like an access token", "keep tokens in the environment (see .env.example)"
    if "\0" in text or has_lone_surrogate(text):
        return "holds a character that no file can", "leave it out"
    return None
