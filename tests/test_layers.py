"""The package's layers: what may import what, what imports nothing heavy, and what an import must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "rlhf_trl"
LEVEL_0 = {"document", "options", "recipe", "sections", "rules", "checks", "rundir", "stats", "launch"}
LEVEL_0 |= {"adversarial", "calibration", "checkpoints", "frontier", "health", "pairstats", "texts", "words"}
LEVEL_0 |= {"jobs", "live", "policy_comparison", "progress", "states", "trust"}
LEVEL_0 |= {"agreement", "dynamics", "elo", "length_control", "logistic", "memory", "seeds", "verdicts", "winrates"}
LEVEL_0 |= {"weights", "adapter_check", "adapter_shapes", "report_values", "data.hh"}
# Modules that any step may use.
SHARED = LEVEL_0 | {"__init__", "models", "policies", "rewards", "sampling", "figures", "policy_figures", "data.demo"}
SHARED |= {"comparison_figures", "adapter_base", "loading"}
CLI = {"cli", "adapters_cli", "run_cli"}
# A step that is more than one module: module -> the step it belongs to. Any other module is a step by itself.
BELONGS = {"ppo": "train", "ppo_loop": "train", "ppo_models": "train", "callbacks": "train"}
BELONGS |= dict.fromkeys(("evaluation_figures", "measurements", "trade_off"), "evaluate")
PREFIXES = {"adapter_": "adapter", "compare_": "compare", "report_": "report", "error_": "errors", "judge_": "judge"}
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "matplotlib"}

MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def step_of(module: str) -> str:
    name = module.split(".")[0]
    return next((step for prefix, step in PREFIXES.items() if name.startswith(prefix)), BELONGS.get(name, name))


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            words = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            words = [alias.name for alias in node.names]
        else:
            continue
        for word in words:
            if word.split(".")[0] == "rlhf_trl":
                inside = word.split(".")[1:]
                known = [".".join(inside[:end]) for end in range(len(inside), 0, -1)]
                found.add(next((module for module in known if module in MODULES), "__init__"))
    return found


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_level_0_imports_only_level_0():
    for name in LEVEL_0:
        assert imports_of(name) <= LEVEL_0 | {"__init__"}, name


def test_level_0_loads_none_of_the_heavy_libraries():
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(LEVEL_0)}: importlib.import_module(f'rlhf_trl.{{name}}')\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


def test_the_command_line_loads_none_of_the_heavy_libraries():
    assert run_python(f"import sys, rlhf_trl.cli; print(sorted({HEAVY} & set(sys.modules)))").strip() == "[]"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in CLI | {"__main__"}])
def test_a_module_imports_what_is_shared_and_its_own_step(name):
    others = {other for other in imports_of(name) if other not in SHARED and step_of(other) != step_of(name)}
    assert not others, f"{name} imports {others}: steps meet in the run directory"


def test_shared_modules_import_no_step():
    for name in SHARED & set(MODULES):
        assert imports_of(name) <= SHARED, name


def test_the_command_line_imports_its_steps_inside_the_commands():
    top = {node.module for name in CLI for node in TREES[name].body if isinstance(node, ast.ImportFrom)}
    steps = {f"rlhf_trl.{name}" for name in MODULES if name not in LEVEL_0 | CLI}
    assert not top & steps


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
    names = [f"rlhf_trl.{name}" for name in MODULES if name not in {"__init__", "__main__"}]
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
