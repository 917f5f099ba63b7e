# make demo | test | ptx | soak | lint | bench | gpu | wheel | sanitize | abi-check | clean. All but gpu and
# abi-check live in .venv, built on first use from the versions pinned in requirements-dev.lock; once it
# stands, they need no network.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Without --no-compile pip spends longer on byte code than on everything else together.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --constraint requirements-dev.lock
PACKAGE := pyproject.toml setup.py requirements-dev.lock $(wildcard csrc/*/* csrc/*.h)
ARGS ?=
# What runs Triton's kernels on the CPU: whether Triton interprets is settled when it is imported.
INTERPRETED := $(wildcard tests/test_triton_*.py) tests/test_module_api.py -k 'triton'

.PHONY: demo test ptx soak lint bench gpu wheel sanitize abi-check clean

demo: $(VENV)/.demo
	$(PY) examples/activity_stream.py $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest --numprocesses auto $(filter --all-cases,$(ARGS)) $(INTERPRETED)

# The tests of Triton's kernels on what Triton compiles, executed on the CPU: some 10 minutes.
PTX := $(addprefix tests/test_triton_,$(addsuffix .py,ring_step input_step ring_steps attend_window attend_shared step_gradients)) \
	tests/test_module_api.py -k 'triton'
ptx: $(VENV)/.dev
	for capability in 80 90; do \
		CONTINUAL_MHA_PTX=$$capability OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --all-cases $(PTX) $(ARGS) || exit 1; \
	done

# A million steps of each kind, and as many ticks of a pool; says how fast, and how much memory grew.
soak: $(VENV)/.dev
	OMP_NUM_THREADS=1 CONTINUAL_MHA_SOAK_STEPS=1000000 $(PY) -m pytest --timeout 7200 -rP tests/test_soak.py $(ARGS)

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

# The CPU library with sanitizers, in a copy of the tree so that the plain one stays where it is.
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED := build/sanitize
SANITIZED_TESTS := $(addprefix tests/test_,$(addsuffix .py,native_cpu clips products quantized repeat step_node steps_node attend_window))
sanitize: $(VENV)/.dev
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -R continual_mha triton_kernels csrc tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	cd $(SANITIZED) && CXX=g++ CXXFLAGS="$(SANITIZE)" CONTINUAL_MHA_BUILD_CUDA=0 CONTINUAL_MHA_WERROR=0 \
		$(CURDIR)/$(PY) setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(CURDIR)/$(PY) -m pytest -p no:cacheprovider $(SANITIZED_TESTS)

# One wheel under the oldest and the newest torch: the documented example, and the tests of what
# torch's versions treat differently. It downloads both.
ABI_TESTS := $(addprefix tests/test_,$(addsuffix .py,clips compile operators reference_table state step_node steps_node))
abi-check: wheel
	for torch in 'torch==2.10.*' torch; do \
		rm -rf build/abi && $(PYTHON) -m venv build/abi && cp -R tests pyproject.toml build/abi && \
		build/abi/bin/pip install --quiet "$$torch" numpy hypothesis pytest-timeout safetensors \
			continual-inference && \
		build/abi/bin/pip install --quiet --no-deps dist/*.whl && \
		CONTINUAL_MHA_BACKEND=cpu build/abi/bin/python examples/quickstart.py && \
		(cd build/abi && bin/python -m pytest -p no:cacheprovider $(ABI_TESTS)) || exit 1; \
	done

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
