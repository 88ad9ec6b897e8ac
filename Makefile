# make fit [CONFIG=conf/hopper.yaml] [ARGS="--trainer.devices 2"]   train
# make test | make test-slow | make check | make format | make bench  develop
PYTHON ?= python3
CONFIG ?= conf/pendulum.yaml
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help fit test test-slow check format bench clean
help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[dmc]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dmc,envpool,ray,video,report,theory,offline,modes,umap,export,dev]'
	touch $@

fit: .venv/.installed  ## train: CONFIG=conf/NAME.yaml, ARGS="more settings"
	$(BIN)/qsm-fit --config $(CONFIG) $(ARGS)

test: .venv/.installed-dev  ## the fast test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-slow: .venv/.installed-dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: .venv/.installed-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed-dev  ## time of updates, actions and the whole loop on this machine; about an hour
	$(PIP) --editable '.[bench]'
	$(BIN)/python -m benchmarks.update --json docs/results/update.json
	$(BIN)/python -m benchmarks.loop --json docs/results/loop_all.json
	$(BIN)/python -m benchmarks.scaling --out docs/results/scaling

format: .venv/.installed-dev  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what make made, runs excepted
	rm -rf .venv build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
