# Two commands do all the set-up: `make demo` and `make test`. Nothing outside .venv and the cache is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-adapters test-peft soak check setup clean

setup: $(VENV)/.stamp

# torch first and pinned: an unpinned torch brings gigabytes of CUDA libraries. A torch that is already there is kept.
$(VENV)/.stamp: pyproject.toml requirements-lock.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-lock.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

# Triton, for the tests of the GPU kernel: its interpreter needs no GPU; bitsandbytes and torchao, for those of quantised
# bases; TRL and Lightning; seqeval; schedulefree; Ray, for sweeps on a cluster. What is already there is kept.
$(VENV)/.stamp-test: requirements-test.txt $(VENV)/.stamp
	$(BIN)/python -c "import triton, bitsandbytes, torchao, trl, lightning, seqeval, schedulefree, ray, msgpack, google.protobuf, jsonschema, requests" 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-test.txt
	touch $@

# The adapters library pins transformers 4.57: an environment of its own, which so tests that transformers major too.
$(VENV)-adapters/.stamp: pyproject.toml requirements-adapters.txt
	test -x $(VENV)-adapters/bin/python || $(PYTHON) -m venv $(VENV)-adapters
	$(VENV)-adapters/bin/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(VENV)-adapters/bin/python -m pip install -q --disable-pip-version-check -r requirements-adapters.txt
	$(VENV)-adapters/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

demo: setup
	$(BIN)/unmask demo

# Two processes of one thread each: with two threads each they would wait for one another. A file is not divided, for its fixtures.
test: setup $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The long forms of tests, in an order that SEED shuffles, each for SECONDS at most.
SEED ?= 0
SECONDS ?= 200
soak: setup $(VENV)/.stamp-test
	for each in tests/soak/*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$each --seed $(SEED) --seconds $(SECONDS) || exit 1; done

test-adapters: $(VENV)-adapters/.stamp
	$(VENV)-adapters/bin/python -m pytest tests/environments/adapters tests/lab/training/test_lora.py tests/lab/test_inside.py tests/calibration/test_sparse_adapter.py tests/lab/training/test_series.py tests/cli/test_cli.py "tests/test_resume.py::test_a_resumed_run_is_bitwise_the_uninterrupted_one[unmask-train-pfeiffer]"

# The PEFT method with the newest PEFT 0.20 too, put beside the environment's own.
test-peft: setup $(VENV)/.stamp-test
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade --target $(VENV)/peft-0.20 --no-deps 'peft==0.20.*'
	PYTHONPATH=$(VENV)/peft-0.20 $(BIN)/python -c "import peft; assert peft.__version__.startswith('0.20.')"
	PYTHONPATH=$(VENV)/peft-0.20 $(BIN)/python -m pytest tests/peft

check: setup $(VENV)/.stamp-test
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m unmask.cli.reference --check docs/cli.md
	$(BIN)/python -m pytest --doctest-modules src/unmask --ignore=src/unmask/cli -p no:cacheprovider

clean:
	rm -rf $(VENV) $(VENV)-adapters build dist .pytest_cache .mypy_cache .ruff_cache
