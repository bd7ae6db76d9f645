# One way to set up, for people and for CI: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-check paper-laptop test test-slow lint format clean

demo: .venv/cdl  ## a real sweep, its law, a figure and a prediction: about five minutes on two cores
	$(BIN)/cdl sweep --config=configs/demo.py --out=runs/demo

demo-check: .venv/cdl  ## the demo, then train the predicted horizon and compare
	$(BIN)/cdl sweep --config=configs/demo.py --out=runs/demo --check

paper-laptop: .venv/paper  ## every figure and table of the paper in small, and experiments/RESULTS.md: about an hour
	for script in experiments/fig[0-9]*.py experiments/tab[0-9]*.py; do $(BIN)/python $$script || exit; done
	$(BIN)/python experiments/results.py runs/paper-laptop

test: .venv/test  ## the tests, but for slow ones
	$(BIN)/python -m pytest -n auto

test-slow: .venv/test  ## the slow ones
	$(BIN)/python -m pytest -n auto -m slow

lint: .venv/dev  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: .venv/dev  ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## everything that make has made; results in runs/ stay
	rm -rf .venv build *.egg-info

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cdl needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/cdl: .venv/python setup.cfg pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

.venv/paper: .venv/cdl
	$(PIP) --editable '.[paper]'
	@touch $@

.venv/test: .venv/cdl
	$(PIP) --editable '.[test]'
	@touch $@

.venv/dev: .venv/cdl
	$(PIP) --editable '.[dev]'
	@touch $@
