# The two commands of a newcomer are `make quickstart` and `make test`. On Windows: `make` comes with Git for Windows' SDK,
# or run the lines below by hand; README.md has them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
THREADS ?= 2

.PHONY: quickstart test test-long lint format docs benchmarks clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python tools/quickstart.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(THREADS)

test-long: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(THREADS) -m "long or not long"

lint: $(VENV)/installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/installed-dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: $(VENV)/installed
	$(BIN)/python tools/option_docs.py

clean:
	rm -rf quickstart .pytest_cache .mypy_cache .ruff_cache
