"""What an import contract cannot say: what is loaded at run time, and what an import must not do.

Who may import whom stands in `pyproject.toml` and is checked by `make lint`.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "rlhf_trl"
CLI = ("cli.app", "cli.adapters", "cli.run")
LIGHT = ("recipe", "run", "stats", "text", "cli")
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "matplotlib"}

MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_starts_fast_loads_none_of_the_heavy_libraries():
    names = [f"rlhf_trl.{name}" for name in MODULES if name.split(".")[0] in LIGHT]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_does(name):
    assert (ast.get_docstring(TREES[name]) or "").strip()


@pytest.mark.parametrize("name", [name for name in MODULES if name not in CLI])
def test_only_the_command_line_prints_or_sets_up_logging(name):
    calls = [node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    words = {ast.unparse(call) for call in calls}
    assert not words & {"print", "logging.basicConfig", "sys.exit", "exit"}


@pytest.mark.parametrize("name", MODULES)
def test_no_bare_except(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert ast.unparse(node.type) not in {"Exception", "BaseException"}


def test_imports_have_no_side_effects(tmp_path):
    """Import every module after the libraries: nothing is printed, set, logged, written, or asked of the network."""
    names = [f"rlhf_trl.{name}" for name in MODULES if name != "__main__"]
    code = f"""
import importlib, logging, os, signal, socket, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
def refuse(*_, **__): raise OSError("the network is off")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
warnings.simplefilter("ignore")
import matplotlib.pyplot, torch, transformers, trl, trl.experimental.ppo, datasets, peft, accelerate
from transformers import Trainer
def state():
    return (dict(os.environ), logging.root.handlers[:], logging.root.level, sys.argv[:], os.getcwd(), os.listdir("."),
            [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], torch.get_default_dtype(),
            torch.initial_seed(), matplotlib.get_backend(), dict(matplotlib.rcParams),
            transformers.logging.get_verbosity())
before = state()
sys.stdout.write = sys.stderr.write = lambda text: (_ for _ in ()).throw(AssertionError(f"printed {{text!r}}"))
for name in {names}:
    importlib.import_module(name)
    for old, new in zip(before, state()):
        assert old == new, (name, old, new)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(Path(tmp_path).iterdir()) == []
