"""What neither an import contract nor a rule of ruff can say: what is loaded at run time, what an import must not do.

Who may import whom, and who may print, stands in `pyproject.toml` and is checked by `make lint`.
"""

from conftest import ROOT, python

PACKAGE = ROOT / "rlhf_trl"
LIGHT = ("recipe", "run", "stats", "text", "cli")
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "matplotlib"}
MODULES = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
]


def test_what_starts_fast_loads_none_of_the_heavy_libraries():
    names = [name for name in MODULES if name.split(".")[1] in LIGHT]
    code = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint({HEAVY} & {{*sys.modules}})"
    )
    assert python(code).stdout == "set()\n"


def test_imports_have_no_side_effects(tmp_path):
    """Import every module after the libraries: nothing is printed, set, logged, written, or asked of the network."""
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
for name in {MODULES}:
    importlib.import_module(name)
    for old, new in zip(before, state()):
        assert old == new, (name, old, new)
"""
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [*tmp_path.iterdir()] == []
