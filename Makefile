# SPDX-License-Identifier: Apache-2.0
# Each target sets up what it needs in .venv (tools/bootstrap.sh) and then runs. PYTHON=, TORCH= and VIDEO= override.
PY := .venv/bin/python
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
TESTED := test,video,model,triton
# The tests of a file stay in one process, for what they set up together.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q tests -n auto --maxprocesses=8 --dist=loadfile

.PHONY: demo test test-all bench lint clean

demo:
	@tools/bootstrap.sh video,model
	$(PY) -m examples.demo $(if $(VIDEO),--video "$(VIDEO)")

test:
	@tools/bootstrap.sh $(TESTED)
	$(PYTEST) -m "not slow"

test-all:
	@tools/bootstrap.sh $(TESTED)
	$(PYTEST)

bench:
	@tools/bootstrap.sh $(TESTED),bench
	$(PY) -m pytest benchmarks --benchmark-only

lint:
	@tools/bootstrap.sh $(TESTED),dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run --Werror $(CPP)

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .venv/.lrc-* lrc_kernels/_C.*.so
