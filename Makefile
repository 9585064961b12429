# `make demo` shows what fedtailor does; `make check` is all that must pass. Both set up .venv first, if needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help venv demo check test bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(READY)  ## set up .venv from requirements.lock (PYTHON=python3.12 picks another Python)

# Remade only when the lock or the package's description changes; the sources are installed as a link to src/.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is no Python 3.11 or newer, which fedtailor needs. Name one: make venv PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(READY)

demo: $(READY)  ## run experiments/quickstart.toml
	$(BIN)/fedtailor run experiments/quickstart.toml

check: $(READY)  ## lint, types and every test, slow ones too
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

test: $(READY)  ## the quick tests
	$(BIN)/python -m pytest -q -m "not slow and not engines"

bench: $(READY)  ## measure what fedtailor adds to plain training
	$(BIN)/python benchmarks/overhead.py

clean:  ## remove .venv, build outputs and caches (runs/ is kept)
	rm -rf $(VENV) dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
