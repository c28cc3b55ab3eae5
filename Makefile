# Two commands do all the set-up: `make report` and `make test`.
# Everything is installed into .venv inside this checkout; a second call reuses it.

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
OLDER ?= 5.23.0
MODEL ?= smollm2
OUT ?= report.html

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help report test older check docs serve bench format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

report: $(VENV)/.regard ## set up, then write report.html for the embedded model (MODEL=..., OUT=...)
	$(BIN)/regard report $(MODEL) --out $(OUT)
	@echo "The page is at file://$(abspath $(OUT))"

test: check ## set up, then run every check and the whole test suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST)

older: $(VENV)/.older-$(OLDER) ## run what depends on transformers under an older version (OLDER=...)
	HF_HUB_OFFLINE=1 PYTHONPATH=$(VENV)/older-$(OLDER) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/attach tests/cache tests/plan

check: $(VENV)/.dev ## lint, formatting, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(VENV)/.docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

serve: $(VENV)/.docs ## read the documentation at http://localhost:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: $(VENV)/.dev ## measure time and memory against the usual ways (minutes)
	$(BIN)/python -m benchmarks

format: $(VENV)/.dev ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# --- the environment, in steps that are each done once ---

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "regard needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv"; \
	  rm -rf $(VENV); exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.regard: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable ".[frames,plot]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.regard

$(VENV)/.older-$(OLDER): $(VENV)/.dev
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/older-$(OLDER) "transformers==$(OLDER)"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable ".[docs]"
	@touch $@
