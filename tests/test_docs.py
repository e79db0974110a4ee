"""What README.md and docs/ promise: commands that exist, recipes that are valid, keys, links and the tree of rooms."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

from rlhf_trl.recipe.library import read_options
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.schema import Data, Evaluation
from rlhf_trl.run.launch import shipped

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
COMMAND = re.compile(r"^    ((?:rlhf-trl|accelerate launch) .*?)(?:\s+#.*|\s{3,}.*)?$", re.M)


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if "```yaml" in text])
def test_a_recipe_on_a_page_is_valid(name, tmp_path):
    for text in re.findall(r"```yaml\n(.*?)```", PAGES[name], re.S):
        path = tmp_path / "page.yaml"
        path.write_text(text)
        assert "dpo-beta=0.05" in load_recipe(path).stages


@pytest.mark.parametrize("line", sorted({line for text in PAGES.values() for line in COMMAND.findall(text)}))
def test_a_command_on_a_page_is_real(line, call, monkeypatch):
    """The recipe and the profile that a command names exist and are valid, with its overrides; the parser takes its
    words."""
    words = shlex.split(line)
    if words[0] == "accelerate":
        assert (ROOT / words[words.index("--config_file") + 1]).exists()
        words = ["rlhf-trl", *words[words.index("rlhf_trl") + 1 :]]
    status, options, _ = call(*words[1 : 3 if words[1] == "adapter" else 2], "--help")
    assert status == 0
    assert all(word in options for word in words if word.startswith("--"))
    if words[1] in ("adapter", "answer", "chat", "score"):
        return
    monkeypatch.chdir(ROOT)
    words = ["demo" if word == "RECIPE" else "dpo" if word == "STAGE" else word for word in words]
    overrides = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    if not words[2].startswith("runs/"):  # a run instead of a recipe
        load_recipe(shipped("recipes", words[2]), overrides)
    if "--accelerate" in words:
        assert shipped("accelerate_configs", words[words.index("--accelerate") + 1]).exists()


def test_the_tree_in_the_readme_is_the_tree():
    tree = PAGES["README.md"].split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"(?m)^    (\w+)/", tree))
    assert named == {path.parent.name for path in (ROOT / "rlhf_trl").glob("*/__init__.py")}


def test_keys_of_the_argument_table_exist():
    table = PAGES["options.md"]
    options = {name for kind in ("sft", "reward", "dpo", "grpo", "ppo") for name in read_options(kind)}
    for name in re.findall(r"stages\.\w+\.args\.(\w+)", table):
        assert name in options
    for section, name in re.findall(r"`(data|evaluation)\.(\w+)", table):
        assert name in (Data if section == "data" else Evaluation).model_fields


@pytest.mark.parametrize(("page", "least"), [("troubles.md", 15), ("gpus.md", 6)])
def test_the_tests_that_a_page_names_are_there(page, least):
    rows = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGES[page])
    assert len(rows) > least
    for file, name in rows:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)#]+)", PAGES[name]):
        assert target.startswith("https://") or (folder / target).exists(), target


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_imports_from_the_package_exists(name):
    for module, names in re.findall(r"^from (rlhf_trl[\w.]*) import ([\w, ]+)$", PAGES[name], re.M):
        assert all(hasattr(importlib.import_module(module), word.strip()) for word in names.split(","))
