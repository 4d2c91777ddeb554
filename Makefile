.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
LAUNCH := ACCELERATE_USE_CPU=true $(BIN)/accelerate launch --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: help install demo test test-slow test-pythons check bench bench-full bench-check bench-scale gpu-check docs clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed  ## Create .venv and install the package with everything that tests need

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,dev,examples,trackers,transformers,wandb]'
	@touch $@

demo: install  ## Train on handwritten digits under `accelerate launch`: one process, then two
	$(LAUNCH) --num_processes 1 examples/digits.py
	$(LAUNCH) --multi_gpu --num_processes 2 examples/digits.py
	@echo 'The demo trained one classifier in one process and one in two, shown above with their accuracy; it kept no files.'

test: install  ## Run the tests
	$(BIN)/pytest -n 2 -q --durations 10

test-slow: install  ## Run the tests that take minutes as well
	$(BIN)/pytest -n 2 -q -m 'not gpu'

test-pythons:  ## Check the wheel and run a few tests on each Python from 3.11 to 3.14 that is found
	sh tests/pythons.sh

check: install  ## Lint, format, types, the order of imports, and the wheel from outside the repository
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layering.py tests/test_import.py
	PYTHON=$(BIN)/python sh tests/check_wheel.sh

bench: install  ## Measure a step, and what goes with it, beside plain loops: a few minutes
	$(BIN)/python -m benchmarks

bench-full: .venv/.installed-bench  ## Measure everything, beside the peers too, and write it into benchmarks/README.md
	$(BIN)/python -m benchmarks --full

bench-check: install  ## The benchmark's one-minute form: equality and host reads, and never a time
	$(BIN)/python -m benchmarks --check

bench-scale: install  ## How the cost of a run grows with its ranks, as counts: two minutes; writes into benchmarks/README.md
	$(BIN)/python -m benchmarks.scale --write

gpu-check:  ## On a machine with a GPU: the tests marked gpu, then the GPU benchmark; reports in build/gpu-check
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_check --out build/gpu-check

.venv/.installed-bench: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

docs: install  ## Build the documentation into site/; a warning is an error
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/zensical build --clean --strict

clean:  ## Remove what the other targets made
	rm -rf .venv .venvs dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
