# Two commands matter: `make demo` and `make test`. Each sets up everything it needs, once.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := .demo

# Demo and tests are of the bundled model.
unexport XKV_MODEL

.PHONY: help demo test check format setup clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## make the virtual environment (demo and test do it by themselves)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11, or pass PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "$(PYTHON) is not Python 3.10 to 3.12: pass PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## compress the example corpus, then compare an answer from both caches
	$(BIN)/xkv precompute --docs examples/corpus --ratio 20 --store $(DEMO)/store
	$(BIN)/python examples/side_by_side.py --store $(DEMO)/store
	@echo "xkv is in $(BIN): source $(BIN)/activate, then xkv --help"

test: check  ## check, then run the tests; with XKV_LONG_TESTS=1 those of 40 s and more, too
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --ignore tests/e2e
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/e2e

check: $(READY)  ## format, lint, types and the direction of dependencies
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what demo, setup and the tools made
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
