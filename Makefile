# Everything starts from a bare checkout with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@date +%s > .install-begin
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@echo $$(( $$(date +%s) - $$(cat .install-begin) )) > $(STAMP) && rm .install-begin

demo: $(STAMP)  ## fine-tune a real model on CPU and show what it learned
	@$(BIN)/lit-alignment demo --install-seconds $$(cat $(STAMP))

test: $(STAMP)  ## lint, types, and all tests
	$(MAKE) lint
	$(BIN)/python -m pytest

test-fast: $(STAMP)  ## tests that take seconds
	$(BIN)/python -m pytest -m 'not slow and not gpu'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs predictions .mypy_cache .pytest_cache .ruff_cache
