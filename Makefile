# Every target sets up .venv by itself, once; it is refreshed when pyproject.toml or constraints.txt changes.
# Another interpreter: make install PYTHON=/path/to/python3.11

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install check test soak demo bench

help:
	@echo "make install   create $(VENV) and install crossft with everything that demo, test and check need"
	@echo "make demo      a few methods on two embedded domains: a table, a picture, a page"
	@echo "make test      the test suite, in 2 processes, without the soak runs"
	@echo "make check     format, lint, types, architecture"
	@echo "make soak      the long reliability runs"
	@echo "make bench     the benchmarks beside the peers; writes benchmarks/RESULTS.md"

install: $(STAMP)
	@echo "$(VENV) is ready: run '. $(BIN)/activate', then 'crossft --help'"

$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if [ -x $(BIN)/python ]; then \
	  $(BIN)/python -c "$$new_enough" || { \
	    echo "error: $(VENV) holds $$($(BIN)/python --version), crossft needs Python 3.11 or newer." >&2; \
	    echo "Remove the folder $(VENV) and run make again." >&2; exit 1; }; \
	else \
	  found=''; tried=''; \
	  for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python); do \
	    if "$$python" -c "$$new_enough" 2>/dev/null; then found=$$python; break; fi; \
	    tried="$$tried $$python ($$("$$python" --version 2>/dev/null || echo missing))"; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: crossft needs Python 3.11 or newer; tried$$tried." >&2; \
	    echo "Install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "==> creating $(VENV) with $$("$$found" --version)"; \
	  "$$found" -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "error: '$$found -m venv' failed; on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }; \
	fi
	@echo "==> installing crossft and its tested dependencies into $(VENV) (several minutes and gigabytes the first time)"
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt || { \
	  echo "error: pip could not install; see its message above. It needs the Python package index and about 8 GB of disk." >&2; \
	  exit 1; }
	@touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not soak"

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak --timeout 0

demo: $(STAMP)
	$(BIN)/python experiments/demo/run.py

bench: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r benchmarks/requirements.txt -c constraints.txt
	$(BIN)/python benchmarks/run.py
