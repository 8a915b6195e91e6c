# What a developer types; `make` alone lists it. Set-up is scripts/set_up.sh: it makes .venv, and does nothing when
# neither pyproject.toml, nor the script, nor the codecs' C sources have changed. ARGS are passed on:
# make test ARGS="tests/pool -k lease"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

ARGS ?=
JOBS ?= $(shell nproc | awk '{print ($$1 < 4) ? $$1 : 4}')
BIN := .venv/bin
DEMO_READY := .venv/.ready-demo
DEV_READY := .venv/.ready-dev
SET_UP := pyproject.toml scripts/set_up.sh scripts/demo_model.txt scripts/build_kernels.py \
	$(wildcard runtime/kvpool/codecs/cpu/*.[ch])

# Files of tests run beside each other, each as a whole and in order, for many start servers of their own. torch has one
# thread in each process then: several spin while they wait for each other, and take twice as long.
IN_PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Nothing here may ask a model hub: the demo's model comes from PyPI.
export HF_HUB_OFFLINE := 1

.PHONY: help
help: ## List what there is to type
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(DEMO_READY): $(SET_UP)
	@scripts/set_up.sh demo

$(DEV_READY): $(SET_UP)
	@scripts/set_up.sh dev

.PHONY: setup
setup: $(DEV_READY) ## Make .venv with all that tests and checks need

.PHONY: demo
demo: $(DEMO_READY) ## Play chats with a real model on a small pool, stop and kill its servers, and answer from disk
	@$(BIN)/python -m kvpool.demo $(ARGS)

.PHONY: test
test: $(DEV_READY) ## Run all tests that this machine can run, but the long ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)

.PHONY: test-crash
test-crash: $(DEV_READY) ## Run the long tests: hundreds of kill -9, every byte flipped, a soak (marker: slow)
	@$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

.PHONY: check
check: $(DEV_READY) ## Lint, formatting, types, and who may import whom
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: check-operator
check-operator: ## Prove that the operator's environment needs neither torch nor numpy
	@scripts/set_up.sh operator
	@build/operator-venv/bin/python -I scripts/check_operator.py

.PHONY: format
format: $(DEV_READY) ## Format the code, and mend what the linter can mend
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

.PHONY: bench
bench: $(DEV_READY) ## Measure, each figure beside a probe of the same run
	@$(BIN)/kvpool bench $(ARGS)

.PHONY: clean
clean: ## Remove what was built and cached, but not .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find runtime operator tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: clean-all
clean-all: clean ## Remove .venv too
	rm -rf .venv
