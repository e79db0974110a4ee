# Each target creates .venv on first use. PYTHON chooses the interpreter; ARGS passes options on.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
TORCH ?= torch
NEWEST := test_library or mistake_is or libraries_say or shipped or left_out or leaves_behind or changes_the_adapter or kernels

.PHONY: demo test test-newest lint size bench simulate chaos clean

demo: .venv/.installed
	$(BIN)/rlhf-trl run recipes/demo.yaml $(ARGS)

# The test processes share the cores: two threads each would make both slower. conftest.py has the longest files first.
test: .venv/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The options, the recipes and one short training of the four trainers that are still in the newest TRL. Its torch is the
# newest, too; make test-newest TORCH="-c constraints.txt torch" takes the tested one.
test-newest: .venv-newest/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-newest/bin/python -m pytest tests/recipe/test_library.py \
		tests/recipe/test_recipe.py tests/train/test_train.py -k "$(NEWEST)" $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/size.py --check

size: .venv/.installed
	$(BIN)/python tests/size.py

# What it costs beside TRL's own trainers and the plain ways; writes docs/bench.json and docs/bench.md.
bench: .venv/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -W ignore tests/bench.py $(MODEL) $(ARGS)

# What the verdicts and the intervals are worth; writes docs/simulations.json and docs/simulations.md.
simulate: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/compare/simulate.py $(ARGS)

# Fuzzed inputs, damages, kills; prints its seed. make chaos ARGS="--only kills", ARGS="--only cost"
chaos: .venv/.installed
	PYTHONPATH=tests $(BIN)/python -W ignore tests/chaos.py $(ARGS)

clean:
	rm -rf .venv .venv-newest build dist .pytest_cache .ruff_cache .mypy_cache

.venv-newest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet $(TORCH)
	.venv-newest/bin/python -m pip install --quiet -e ".[dev]"
	touch $@

# torch comes first and alone: a later package must not choose another build of it.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
