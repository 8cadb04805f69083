# Two commands for a fresh clone; each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# without bytecode of harness and of the tests, each process compiles them again
test: export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart test lint clean

quickstart: $(INSTALLED)
	$(BIN)/python -m harness run experiments/quickstart.yaml

# tests wait a third of their time, so there are more workers than the cores of a small machine
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# bytecode is made on every core, where pip uses one
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' .venv/lib || true
	touch $@

clean:
	rm -rf .venv
