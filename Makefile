# make demo | test | lint | bench | gpu | wheel | clean. Everything lives in .venv, built on first use from
# the versions pinned in requirements-dev.lock; once it stands, no target needs the network.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Without --no-compile pip spends longer on byte code than on everything else together.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --constraint requirements-dev.lock
PACKAGE := pyproject.toml setup.py requirements-dev.lock $(wildcard csrc/*/* csrc/*.h)
ARGS ?=
# What runs Triton's kernels on the CPU: whether Triton interprets is settled when it is imported.
INTERPRETED := $(wildcard tests/test_triton_*.py) tests/test_module_api.py -k 'triton'

.PHONY: demo test lint bench gpu wheel clean

demo: $(VENV)/.demo
	$(PY) examples/activity_stream.py $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest --numprocesses auto $(INTERPRETED)

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files '*.cpp' '*.cu' '*.cuh' '*.h' | xargs --no-run-if-empty $(VENV)/bin/clang-format --dry-run --Werror
	$(PY) -m mypy

bench: $(VENV)/.dev
	$(PY) -m bench $(ARGS)
	$(PY) -m bench.report

# On a machine with a GPU: builds in the tree, tests, measures. Installs nothing, and uses no .venv.
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

wheel: $(VENV)/.dev
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch comes first: the package's build looks for it and does without the native code where it is missing.
$(VENV)/.base: requirements-dev.lock
	@echo "Installing PyTorch and the package into $(VENV); this takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel torch
	touch $@

$(VENV)/.demo: $(VENV)/.base $(PACKAGE)
	$(PIP) --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --requirement requirements-dev.lock
	touch $@
