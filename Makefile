# make quickstart   the whole path on this machine, from archetypes to the axis, and the page that shows it
# make test         all tests          make check   lint, formatting, types
# Each does its own set-up: a virtual environment in .venv, made once and again whenever the pins change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One thread for each process: two OpenMP threads on two busy cores stand in each other's way.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# By environment, because only so the pins reach the build back-end, too.
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt

.PHONY: quickstart test test-faults test-ceph test-laptop chaos check format install clean

quickstart: $(STAMP)
	$(BIN)/persona-ray quickstart

# Tests that start clusters of Ray come one by one. Others wait for servers and other processes most of the time: three fill two cores.
SIDE_BY_SIDE := --numprocesses 3 --dist worksteal

test: $(STAMP).dev
	$(BIN)/python -m pytest -m "not long and not serial" $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m "serial and not long"

# Minutes of faults and deaths on a store; by one client, because the other one's take as long again.
test-faults: $(STAMP).dev
	$(BIN)/python -m pytest tests/s3 -m "long and not ceph" -k "not fsspec" $(SIDE_BY_SIDE) $(PYTEST_ARGS)

# The storage suites against Ceph's object gateway on loopback (needs root the first time, for the packages); nothing of it stays.
test-ceph: $(STAMP).dev
	infra/s3/with $(BIN)/python -m pytest tests/s3 -m "ceph and not long" $(SIDE_BY_SIDE) $(PYTEST_ARGS)

# A laptop's commands from an environment that really has no torch, against a real head.
test-laptop: $(STAMP).dev
	$(PYTHON) -m venv --clear .laptop
	.laptop/bin/python -m pip install --quiet .
	PERSONA_RAY_LAPTOP=$(CURDIR)/.laptop/bin/python $(BIN)/python -m pytest tests/cluster/test_submit.py $(PYTEST_ARGS)

# One run through 32 faults (killed actors, lost nodes, killed drivers and heads); PERSONA_RAY_SEED replays one.
chaos: $(STAMP).dev
	$(BIN)/python -m pytest tests/cluster/test_chaos.py -m long -s $(PYTEST_ARGS)

check: $(STAMP).dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP).dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP).dev

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[engine]'
	touch $@

$(STAMP).dev: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[engine,readers,dev]'
	touch $@

clean:
	rm -rf $(VENV) .laptop .pytest_cache .mypy_cache .ruff_cache .hypothesis persona-ray-quickstart
