# Two commands do everything: `make demo` and `make test`. Each sets up what it needs in .venv, once, and says so.

# The newest Python that runs; python3 last, so that a plain machine needs nothing else.
ifndef PYTHON
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3.10 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; done)
endif
VENV ?= .venv
# --system-site-packages keeps the torch that a machine has already, such as that of a GPU image.
VENV_FLAGS ?=
BENCH ?= all --quick
SOAK_SECONDS ?= 600
# Two processes at a time halve the time of the tests; on a GPU they would take each other's memory.
ifndef PYTEST_FLAGS
PYTEST_FLAGS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo --numprocesses 2 --dist loadfile --no-loadscope-reorder)
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test docs notebooks lint bench nightly soak clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

demo: $(VENV)/.demo  ## a Llama with paged attention, pcg against eager; on the GPU if there is one
	@echo "==> 3 of 3: running examples/quickstart.py (about 20 seconds on a CPU, 1 minute on a GPU)"
	@$(BIN)/python -u examples/quickstart.py

test: $(VENV)/.made  ## all tests that this machine can run
	@echo "==> 3 of 3: running the tests (about an hour on 2 CPU cores; one file: $(BIN)/python -m pytest tests/test_batch.py)"
	@$(BIN)/python -m pytest tests $(PYTEST_FLAGS)

docs: $(VENV)/.docs  ## the documentation as a site in site/, every warning an error
	@echo "==> 3 of 3: building site/ (about 10 seconds)"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "    open site/index.html"

notebooks: $(VENV)/.made  ## run the notebooks and store their outputs (about 3 minutes)
	@echo "==> 3 of 3: running examples/*.ipynb"
	@$(BIN)/python tests/notebooks.py

lint: $(VENV)/.made  ## ruff and mypy
	@echo "==> ruff and mypy"
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

bench: $(VENV)/.made  ## the benchmarks; BENCH="step --help" for one of them
	@echo "==> python -m benchmarks $(BENCH)"
	@$(BIN)/python -m benchmarks $(BENCH)

nightly: $(VENV)/.made  ## the differential tests at full size (hours)
	@echo "==> running the differential tests at full size"
	@PCG_NIGHTLY=1 $(BIN)/python -m pytest tests/test_op_db.py tests/test_random_graphs.py

soak: $(VENV)/.made  ## random traffic for SOAK_SECONDS (600), compared with eager as it goes
	@echo "==> running random traffic for $(SOAK_SECONDS) seconds"
	@$(BIN)/python -m benchmarks soak --seconds $(SOAK_SECONDS)

clean:  ## remove the virtual environment and build products
	@echo "==> removing $(VENV), build products and caches"
	@rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# $(call install,EXTRAS,WHAT FOR): a torch that the machine has, outside the virtual environment, stays.
define install
	@echo "==> 2 of 3: installing pcg-compile for $(2) (2 to 15 minutes, once: most of it downloads PyTorch)"
	@if $(BIN)/python -c 'import sys, importlib.util as u; s = u.find_spec("torch"); sys.exit(not (s and s.origin) or s.origin.startswith(sys.prefix))'; \
	then echo "    keeping the machine's torch"; constraints=; else constraints="-c constraints.txt"; fi; \
	$(PIP) install $$constraints -e '.[$(1)]'
	@touch $@
endef

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(call install,transformers,the demo)

$(VENV)/.made: $(VENV)/.python pyproject.toml constraints.txt
	$(call install,test$(comma)examples,its tests and examples)

$(VENV)/.docs: $(VENV)/.python pyproject.toml
	@echo "==> 2 of 3: installing what builds the documentation (30 seconds, once)"
	@# What mkdocs needs, without pcg-compile and PyTorch: the site is made from the sources alone.
	@$(BIN)/python -c "$$DOCS_EXTRA" | xargs $(PIP) install
	@touch $@

comma := ,
define DOCS_EXTRA
import re
text = re.search(r'^docs = \[(.*)\]$$', open('pyproject.toml').read(), re.M)[1]
print(*re.findall(r'"([^"]+)"', text), sep="\n")
endef
export DOCS_EXTRA

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "No Python from 3.10 on was found. On Debian or Ubuntu: sudo apt-get install python3 python3-venv"; exit 1; }
	@echo "==> 1 of 3: making $(VENV) with $(PYTHON), $$($(PYTHON) --version) (10 seconds)"
	@# Debian ships python3 without venv: then virtualenv, or the missing package where we may install it.
	@make_venv() { $(PYTHON) -m venv $(VENV_FLAGS) $(VENV) >/dev/null 2>&1; }; \
	test -x $(BIN)/pip || make_venv \
	|| { $(PYTHON) -m virtualenv --version >/dev/null 2>&1 && echo "    venv is missing: using virtualenv" \
	     && $(PYTHON) -m virtualenv -q $(VENV_FLAGS) $(VENV); } \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "    venv is missing: installing $(notdir $(PYTHON))-venv with apt-get" \
	     && apt-get update -qq && apt-get install -y -qq $(notdir $(PYTHON))-venv >/dev/null && make_venv; } \
	|| { echo "$(PYTHON) has no venv. On Debian or Ubuntu: sudo apt-get install $(notdir $(PYTHON))-venv"; exit 1; }
	@touch $@
