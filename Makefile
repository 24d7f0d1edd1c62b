# Everything runs in a virtual environment that this file makes by itself, once.
VENV ?= .venv
# The newest interpreter found among the supported ones; override with: make PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help install demo test test-all lint format types docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(READY)  ## make the virtual environment and install everything

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Patchloom needs Python 3.11 or newer with venv (Debian and Ubuntu: apt install python3-venv)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing PyTorch and the rest: several gigabytes, a few minutes, once."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

demo: $(READY)  ## a Vision Transformer from the embedded photographs, with a report: minutes on a laptop
	$(BIN)/patchloom demo --out runs/demo --overwrite

test: $(READY)  ## the tests that are quick
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow"

test-all: $(READY)  ## all tests, the long ones too
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(READY)  ## ruff, and which folder may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

format: $(READY)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## mypy
	$(BIN)/mypy

clean:  ## remove the virtual environment and caches; runs are kept
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
