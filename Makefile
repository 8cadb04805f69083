# Two commands for a fresh clone; each makes .venv and installs what it needs.
PYTHON ?= python3
# make quickstart TRANSFORMERS='transformers>=5' takes the newest
TRANSFORMERS ?= transformers<5
TESTS ?= not slow
BIN := .venv/bin
INSTALLED := .venv/installed
NEWEST := .venv/newest
BESIDE_NEWEST := bertscore bleurt clipscore decoding families fidelity foreign_weights metrics metrics_2025 model \
    parts prefix run similarity standins vlm

# without bytecode of harness and of the tests, each process compiles them again
test test-newest: export PYTHONDONTWRITEBYTECODE =

.PHONY: quickstart test test-newest lint clean

quickstart: $(INSTALLED)
	$(BIN)/harness run quickstart

# tests wait a third of their time, so there are more workers than the cores of a small machine
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m '$(TESTS)'

# models, metrics and a run beside the newest transformers
test-newest: $(NEWEST)/installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
	    $(BESIDE_NEWEST:%=tests/test_%.py)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# bytecode is made on every core, where pip uses one
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]' '$(TRANSFORMERS)'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' .venv/lib || true
	touch $@

# an environment in front of the first one, with what differs
$(NEWEST)/installed: $(INSTALLED)
	$(BIN)/python -m venv --clear --without-pip $(NEWEST)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
	    > "$$($(NEWEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/first.pth"
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade transformers
	touch $@

clean:
	rm -rf .venv
