# Two commands do everything: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.10 python3; do command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' && echo $$p && break; done)
VENV ?= .venv
# For example --system-site-packages, on a machine that has torch already.
VENV_FLAGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help demo test lint bench nightly soak clean
help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/.made: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found: install one, for example with: apt-get install python3 python3-venv"; exit 1; }
	@echo "==> making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV) 2>/dev/null \
	  || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && $(PYTHON) -m venv $(VENV_FLAGS) $(VENV); } \
	  || { echo "python3 -m venv failed: install it, for example with: sudo apt-get install python3-venv"; exit 1; }
	@echo "==> installing pcg-compile and what its tests and examples need"
	@$(PIP) install -c constraints.txt -e '.[test,examples]'
	@touch $@

demo: $(VENV)/.made  ## a Llama with paged attention through recorded pieces, against eager; on the GPU if there is one
	@echo "==> running examples/quickstart.py"
	@$(BIN)/python examples/quickstart.py

test: $(VENV)/.made  ## all tests that this machine can run
	@echo "==> running the tests"
	@$(BIN)/python -m pytest tests

lint: $(VENV)/.made  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(VENV)/.made  ## the benchmarks, quick
	@$(BIN)/python -m benchmarks all --quick

nightly: $(VENV)/.made  ## differential tests at full size
	@PCG_NIGHTLY=1 $(BIN)/python -m pytest tests/test_op_db.py tests/test_random_graphs.py

soak: $(VENV)/.made  ## random traffic for a long time
	@PCG_SOAK_SECONDS=$${SECONDS_OF_SOAK:-600} $(BIN)/python -m pytest tests/test_soak.py -s

clean:  ## remove the virtual environment and build products
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
