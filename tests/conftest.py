"""Fixtures: the shared data, and one small run whose five stages are trained once for a whole test session."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false"
)

import pytest

from rlhf_trl.recipe import rules
from rlhf_trl.recipe.library import CLASSES
from rlhf_trl.recipe.load import load_recipe
from rlhf_trl.recipe.recipe import Recipe
from rlhf_trl.run.layout import RunDir

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with Ctrl-C ignored
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
LONGEST = ("test_demo.py", "test_evaluate.py", "test_launch.py", "test_ppo.py", "test_train.py")
NO_PPO = [] if "ppo" in CLASSES else ["stages.ppo=null"]  # with a TRL that has none


def command(*arguments: str, cwd) -> subprocess.CompletedProcess:
    """Run `rlhf-trl ARGUMENTS` as a user does."""
    return subprocess.run([sys.executable, "-m", "rlhf_trl", *arguments], cwd=cwd, capture_output=True, text=True,
                          check=False, timeout=1500, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip


def python(code: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a program in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True,
                          check=False, timeout=120, env={**os.environ, **environment})  # fmt: skip


COMMON = """
      bf16: false
      gradient_checkpointing: false
      save_strategy: "no"
      logging_steps: 1
      per_device_train_batch_size: 8
      learning_rate: 1e-3"""
RECIPE = f"""
name: small
seed: 3
model:
  model_name_or_path: builtin:tiny
  use_peft: true
  lora_r: 4
  lora_dropout: 0.0
  lora_target_modules: all-linear
data: {{source: builtin:demo, max_rows: 240, max_length: 192, test_fraction: 0.2}}
stages:
  sft:
    trainer: sft
    model: {{use_peft: false}}
    args: {COMMON}
      max_steps: 12
  rm:
    trainer: reward
    init: sft
    args: {COMMON}
      max_steps: 6
      eval_strategy: steps
      eval_steps: 3
  dpo:
    trainer: dpo
    init: sft
    args: {COMMON}
      max_steps: 4
  grpo:
    trainer: grpo
    init: sft
    reward: rm
    args: {COMMON}
      max_steps: 2
      num_generations: 4
      max_completion_length: 16
      beta: 0.1
      scale_rewards: none
      disable_dropout: true
  ppo:
    trainer: ppo
    init: sft
    reward: rm
    args: {COMMON}
      gradient_accumulation_steps: 2
      total_episodes: 32
      response_length: 16
      stop_token: eos
      temperature: 1.0
      missing_eos_penalty: 1.0
      num_ppo_epochs: 2
      num_mini_batches: 2
      kl_coef: 0.05
      entropy_coef: 0.01
evaluation: {{reward: rm, prompts: 12, max_new_tokens: 16, best_of_n: 4}}
"""


PROMPT = [{"role": role, "content": text} for role, text in
          [("user", "Hello."), ("assistant", " Hi! "), ("user", "Why?")]]  # fmt: skip


def small_recipe(folder: Path, overrides: tuple[str, ...] = (), text: str = RECIPE) -> Recipe:
    """Load the small recipe with overrides."""
    path = folder / "small.yaml"
    path.write_text(text)
    return load_recipe(path, [*overrides, *(NO_PPO if "  ppo:" in text else [])])


THREE = {
    "sft": {"trainer": "sft"},
    "rm": {"trainer": "reward", "init": "sft"},
    "dpo": {"trainer": "dpo", "init": "sft"},
}


def plain_recipe(**changes) -> Recipe:
    """Build a recipe with every step, for tests that train nothing."""
    content = {"name": "small", "model": {"model_name_or_path": "builtin:tiny"}, "data": {"source": "builtin:demo"},
               "stages": THREE, "judge": {}}  # fmt: skip
    return Recipe.model_validate(content | changes)


def finish(run: RunDir, recipe: Recipe, *steps: str) -> None:
    """Leave what finished steps leave: a file and a marker, after 2 seconds each."""
    for step in steps:
        (run.replace(step) / "result").write_text(step)
        run.mark_done(recipe, step, 2.0)


def shared(*parts: str) -> Path:
    """A path in ../shared; the test is skipped where that folder is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the project")
    return path


def train_all(recipe: Recipe, run: RunDir) -> None:
    """Prepare the data and train every stage of a recipe in this process."""
    from rlhf_trl.data.preprocess import prepare
    from rlhf_trl.train.step import train

    run.replace("prepare")
    prepare(recipe, run)
    run.mark_done(recipe, "prepare", 0.0)
    for stage in recipe.stages:
        train(recipe, run, stage)
        reset_accelerate()


def reset_accelerate() -> None:
    """Forget the process-wide state that one trainer leaves to the next; a stage has a process of its own."""
    from accelerate.state import AcceleratorState, GradientState

    # Trainers leave these behind, and the next one would take them for its own settings.
    for name in ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING"):
        os.environ.pop(f"ACCELERATE_{name}", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def pytest_collection_modifyitems(items):
    """The longest files begin first, so that no process waits for one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def recipe() -> Recipe:
    return plain_recipe()


@pytest.fixture
def run(tmp_path) -> RunDir:
    """An empty run."""
    return RunDir(tmp_path / "runs" / "small")


@pytest.fixture
def installed(monkeypatch):
    """As if vLLM were installed."""
    monkeypatch.setattr(rules, "find_spec", lambda name: name)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    if "torch" in sys.modules:
        reset_accelerate()


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command line in this process, in an empty folder; return its status, output and messages."""
    from rlhf_trl.cli import app
    from rlhf_trl.run.launch import ASKED

    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", ASKED):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf-trl", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


def once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one test process makes, and all of them read."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "made").open("a+") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        made.seek(0)
        if not made.read():
            make(folder)
            made.write("whole")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Recipe, RunDir]:
    """The small recipe with every stage trained. Read only: a test that writes takes a copy."""

    def make(folder: Path) -> None:
        train_all(small_recipe(folder), RunDir(folder / "runs" / "small"))

    folder = once(tmp_path_factory, "trained", make)
    return small_recipe(folder), RunDir(folder / "runs" / "small")


class Copy(RunDir):
    """A copy of the trained run that a test may change, in a folder of its own."""

    def __init__(self, source: RunDir, folder: Path):
        super().__init__(shutil.copytree(source.root, folder / "runs" / "small"))
        self.folder = folder

    def train(self, stage: str, *options: str) -> None:
        """Train a stage with other options; what it starts from counts as current."""
        from rlhf_trl.train.step import train

        train(small_recipe(self.folder, [f"stages.{stage}.args.{option}" for option in options]), self, stage)
        reset_accelerate()

    def weights(self, stage: str) -> Path:
        return self.adapter(stage) / "adapter_model.safetensors"


@pytest.fixture
def copy(trained, tmp_path) -> Copy:
    return Copy(trained[1], tmp_path)


@pytest.fixture(scope="session")
def gpt2_run(tmp_path_factory) -> tuple[Path, Recipe, RunDir]:
    """A base, and a run on it whose policy and reward model start from an SFT adapter. Read only."""
    from adapter_fixtures import write_base, write_run

    def make(folder: Path) -> None:
        write_run(folder, write_base(folder / "base", "gpt2"), parent=True)

    folder = once(tmp_path_factory, "gpt2", make)
    return folder / "base", load_recipe(folder / "small.yaml"), RunDir(folder / "runs" / "run")


@pytest.fixture(scope="session")
def policy_export(gpt2_run, tmp_path_factory) -> Path:
    """The policy of that run, exported for a public base. Read only."""
    return _export(gpt2_run[2], "dpo", tmp_path_factory)


@pytest.fixture(scope="session")
def reward_export(gpt2_run, tmp_path_factory) -> Path:
    """Its reward model, likewise."""
    return _export(gpt2_run[2], "rm", tmp_path_factory)


def _export(run: RunDir, stage: str, tmp_path_factory) -> Path:
    from adapter_fixtures import COMMIT, ID

    from rlhf_trl.adapters.export import export

    folder = once(tmp_path_factory, f"export-{stage}", lambda folder: export(run, stage, folder / stage, ID, COMMIT))
    return folder / stage
