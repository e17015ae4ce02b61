# Two commands on a fresh machine with Python and make: `make demo` and `make test`.
# Both set up .venv by themselves, and again when pyproject.toml, constraints.txt or PYTHON changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The interpreter is part of the stamp's name: another PYTHON makes another stamp, and so a new .venv.
STAMP  := $(VENV)/.installed-$(shell $(PYTHON) -c 'import hashlib, sys; print(hashlib.md5((sys.version + sys.base_prefix).encode()).hexdigest()[:12])')

SANITIZED := "mixed_dtype or zero_size or nan_and_inf"

LIVES := tests/growth tests/gradients/test_fuzz.py

.PHONY: demo test test-unit test-lives test-rest test-parallel test-clients test-kernels test-wheel test-versions test-gpu sanitize-gpu check docs bench bench-cpu bench-gpu clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python -m seedtriton demo

# Two at a time, because two cores are what CI has, the longest first. Only many ranks want both to themselves.
test: $(STAMP)
	$(MAKE) -j2 --output-sync=target test-lives test-rest test-clients test-kernels test-wheel
	$(MAKE) test-parallel

# Lives and training loops take as long as all the rest.
test-unit: $(STAMP)
	$(MAKE) -j2 --output-sync=target test-lives test-rest

test-lives: $(STAMP)
	$(BIN)/python -m pytest -q -m "not gpu" $(LIVES)

test-rest: $(STAMP)
	$(BIN)/python -m pytest -q -m "not gpu" tests $(LIVES:%=--ignore=%) --ignore=tests/parallel --ignore=tests/clients \
		--ignore=tests/kernels/emulator --ignore=tests/kernels/launcher

# Two and four processes each, on loopback, with time limits.
test-parallel: $(STAMP)
	$(BIN)/python -m pytest -q tests/parallel

# Inside real clients. It fails where one is missing: a lane that skips everything proves nothing.
test-clients: $(STAMP)
	$(BIN)/python -m pytest -q tests/clients

# The interpreter has to be on before the process starts, so it is a process of its own.
# Triton builds its launcher with a C compiler; without one that lane would skip itself.
test-kernels: $(STAMP)
	$(BIN)/python -c 'import os, shutil; assert os.getenv("CC") or shutil.which("cc"), "make test-kernels needs a C compiler"'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/kernels/interpreter
	$(BIN)/python -m pytest -q tests/kernels/emulator tests/kernels/launcher

# sdist -> wheel -> an empty environment, where the package and its kernels must be importable.
test-wheel: $(STAMP)
	$(BIN)/python tests/check_wheel.py

# Other versions of torch and Triton, each in an environment of its own: tens of gigabytes and an hour, so not in CI.
test-versions: $(STAMP)
	$(BIN)/python -m bench.versions
	$(BIN)/python bench/report.py --write

# On a machine with a GPU, with the torch and triton that are there: make test-gpu PYTHON=python3
# It fails where there is no GPU: a lane that skips everything proves nothing.
test-gpu:
	$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"'
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu tests --ignore=tests/clients
	PYTHONPATH=.:tests $(PYTHON) -m pytest -q tests/test_examples.py  # which take the device that is there

# memcheck and racecheck over the small cases; compute-sanitizer comes with the CUDA toolkit.
sanitize-gpu:
	PYTHONPATH=. compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest -q -m gpu tests/kernels -k $(SANITIZED)
	PYTHONPATH=. compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m pytest -q -m gpu tests/kernels -k $(SANITIZED)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site of docs/ into build/site: strict, so that a dead link or a name that is gone is an error. No network.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

bench: $(STAMP)
	$(BIN)/python -m pytest bench -q --benchmark-columns=median,iqr,rounds --benchmark-sort=name \
		--benchmark-group-by=group

# The README's figures: raw output into bench/results, then tables and pictures from it. On a quiet machine.
bench-cpu: $(STAMP)
	$(BIN)/python -m bench.performance --device cpu
	$(BIN)/python bench/report.py --write

# With the torch and triton that are there: make bench-gpu PYTHON=python3
bench-gpu:
	PYTHONPATH=. $(PYTHON) -m bench.performance --device cuda

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo,test,dev,clients,docs]"
	touch $@
