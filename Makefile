# Each target sets up everything that it needs:
#   make demo    train a small model on 4 local ranks and prove the run equal to a single device's
#   make test    run all tests, a file at a time on each core (JOBS=0: one after the other)
#   make lint    check style, format and types
#   make report-test    look at the report's page in a headless Chromium, which has to be there
PYTHON  ?= python3
VENV    ?= .venv
DEMO    ?= train --run demo/run.toml --prove
TESTS   ?= tests
JOBS    ?= auto

BIN      = $(VENV)/bin
INSTALL  = $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
INPUTS   = constraints.txt pyproject.toml

.PHONY: demo test lint report-test clean

demo: $(VENV)/.installed-run
	$(BIN)/shardstage $(DEMO)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 4 --dist loadfile $(TESTS)

# Needs a Chromium, which this cannot install: apt-get install chromium
report-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest browser

# A folder at a time, as each has a run.py. On the path is what they put there; src is by mypy's settings, so that its cache serves all.
SCRIPTS = $(sort $(dir $(wildcard benchmarks/*/run.py benchmarks/*/*/run.py))) examples/
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests browser benchmarks examples
	$(BIN)/ruff format --check src tests browser
	$(BIN)/mypy --strict src
	@for folder in $(SCRIPTS); do \
	  MYPYPATH=$$folder:$$folder..:$$folder../memory:$$folder../vtrain:$$folder../simulator_fidelity \
	  $(BIN)/mypy --strict $$folder*.py || exit; done

clean:
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache

# torch comes first and by its exact version: resolved later, through another package, the newest build would be
# taken, with gigabytes of CUDA libraries. An editable install has no bytecode, and gets none where PYTHONDONTWRITEBYTECODE is
# set, as in many containers: help took 0.87 s of CPU there, 0.63 s with it.
$(VENV)/.installed-run: $(INPUTS) $(VENV)/bin/python
	@echo "installing shardstage and what it needs into $(VENV) (a few minutes, only the first time)"
	@$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@$(INSTALL) -e ".[hf]"
	@$(BIN)/python -m compileall -q src
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-run
	@$(INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "shardstage needs Python 3.11 or newer, and $(PYTHON) is not: $$($(PYTHON) --version 2>&1)"; \
	  echo "hint: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; } >&2
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment"; \
	  echo "hint: apt-get install python3-venv"; exit 2; } >&2
