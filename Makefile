PYTHON ?= python3
TORCH := 2.13.0
BIN := .venv/bin
READY := .venv/.ready

# two threads are many times slower than one for tensors this small
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-comfyui bench quality train-demo lint mutants

help:
	@echo "make demo | test | test-comfyui | lint | bench | quality | train-demo | mutants (see CONTRIBUTING.md)"

$(READY): pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==$(TORCH)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python -m wantrim.demo

# the pytest script, not `python -m pytest`: that puts the root on sys.path, where nodes/ hides ComfyUI's
test: $(READY)
	$(BIN)/pytest -q -rs -n auto --maxprocesses 4 --dist loadfile --ignore=tests/comfyui --ignore=tests/kernels tests
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -q -rs tests/kernels
	sh tests/run_comfyui.sh

test-comfyui:
	sh tests/run_comfyui.sh --required

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -q tests/test_layering.py

# `make bench ARGS=--gpu` times real sizes and the kernels on a GPU
bench: $(READY)
	$(BIN)/python -m wantrim.benchmarks.speed $(ARGS)

# the fast subset; `make quality ARGS=--full` is the whole table
quality: $(READY)
	$(BIN)/python -m wantrim.benchmarks.quality $(ARGS)

# PARE's stages on the tiny Wan: about an hour and a half on two slow cores; stopped, it goes on with the same
train-demo: $(READY)
	$(BIN)/python -m wantrim.training tiny $(ARGS)

# small faults, one at a time, in a copy: which do the tests notice; a quarter of an hour
mutants: $(READY)
	$(BIN)/python -m pip install -q -e '.[mutants]'
	$(BIN)/python tests/mutants.py $(ARGS)
