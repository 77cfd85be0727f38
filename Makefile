# From a clean checkout this needs make, Python 3.11 or newer, and a package index that pip can reach.
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
FIND_PYTHON := for p in python3.11 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; exit; }; done
PYTHON ?= $(shell $(FIND_PYTHON))

.PHONY: help demo setup test lint format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo     train the tiny Janus on this machine and show before and after (minutes)"
	@echo "make setup    install the package into $(VENV)"
	@echo "make test     run the tests"
	@echo "make lint     check style and types"
	@echo "make format   put the code into the project's format"
	@echo "make clean    remove $(VENV) and caches; outputs/ stays"

demo: setup
	$(BIN)/stage demo

setup: $(VENV)/.core

# One thread a worker: WORKERS processes with a thread pool each would fight over the cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python src

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are older than a changed requirement, so that only then pip runs again.
$(VENV)/.core: requirements.txt setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer among python3.11, python3, python; install one," \
		"or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into $(VENV) (minutes, the first time)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.core
	@echo "installing test tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
