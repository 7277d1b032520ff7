# Everything runs from here; nothing but Python 3.11+ is needed beforehand, and nothing is written outside this folder.
PYTHON ?= python3
export PYTHON
CLUSTER ?= deploy/clusters/local_cpu.yaml
BIN := .venv/bin

# Libraries' caches stay inside, too.
export XDG_CACHE_HOME := $(CURDIR)/.cache
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
export HF_HOME := $(CURDIR)/.cache/huggingface
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor

.PHONY: up down env dev test worlds lint check protos bench

up: env  ## start the demo cluster and wait until it answers
	@$(BIN)/python -m deploy up "$(CLUSTER)"

down:  ## stop it
	@$(BIN)/python -m deploy down

env:  ## make .venv
	@sh deploy/setup_env.sh

dev:  ## make .venv with the tools for tests
	@sh deploy/setup_env.sh dev

test: dev lint  ## what CI runs first
	@mkdir -p .cache
	$(BIN)/python -m pytest -q -n 2 --durations=12 -m "not e2e" --basetemp=.cache/pytest
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=12 -m e2e --basetemp=.cache/pytest tests/e2e

worlds: dev  ## and then: 100,000 simulated worlds on all cores; prints the seeds of those that break a rule, and fails
	$(BIN)/python -m tests.sim --worlds 100000

lint: dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/python -m protos.generate --check

check: lint  ## lint, and types
	$(BIN)/python -m mypy

protos: dev  ## regenerate the code beside the .proto files
	$(BIN)/python -m protos.generate

bench: dev  ## load the running cluster; see its --help
	$(BIN)/python -m tests.benchmarks.bench_serving $(ARGS)
