# make study: set everything up and run the whole study. make test: set everything up and run the tests,
# two at a time; make test-all: the slow ones too.
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= quick
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/ctsma-ready

# One thread pool is in charge: processes are one knee, fold or arm each, with one thread.
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export NUMBA_NUM_THREADS := 1
export ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS := 1

PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
.PHONY: study test test-all test-browser lab lint clean clean-venv lock

study: $(READY)
	$(BIN)/ctsma run --profile $(PROFILE)

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m "slow or not slow"

# Pages and notebooks in Chromium, where it is installed; see CONTRIBUTING.md.
test-browser: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .[browser,view3d]
	$(BIN)/python -m pytest -rs tests/browser_checks.py

lab: $(READY)
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/index.ipynb

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A finished environment carries the mark $(READY), written last. One without it is neither used nor removed.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON): older than Python 3.11; give a newer one with make PYTHON=python3.12"; exit 2; }
	@if [ -e $(VENV) ] && [ ! -e $(READY) ]; then \
	  echo "$(VENV): an unfinished environment is in the way; remove it with make clean-venv, or use make VENV=other"; exit 2; fi
	@if [ -e $(READY) ]; then echo "$(VENV): updating to the changed requirements"; \
	  else echo "$(VENV): making the environment (about 2 minutes)"; $(PYTHON) -m venv $(VENV); fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

environment.yml: pyproject.toml
	$(BIN)/python .ci/environment.py > environment.yml

# Runs and caches; the environment stays.
clean:
	rm -rf runs .pytest_cache .ruff_cache build *.egg-info

clean-venv:
	rm -rf $(VENV)
