# Everything here needs only Python 3.11 or newer (and g++ for DeepSpeed's operator): each target sets itself up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.smalti-set-up
EXTRAS ?= cpu,quickstart,dev
# A file of tests stays on one worker (it shares a Ray session); tests/conftest.py puts the longest files first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
SOURCES := smalti tokenizers mllm workflows tune scripts tests bench docs

.PHONY: help setup data quickstart test test-quick check docs docs-serve format bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## create .venv with everything pinned, and fetch the LPIPS weights

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]' -c requirements.lock
	$(BIN)/python scripts/fetch_lpips.py || echo "continuing without the LPIPS weights"
	@touch $@

data: $(STAMP)  ## fetch the optional data: LPIPS weights, Tux Paint stamps
	$(BIN)/python scripts/fetch_lpips.py
	$(BIN)/python scripts/fetch_stamps.py

quickstart: $(STAMP)  ## the whole chain, small, on this machine
	$(BIN)/python -m smalti quickstart

test: $(STAMP)  ## all tests
	$(PYTEST)

test-quick: $(STAMP)  ## tests that start no Ray and no training ranks: about 90 seconds
	$(PYTEST) --quick

check: $(STAMP)  ## lint, types, documentation and all tests: what CI runs
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(MKDOCS) build --strict
	$(PYTEST)

docs: $(STAMP)  ## build the documentation into site/; broken links and anchors are errors
	$(MKDOCS) build --strict

docs-serve: $(STAMP)  ## serve the documentation on 127.0.0.1:8000
	$(MKDOCS) serve --dev-addr 127.0.0.1:8000

format: $(STAMP)  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	$(BIN)/ruff format $(wildcard $(SOURCES))

bench: $(STAMP)  ## all benchmarks; writes bench/results/DATE-MACHINE.json
	$(BIN)/python -m bench

lock: $(STAMP)  ## write requirements.lock from .venv
	$(BIN)/python scripts/lock.py

clean:  ## remove what tools created; .venv, .data and out/ stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +
