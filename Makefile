# Two commands set everything up themselves: make demo, make test.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
# Started in seconds when nothing changed: the stamp is as new as what it was made from.
STAMP  := $(VENV)/.layerwise-installed

.PHONY: setup demo test lint docs ci clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing layerwise and its pinned dependencies into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/layerwise run demo --scale small --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP)
	@$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache
	@$(BIN)/python -m layerwise.jobs.docs --check

docs: $(STAMP)
	@$(BIN)/python -m layerwise.jobs.docs

ci:
	@bash .ci/run

clean:
	rm -rf $(VENV) runs build
