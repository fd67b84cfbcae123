# Everything runs in .venv, which the first target creates. Two commands to start with: make demo, make test.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
TORCH ?= torch==2.13.0
SOURCES := setup.py csrc/toolkit.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
EMULATOR_FILES := $(wildcard tests/emulator/*.h tests/emulator/*.cpp tests/emulator/*.cu tests/emulator/include/*.h)
PYTHON_FILES := setup.py csrc/toolkit.py mtlfast tests benchmarks examples docs
CXX_FILES := $(filter-out %.py,$(SOURCES)) $(EMULATOR_FILES) $(wildcard docs/design/wheels/*.h docs/design/wheels/*.cpp)

# A first build is for this machine's GPU, or for one architecture where there is none. Wheels name their own list.
export TORCH_CUDA_ARCH_LIST ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';' | grep . || echo 9.0)

# Warnings are errors here, not in a user's installation, whose compiler and torch may be others.
export MTLFAST_WERROR := 1

.PHONY: demo test test-all test-peers test-isa fuzz asan emu emu-asan cuda-check registers check-aarch64 compilers wheel wheel-check carry lint format bench clean
.DEFAULT_GOAL := test

build/ready: $(SOURCES) pyproject.toml $(VENV)/demo
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	$(PY) -m mtlfast info
	mkdir -p build && touch $@

# What the build and the demo need; then what tests and checks need beside it.
$(VENV)/demo: requirements-demo.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check '$(TORCH)'
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-demo.txt
	touch $@

$(VENV)/ready: requirements-dev.txt $(VENV)/demo
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	$(PY) -m pip install -q --disable-pip-version-check --no-deps LibMTL==1.1.5  # its weightings want none of them
	touch $@

demo: build/ready
	$(PY) examples/digits/main.py --seeds 1 --epochs 20 --out build/digits.png
	$(PY) -m mtlfast bench --quick

# Tests run in so many processes, each on one thread; of large grids they take a sample (tests/sampling.py).
PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(PROCESSES) --dist loadfile

test: build/ready $(VENV)/ready
	$(PYTEST) tests

# Every case of every grid.
test-all: build/ready $(VENV)/ready
	MTLFAST_GRID=all $(PYTEST) tests

# The tests of each op (named after csrc/ops_<op>.cpp) again with each instruction set that this machine has; the first
# test run used the widest.
OPS := $(patsubst csrc/ops_%.cpp,%,$(wildcard csrc/ops_*.cpp))
OP_TESTS := $(OPS:%=tests/test_%.py) tests/test_properties.py
ISAS ?= baseline avx2 avx512
test-isa: build/ready $(VENV)/ready
	for isa in $(ISAS); do \
	  echo "-- $$isa"; \
	  MTLFAST_CPU_CAPABILITY=$$isa $(PY) -c 'import mtlfast; mtlfast._native.C.isa()' 2>/dev/null || { echo "not on this machine"; continue; }; \
	  MTLFAST_CPU_CAPABILITY=$$isa $(PYTEST) $(OP_TESTS) || exit 1; \
	done

# What stands beside an installed original: TorchJD, ConFIG, LibMTL; and the drop-in faces.
test-peers: build/ready $(VENV)/ready
	$(PY) -m pytest tests/peers tests/test_compat_pcgrad.py

# The properties on 20 times as many random problems, and as many sequences of steps.
fuzz: build/ready $(VENV)/ready
	MTLFAST_EXAMPLES=20 $(PY) -m pytest tests/test_properties.py tests/test_implicit_graphs.py tests/test_state_machine.py

# And again under AddressSanitizer and UndefinedBehaviorSanitizer (alignment included): any report ends the run.
# Python is not linked with them, so they come first by LD_PRELOAD; Python's own leaks are not ours to report, and
# pytest must not capture what a dying process says. The build lies apart, or it and the others would recompile each other.
LIBRARY = $(shell $${CXX:-g++} -print-file-name=$(1))
asan: $(VENV)/ready
	MTLFAST_SANITIZE=1 MTLFAST_CUDA=0 $(PY) setup.py -q build --build-base build/asan/tmp --build-lib build/asan
	rm -rf build/asan/tests && cp -r tests pyproject.toml build/asan
	cd build/asan && export PYTHONPATH=$$PWD MTLFAST_REQUIRE_NATIVE=1 ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libstdc++.so)"; \
	$(abspath $(PY)) -c 'import mtlfast; assert mtlfast._native.module()' || exit 1; \
	for isa in $(ISAS); do \
	  echo "-- $$isa"; \
	  MTLFAST_CPU_CAPABILITY=$$isa $(abspath $(PY)) -c 'import mtlfast; mtlfast._native.C.isa()' 2>/dev/null || { echo "not on this machine"; continue; }; \
	  MTLFAST_CPU_CAPABILITY=$$isa $(abspath $(PY)) -m pytest -p no:cacheprovider --capture=sys $(OP_TESTS) || exit 1; \
	done

# Every CUDA kernel on the CPU, over the whole grid (`make test` takes a seeded sample of it), then under sanitizers.
emu: build/ready $(VENV)/ready
	MTLFAST_EMULATE=all $(PY) -m pytest tests/emulator

EMULATE ?= all
emu-asan: build/ready $(VENV)/ready
	export MTLFAST_EMULATE=$(EMULATE) MTLFAST_EMULATOR_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(call LIBRARY,libasan.so) $(call LIBRARY,libstdc++.so)"; \
	$(PY) -m pytest --capture=sys tests/emulator/test_kernels.py tests/emulator/test_elementwise_kernels.py tests/emulator/test_solve_kernels.py

# Every CUDA kernel for every architecture that it is meant for: fails if one spills or takes more registers than
# csrc/cuda/registers.json says, or if its machine code loads narrowly. `make registers` writes that table anew.
cuda-check: $(VENV)/ready
	TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0;12.0" MTLFAST_CUDA=1 $(PY) setup.py -q build --build-base build/archs/tmp --build-lib build/archs
	cd build/archs && PYTHONPATH=$$PWD $(abspath $(PY)) -m pytest $(abspath tests/test_cuda_build.py tests/test_cuda_sass.py)

registers:
	MTLFAST_WRITE_REGISTERS=1 $(MAKE) cuda-check

# The kernels' one source for other processors: what x86-64 compiles another compiler may refuse.
check-aarch64:
	for source in csrc/cpu/*.cpp; do \
	  echo $$source; \
	  aarch64-linux-gnu-g++ -std=c++20 -O3 -Wall -Wextra -Werror -DMTLFAST_ISA=baseline -DMTLFAST_VECTOR_BYTES=16 \
	    -c $$source -o /dev/null || exit 1; \
	done

# The extension as other compilers build it, without CUDA kernels, and the tests of the ops on it. Each clang needs its own
# OpenMP (libomp-19-dev for clang 19), of which Debian installs one at a time.
COMPILERS ?= g++-11 clang++-14 clang++-19
compilers: $(VENV)/ready
	for cxx in $(COMPILERS); do \
	  echo "-- $$cxx"; \
	  command -v $$cxx >/dev/null || { echo "not on this machine"; continue; }; \
	  build=build/compilers/$$cxx; \
	  CXX=$$cxx MTLFAST_CUDA=0 $(PY) setup.py -q build --build-base $$build/tmp --build-lib $$build || exit 1; \
	  rm -rf $$build/tests && cp -r tests pyproject.toml $$build; \
	  (cd $$build && PYTHONPATH=$$PWD MTLFAST_REQUIRE_NATIVE=1 $(subst $(PY),$(abspath $(PY)),$(PYTEST)) \
	    -p no:cacheprovider $(OP_TESTS)) || exit 1; \
	done

# One wheel for the torch in $(VENV), with kernels for every architecture; torch's own libraries stay outside it.
WHEEL_ARCHS ?= all
wheel: $(VENV)/ready
	rm -rf build/wheel build/lib* dist && mkdir -p build/wheel dist
	TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCHS)" MTLFAST_CUDA=1 $(PY) -W ignore setup.py -q egg_info --egg-base build/wheel \
	  --tag-build=+torch$$($(PY) -c 'import torch; print(".".join(torch.__version__.split(".")[:2]))') \
	  bdist_wheel --dist-dir build/wheel
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m auditwheel repair -w dist build/wheel/*.whl \
	  --exclude 'libtorch*.so' --exclude libc10.so --exclude libgomp.so.1
	ls -lh dist

# Installs it in empty environments and runs the tests there. Another torch to install beside it, such as the CUDA build
# of the same version: make wheel-check WHEEL_TORCH=torch===2.13.0. Another torch to build for, the oldest and the newest:
# make wheel-check VENV=build/torch-2.11 TORCH=torch==2.11.0, make wheel-check VENV=build/torch-2.14 TORCH=torch==2.14.1
WHEEL_TORCH ?= $(TORCH)
wheel-check: wheel
	MTLFAST_WHEEL="$$(echo $(CURDIR)/dist/*.whl)" MTLFAST_WHEEL_TORCH='$(WHEEL_TORCH)' $(PY) -m pytest -rs tests/test_wheel.py

# For a machine that cannot build: build/carry, with the package built for another Python and torch and one architecture,
# tested here under that Python. There the folder goes first on PYTHONPATH. The C library and libstdc++ that it asks for
# are named at the end. make carry PYTHON=python3.12 TORCH=torch==2.11.0
CARRY_ARCH ?= 9.0
CARRY_VENV ?= build/$(notdir $(PYTHON))-$(subst ==,-,$(TORCH))
CARRY_PY = $(abspath $(CARRY_VENV)/bin/python)
carry:
	$(MAKE) VENV=$(CARRY_VENV) $(CARRY_VENV)/demo
	$(CARRY_PY) -m pip install -q --disable-pip-version-check pytest pytest-xdist hypothesis
	rm -rf build/carry && mkdir -p build/carry
	TORCH_CUDA_ARCH_LIST=$(CARRY_ARCH) MTLFAST_CUDA=1 $(CARRY_PY) setup.py -q build --build-base $(CARRY_VENV)/build --build-lib build/carry
	cp -r tests pyproject.toml build/carry
	cd build/carry && PYTHONPATH=$$PWD MTLFAST_REQUIRE_NATIVE=1 OMP_NUM_THREADS=1 $(CARRY_PY) -m pytest tests -p no:cacheprovider \
	  -n $(PROCESSES) --dist loadfile --ignore=tests/emulator --ignore=tests/test_gpu_kit.py
	cd build/carry && $(CARRY_PY) -m mtlfast info
	@for library in GLIBC GLIBCXX; do \
	  objdump -T build/carry/mtlfast/_C*.so | grep -o "$${library}_[0-9.]*" | sort -V | tail -n 1; \
	done

bench: build/ready $(VENV)/ready
	$(PY) -m mtlfast bench
	$(PY) -m pytest benchmarks --benchmark-sort=name --benchmark-columns=min,median,iqr,rounds

lint: $(VENV)/ready
	$(VENV)/bin/ruff check $(PYTHON_FILES)
	$(VENV)/bin/ruff format --check $(PYTHON_FILES)
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix $(PYTHON_FILES)
	$(VENV)/bin/ruff format $(PYTHON_FILES)
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist mtlfast/_C*.so mtlfast/_build.json *.egg-info
