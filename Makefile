# Everything runs in .venv, which the first target creates. Two commands to start with: make demo, make test.
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
PYTHON_FILES := setup.py mtlfast tests benchmarks examples
CXX_FILES := $(filter-out setup.py,$(SOURCES))

# A first build is for this machine's GPU, or for one architecture where there is none. Wheels name their own list.
export TORCH_CUDA_ARCH_LIST ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';' | grep . || echo 9.0)

.PHONY: demo test lint format bench clean
build/ready: $(SOURCES) pyproject.toml $(VENV)/ready
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	$(PY) -m mtlfast info
	mkdir -p build && touch $@

$(VENV)/ready: requirements-dev.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: build/ready
	$(PY) examples/digits/main.py
	$(PY) -m mtlfast bench --quick

test: build/ready
	$(PY) -m pytest tests

bench: build/ready
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
