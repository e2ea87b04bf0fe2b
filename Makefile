# Twinax: `make demo` shows everything working, `make test` runs the quick suite. Both make .venv on first use.
#   make demo DATA=path/to/text   train on a file or folder of your own
#   make test PYTHON=python3.12   build .venv with another Python (after `make clean`)

PYTHON ?= python3
VENV ?= .venv
DATA ?=
PYTEST_ARGS ?=
WORKERS ?= 2

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all lint format setup setup-test clean

help:
	@echo "make demo       train, checkpoint, resume, export and serve a small model, start to end (DATA=path for your own text)"
	@echo "make test       the quick test suite"
	@echo "make test-all   the quick suite and the slow tests"
	@echo "make lint       ruff and pyright"
	@echo "make format     let ruff sort imports and fix what it can"
	@echo "make setup      only make the virtual environment ($(VENV)) and install Twinax into it, editable"
	@echo "make clean      remove the virtual environment, builds and caches (never runs/)"

$(VENV)/made:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Twinax needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no venv module. On Debian and Ubuntu: apt install python3-venv. Then run make $(MAKECMDGOALS) again" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The stamps make a second run start at once; a changed pyproject.toml or constraints.txt installs again.
$(VENV)/installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing Twinax and what it needs into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) -e '.[serve,train]'
	@touch $@

$(VENV)/installed-test: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing Twinax, what it needs and what its tests need into $(VENV) (a few minutes the first time)"
	@$(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/installed

setup: $(VENV)/installed

setup-test: $(VENV)/installed-test

demo: $(VENV)/installed
	@$(PY) -m twinax.demo $(if $(DATA),--data '$(DATA)')

# SLOW=1 adds the slow tests, in one run: what is made for a file's tests, an engine or a server, is made once for both.
test: $(VENV)/installed-test
	$(PY) -m pytest -q -n $(WORKERS) $(if $(SLOW),--dist worksteal,--dist loadfile -m "not slow") $(PYTEST_ARGS)

test-slow: $(VENV)/installed-test
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m slow $(PYTEST_ARGS)

test-all:
	@$(MAKE) --no-print-directory test SLOW=1

lint: $(VENV)/installed-test
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/installed-test
	$(PY) -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist .cache .pytest_cache .ruff_cache .hypothesis twinax.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
