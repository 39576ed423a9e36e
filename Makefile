# SPDX-License-Identifier: Apache-2.0
# Every target but help and clean first makes the virtual environment and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
sources := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help test demo demo-hf bench lint sanitize wheel clean

help:
	@echo 'make test      run the tests; ARGS="-k scan" goes to pytest'
	@echo 'make demo      train a language model on text; DATA=file or folder, ARGS="--resume"'
	@echo 'make demo-hf   generate with a transformers model, unpatched and patched; ARGS=...'
	@echo 'make bench     measure speed and memory; ARGS=...'
	@echo 'make lint      check format, style and types'
	@echo 'make sanitize  run the kernels under the address and undefined-behaviour sanitizers'
	@echo 'make wheel     build a wheel into dist/'
	@echo 'make clean     remove everything built, and the virtual environment'
	@echo 'Variables: PYTHON=python3, VENV=.venv, MAX_JOBS=processes to compile with,'
	@echo 'MAMBABLOCK_CUDA=AUTO, ON or OFF, TORCH_INDEX=package index to take torch from, such as'
	@echo 'https://download.pytorch.org/whl/cpu'

test: $(VENV)/installed-test
	$(bin)/python -m pytest $(ARGS)

demo: $(VENV)/installed-demo
	$(bin)/python examples/train_language_model.py $(if $(DATA),--data "$(DATA)") $(ARGS)

demo-hf: $(VENV)/installed-demo-hf
	$(bin)/python examples/hugging_face.py $(ARGS)

bench: $(VENV)/installed-bench
	$(bin)/python -m benchmarks $(ARGS)

lint: $(VENV)/installed-lint
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	    xargs $(bin)/clang-format --dry-run -Werror

sanitize: $(VENV)/requirements
	$(bin)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) \
	    -DMAMBABLOCK_SANITIZE=ON
	$(bin)/cmake --build build/sanitize --parallel $(or $(MAX_JOBS),$(shell nproc))
	$(bin)/ctest --test-dir build/sanitize --output-on-failure

# What an earlier build left in build/lib.* would go into the wheel.
wheel: $(VENV)/requirements
	rm -rf build/lib.*
	$(bin)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist python/mambablock.egg-info python/mambablock/*.so

# Torch, and pyproject.toml's requirements for building.
$(VENV)/requirements: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    f"mambablock: expected Python 3.10 or newer; got {sys.version.split()[0]}; pass PYTHON=...")'
	test -x $(bin)/pip || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip show --quiet torch 2> /dev/null || \
	    $(bin)/python -m pip install $(TORCH_INDEX:%=--index-url %) torch==2.13.0
	$(bin)/python -m pip install --quiet 'setuptools>=77' 'cmake>=3.22' ninja 'pybind11>=2.13'
	touch $@

# The project, editable, with one of its groups of optional dependencies.
$(VENV)/installed-%: $(VENV)/requirements $(sources)
	$(bin)/python -m pip install --quiet --no-build-isolation --editable '.[$*]'
	touch $@
