# Two commands: `make demo` (set-up plus the main job) and `make test` (set-up plus tests). The set-up runs once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/cpu/*)

.PHONY: demo test test-full bench lint clean setup

demo: setup
	$(BIN)/python -m gpt_kernels demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-full: setup
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info gpt_kernels/*.so demo-out benchmarks/out
	find . -name __pycache__ -prune -exec rm -rf {} +

setup: $(VENV)/.built

$(VENV)/.dependencies: requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "set-up: no $(PYTHON) found; install Python >= 3.10 or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "set-up: $(PYTHON) is older than 3.10"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "set-up: $(PYTHON) has no venv module; on Debian: apt install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet -r requirements-dev.txt || { echo "set-up: could not install requirements-dev.txt; is the package index reachable?"; exit 1; }
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@command -v $${CXX:-g++} >/dev/null || { echo "set-up: no C++ compiler ($${CXX:-g++}); install g++ or set CXX"; exit 1; }
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e . || { echo "set-up: the C++ kernels did not build, see above"; exit 1; }
	@touch $@
