# Two commands need nothing but Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
# Bytecode is made when a module is first imported, because most never are. It must be kept, or every process
# (a worker, a command) would compile torch and pandas again: 10 CPU seconds in place of 4 to import the driver.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)
SOURCES := autoscale_ray jobs tests benchmarks
export OMP_NUM_THREADS ?= 1
# Ray on one machine: loopback only, no telemetry, short waits.
RAY_ENV := RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 \
	RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.1 RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0 \
	RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=20 RAY_DATA_DISABLE_PROGRESS_BARS=1 RAY_DEDUP_LOGS=0

# The embedded default, with fewer scored scenes and one seed per arm, so that a laptop is done in minutes.
DEMO := loop.final_seeds=1 world.num_dev_per_family=60 world.num_test_per_family=60 representation.num_steps=250

.PHONY: help demo demo-real check lint unit test test-slow bench format clean

help:
	@echo "make demo                 install into $(VENV) and run the loop on the built-in world (about 5 min, 2 cores)"
	@echo "make demo-real DATA=DIR   run the loop on recorded and simulated traffic under DIR (about 2 min)"
	@echo "make check                lint, import rules, types, unit tests"
	@echo "make test                 everything that continuous integration runs"
	@echo "make test-slow            kill campaigns, long fuzz runs, cluster tests"
	@echo "make bench                every benchmark with its targets checked"

$(VENV)/cpu: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[cpu]'
	touch $@

$(VENV)/dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[cpu,dev]'
	touch $(VENV)/cpu $@

demo: $(VENV)/cpu
	$(BIN)/autoscale run --out demo $(DEMO)

demo-real: $(VENV)/cpu
	@test -n "$(DATA)" || { echo "usage: make demo-real DATA=<folder with recordings>"; exit 2; }
	$(BIN)/python -m jobs.demo_real --data "$(DATA)" --out demo-real

lint: $(VENV)/dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/pyright --threads 2 --pythonpath $(BIN)/python

unit: $(VENV)/dev
	$(BIN)/python -m pytest tests/unit tests/golden -m "not slow" -n 2 --dist loadfile

check: lint unit

test: check
	$(BIN)/python -m pytest tests/device -n 2
	$(RAY_ENV) $(BIN)/python -m pytest tests/ray -m "not slow"

test-slow: $(VENV)/dev
	$(RAY_ENV) $(BIN)/python -m pytest tests -m slow --timeout 3600

bench: $(VENV)/dev
	@for program in benchmarks/bench_*.py; do \
	  echo "== $$program"; $(RAY_ENV) $(BIN)/python -m benchmarks.$$(basename $$program .py) --check || failed=1; \
	done; test -z "$$failed"

format: $(VENV)/dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
