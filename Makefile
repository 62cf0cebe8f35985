# Each target does its own set-up from a fresh clone: a .venv in the checkout with everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
MINUTES ?= 10
SEED ?=
SECONDS ?= 300

.DEFAULT_GOAL := help
# What one runs while working: the state machines, the language, the arithmetic, the documents.
QUICK := tests/broker tests/docs tests/test_architecture.py tests/trainer_client/core \
	tests/trainer_client/eagle3 tests/worker/core tests/worker/supervision
.PHONY: help venv demo test quick test-long check sim chaos bench fuzz test-engines docs clean

help: ## List these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | sed 's/:.*## /\t/' | column -ts '	'

venv: $(VENV)/.ready ## A .venv with everything: a CPU build of torch where there is no GPU

$(VENV)/.ready: pyproject.toml constraints.txt deploy/install-torch.sh
	$(PYTHON) -m venv $(VENV)
	deploy/install-torch.sh $(BIN)/python "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: venv ## Broker, workers and trainers on this machine, and a trained draft at the end
	$(BIN)/draftmq demo

test: check ## Lint, types and all tests that need no GPU
	$(BIN)/python -m pytest

quick: venv ## The tests that one runs while working: under a minute
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -m "not heavy and not slow and not browser" \
		--ignore=tests/broker/chaos $(QUICK)

test-long: venv ## The tests that take minutes, which make test leaves out
	$(BIN)/python -m pytest -m slow

check: venv ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sim: venv ## 10,000 simulated schedules of faults and of bad manners; SEED=n replays one
	$(BIN)/python -m tests.sim $(if $(SEED),--seed $(SEED))

chaos: venv ## Train drafts through ten minutes of faults, 500 cut connections, 8 broker restarts
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) --seed $(or $(SEED),0)
	$(BIN)/python -m tests.chaos --cuts 500 --seed $(or $(SEED),0) --output build/chaos-cuts.json
	$(BIN)/python -m tests.chaos --restarts 8 --output build/chaos-restarts.json

bench: venv ## Measure everything beside its peers and limits: a table, build/bench.json and .png
	$(BIN)/python -m tests.bench

test-engines: venv ## Targets in vLLM, a real model, other trainers, drafts in vLLM (environments of its own)
	tests/engines/run.sh

fuzz: venv ## Fuzz all that parses bytes from outside, for SECONDS=300 together
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

docs: venv ## The documents as a site in build/site, strict about links; needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

clean: ## Remove what these targets made
	rm -rf $(VENV) build runs *.egg-info .mypy_cache .ruff_cache .pytest_cache
