# Two commands: `make demo` (set-up plus the main job) and `make test` (set-up plus tests). The set-up runs once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/args/* csrc/cpu/*)

.PHONY: demo test test-full mutants bench gpu lint clean setup

demo: setup
	$(BIN)/python -m gpt_kernels demo $(ARGS)

test: setup $(VENV)/.simulator
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)
	@# the op tests again, on the Triton and on the CUDA kernels; 5: ARGS chose none of them
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not slow" -k triton $(or $(ARGS),tests) || [ $$? -eq 5 ]
	GPT_KERNELS_TEST_BACKEND=cuda_sim $(BIN)/python -m pytest -n 2 -m "not slow" -k cuda_sim $(or $(ARGS),tests) || [ $$? -eq 5 ]

test-full: setup $(VENV)/.simulator
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -k triton $(or $(ARGS),tests) || [ $$? -eq 5 ]
	GPT_KERNELS_TEST_BACKEND=cuda_sim $(BIN)/python -m pytest -n 2 --dist loadgroup -k cuda_sim $(or $(ARGS),tests) || [ $$? -eq 5 ]
	$(if $(ARGS),,$(BIN)/python -m tests.mutants)

mutants: setup $(VENV)/.simulator
	$(BIN)/python -m tests.mutants $(ARGS)

# the ops under pytest-benchmark; `python -m gpt_kernels bench` is the command for people
bench: setup
	$(BIN)/python -m pytest benchmarks/bench_ops.py --benchmark-sort=name --benchmark-columns=min,median,iqr,rounds $(ARGS)

# for a machine with a GPU; on the torch of $(PYTHON) where that sees it, else on the pinned one (tools/gpu_setup.py)
gpu:
	@MAKE="$(MAKE)" $(PYTHON) -m tools.gpu_setup $(ARGS)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' '*.c' | xargs $(BIN)/clang-format --dry-run --Werror

clean:
	rm -rf $(VENV) .venv-gpu build dist *.egg-info gpt_kernels/*.so demo-out bench-out .benchmarks benchmarks/out
	find . -name __pycache__ -prune -exec rm -rf {} +

setup: $(VENV)/.built

$(VENV)/.dependencies: requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "set-up: no $(PYTHON) found; install Python >= 3.10 or name one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "set-up: $(PYTHON) is older than 3.10; name a newer one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "set-up: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "set-up: installing requirements-dev.txt into $(VENV) (once; torch is large)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt || { echo "set-up: requirements-dev.txt could not be installed, see above; is the package index reachable?"; exit 1; }
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@set -- $${CXX:-g++}; command -v "$$1" >/dev/null || { echo "set-up: no C++ compiler ($$1); install g++ or set CXX"; exit 1; }
	@echo "set-up: building the C++ kernels (about a minute; later only what changed)"
	@GPT_KERNELS_BUILD=cpu $(BIN)/python setup.py -q build_ext --inplace || { echo "set-up: the C++ kernels could not be built, see above"; exit 1; }
	@GPT_KERNELS_BUILD=none $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e . || { echo "set-up: the package could not be installed, see above"; exit 1; }
	@touch $@

$(VENV)/.simulator: $(VENV)/.built $(wildcard csrc/cuda/* csrc/sim/*)
	@echo "set-up: building the CUDA kernels for their CPU model (tests only)"
	@GPT_KERNELS_BUILD=sim $(BIN)/python setup.py -q build_ext --inplace || { echo "set-up: the simulator could not be built, see above"; exit 1; }
	@touch $@
