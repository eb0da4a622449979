# make demo: compile a small model that comes with the project, and watch it write.
# make test: lint, type check and tests.   make test-all: the slow tests too.
# PYTHON=python3.12 chooses the interpreter; PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" gets
# the small CPU build of torch where pip would find the one for GPUs.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
MODEL := examples/pycoder
ARTIFACT := build/pycoder-int4.so
PROMPT := def read_lines(path):
ROOMS := compiler frontends targets runtime
TYPES := build/typecheck
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input $(PIP_FLAGS)
# Files share out among processes; each brings torch, so that four are enough for any machine.
PYTEST := $(BIN)/python -m pytest -q -ra -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all lint format typecheck clean

demo: $(VENV)/compile.stamp
	@mkdir -p build
	$(BIN)/llmc compile $(MODEL) -q int4 -o $(ARTIFACT)
	$(BIN)/llmc run $(ARTIFACT) '$(PROMPT)' --max-tokens 120 --temperature 0.7 --top-p 0.95 --seed 1

test: lint typecheck
	$(PYTEST) -m "not slow"

test-all: lint typecheck
	$(PYTEST)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The rooms stand at the root and are imported as llmc.<room>: mypy needs them where their names say.
typecheck: $(VENV)/test.stamp
	@rm -rf $(TYPES)/llmc && mkdir -p $(TYPES)/llmc
	@ln -s $(addprefix ../../../,$(ROOMS) $(wildcard llmc/*)) $(TYPES)/llmc/
	cd $(TYPES) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy_cache -p llmc

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "llmc needs Python 3.10 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than pyproject.toml when what that asks for is installed.
$(VENV)/compile.stamp: pyproject.toml | $(BIN)/python
	@command -v gcc >/dev/null || { echo "gcc was not found: it links what llmc compiles. Install it first" >&2; exit 1; }
	@echo "Installing llmc and what compiling needs into $(VENV) (once; some minutes) ..."
	$(PIP) --editable '.[compile]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml | $(BIN)/python
	@command -v gcc >/dev/null || { echo "gcc was not found: it links what llmc compiles. Install it first" >&2; exit 1; }
	@echo "Installing llmc and what its tests need into $(VENV) (once; some minutes) ..."
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/compile.stamp

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(ROOMS) llmc tests -name __pycache__ -type d -prune -exec rm -rf {} +
