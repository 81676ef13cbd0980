# make demo   set up, fetch a real 135 M-parameter model, convert it, measure it with and without Θ
# make test   set up, pass all tests          make lint   style, types   make bench   side-by-side benchmarks
# make gpu    with an NVIDIA card: all that runs on one, checked and measured, into docs/results/cuda.md
# make test-isa   the tests that compare floats, once more as on other processors
#
# PYTHON=python3.12 picks the interpreter; TORCH=torch picks the newest torch (with CUDA on Linux);
# TEXT=some.txt makes the demo measure on that text too.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install

.PHONY: demo test test-isa lint bench gpu clean

demo: $(VENV)/.user
	$(PY) -m examples.demo $(if $(TEXT),--text "$(TEXT)")

test: $(VENV)/.developer
	-$(PY) -m nkat.models smollm2
	OMP_NUM_THREADS=1 $(PY) -m pytest -rs --durations=20 --numprocesses logical --dist loadfile

test-isa: $(VENV)/.developer
	$(PY) -m tests.support.isa

lint: $(VENV)/.developer
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.user
	$(PY) -m nkat.models smollm2
	$(PY) -m benchmarks.open_gguf
	$(PY) -m benchmarks.dequantise
	$(PY) -m benchmarks.svd
	$(PY) -m benchmarks.cpu_kernels
	$(PY) -m benchmarks.convert_7b

gpu: TORCH = torch
gpu: $(VENV)/.user
	$(PY) -m benchmarks.gpu

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.user: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.developer: $(VENV)/.user requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
