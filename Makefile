# Two commands do all the set-up: `make demo` and `make test`. Nothing outside .venv and the cache is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check setup clean

setup: $(VENV)/.stamp

# torch first and pinned: an unpinned torch brings gigabytes of CUDA libraries. A torch that is already there is kept.
$(VENV)/.stamp: pyproject.toml requirements-lock.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-lock.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

# Triton, for the tests of the GPU kernel: its interpreter needs no GPU; bitsandbytes and torchao, for those of quantised
# bases. What is already there is kept.
$(VENV)/.stamp-test: requirements-test.txt $(VENV)/.stamp
	$(BIN)/python -c "import triton, bitsandbytes, torchao" 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-test.txt
	touch $@

demo: setup
	$(BIN)/unmask demo

test: setup $(VENV)/.stamp-test
	$(BIN)/python -m pytest

check: setup $(VENV)/.stamp-test
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/python -m pytest --doctest-modules src/unmask --ignore=src/unmask/cli -p no:cacheprovider

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
