# Everything Nybble can be asked to do, from a fresh clone. `make` alone lists it.
#
#   PYTHON=python3.12   the interpreter .venv is made from; default: the first of python3, python3.13, 3.12, 3.11 that is
#                       3.11 or newer. For the GPU targets: run with this interpreter as it is, and install nothing.
#   ARGS="-k norm"      passed on to pytest, and to `nybble bench run` and `nybble bench plot`
#   VENV=.venv          where the virtual environment is

VENV   ?= .venv
PYTHON ?=
ARGS   ?=

PY     := $(VENV)/bin/python
NYBBLE := $(VENV)/bin/nybble
STAMP  := $(VENV)/.installed

# A GPU machine often has its own CUDA build of torch: with PYTHON given, use that and leave the machine as it is.
ifeq ($(PYTHON),)
GPU_PY    := $(PY)
GPU_SETUP := $(STAMP)
else
GPU_PY    := $(PYTHON)
GPU_SETUP :=
test-gpu sanitize bench: export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
SANITIZER ?= $(or $(shell command -v compute-sanitizer),$(wildcard /usr/local/cuda/bin/compute-sanitizer),compute-sanitizer)

KERNELS = $(shell grep -hoE '^[a-z0-9_]+_kernel' src/nybble/ops/*/*.cu | sort -u)

.DEFAULT_GOAL := help
.PHONY: help install demo test docs gate snapshot lint format types hooks test-gpu sanitize bench plots clean

help:  ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## make .venv and install Nybble into it (every target that needs it does this first)

# One recipe, one shell: find a Python, make the environment, install what constraints.txt pins. The stamp is written
# last, so an interrupted install is done again, and a change of either file installs again.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	python=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: Nybble needs Python 3.11 or newer; found: $$($(or $(PYTHON),python3) --version 2>&1 | head -n 1)." >&2; \
	  echo "make: install one, or name one: make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	if ! $(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "Making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV); \
	fi; \
	quiet=-q; if [ -t 1 ]; then quiet=; fi; \
	echo "Installing Nybble and what it needs into $(VENV) (the first time takes minutes: torch is large)"; \
	$(PY) -m pip install $$quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	touch $@

demo: $(STAMP)  ## write text with the demo model, then its perplexity, fused and unfused
	$(NYBBLE) generate
	$(NYBBLE) ppl

test: $(STAMP)  ## all tests that need no GPU
	$(PY) -m pytest -n auto --maxprocesses 8 $(ARGS)

docs: $(STAMP)  ## only: every path, name, command and link in the documents exists
	$(PY) -m pytest tests/test_docs.py tests/test_import.py $(ARGS)

gate: $(STAMP)  ## only: every kernel compiles for every case, registers and spills as in the snapshot
	$(PY) -m pytest tests/test_kernels_compile.py $(ARGS)

snapshot: $(STAMP)  ## write the register and spill snapshot anew (then read its diff)
	$(PY) scripts/kernel_snapshot.py $(ARGS)

lint: $(STAMP)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)  ## ruff: repair what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(STAMP)  ## pyright
	$(PY) -m pyright --pythonpath $(PY)

hooks: $(STAMP)  ## check .pre-commit-config.yaml (`pre-commit install` puts the hooks in place)
	$(PY) -m pre_commit validate-config

test-gpu: $(GPU_SETUP)  ## the tests of tests/gpu; fails where there is no CUDA device
	$(GPU_PY) -m pytest tests/gpu -m gpu --require-gpu $(ARGS)

# memcheck sees the end of a tensor only if it is an allocation of its own, hence no caching. API errors are not shown:
# cuda-bindings asks the driver for entry points that older drivers lack, and handles the answer.
sanitize: $(GPU_SETUP)  ## compute-sanitizer over the kernels: memcheck, then racecheck
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --report-api-errors no --error-exitcode 1 $(GPU_PY) tests/gpu/sanitize.py
	$(SANITIZER) --tool racecheck --error-exitcode 1 $(addprefix --kernel-name kernel_name=,$(KERNELS)) $(GPU_PY) tests/gpu/sanitize.py --every-lane

bench: $(GPU_SETUP)  ## time the operations against their peers (ARGS="w4a16 --save" keeps the rows in results/)
	$(GPU_PY) -m nybble bench run $(ARGS)

plots: $(STAMP)  ## draw the documents' pictures, docs/ops/<op>.svg and docs/decode.svg, from the rows in results/
	$(NYBBLE) bench plot $(ARGS)

clean:  ## remove .venv, caches and build products
	rm -rf $(VENV) build dist src/nybble.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
