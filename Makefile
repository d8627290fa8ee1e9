# Two targets for a newcomer: `make run` and `make test`. Each sets up .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.set-up
RECIPE ?= tiny
ARGS ?=

.PHONY: setup run test test-slow lint clean

setup: $(STAMP)

$(STAMP): scripts/setup.sh requirements.lock pyproject.toml
	PYTHON=$(PYTHON) sh scripts/setup.sh
	touch $(STAMP)

run: $(STAMP)
	$(BIN)/openqwen run $(RECIPE) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 3000 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
