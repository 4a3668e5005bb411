# The two commands of a newcomer are `make quickstart` and `make test`. On Windows: `make` comes with Git for Windows' SDK,
# or run the lines below by hand; README.md has them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
THREADS ?= 2

# CPU kernels that other machines have: those without AVX2, and those whose results don't depend on the make of the CPU.
# The tests marked `numeric` must pass under each (docs/development.md).
OTHER_CPU := MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default
CPU_SETTINGS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx512 \
	MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=COMPATIBLE
NUMERIC := -m "numeric and not long"

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
	$(OTHER_CPU) $(BIN)/python -m pytest -n $(THREADS) $(NUMERIC)

test-long: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(THREADS) -m "long or not long"
	for setting in $(CPU_SETTINGS); do for threads in 1 2; do \
		echo "numeric tests: $$setting, threads: $$threads"; \
		env $$setting TEST_THREADS=$$threads OMP_NUM_THREADS=$$threads MKL_NUM_THREADS=$$threads \
			$(BIN)/python -m pytest -n $(THREADS) $(NUMERIC) || exit 1; \
	done; done

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
