# For a machine with Python 3.11 or newer: `make demo` and `make test`; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Compiling all of torch and its companions takes longer than the rest of the installation; Python compiles what it
# imports, once, where nothing forbids it.
PIP = -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
# Models of the tests are too small for threads; a file's fixtures are made once.
PYTEST = -m pytest -n 3 --dist loadfile

# The torch that is tested: newer ones come as CUDA builds of several GB even where there is no GPU.
TORCH := 2.13.0
COMPILE = echo torch==$(TORCH) | $(RUN) -m uv pip compile pyproject.toml --quiet --universal --python-version 3.11 \
	--fork-strategy fewest --no-annotate --custom-compile-command 'make constraints' --constraint /dev/stdin $(UPGRADE)

.PHONY: help demo first-seed more-seeds test check lint imports test-newest test-oldest constraints mutants clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

# Training takes one core.  The other seeds have a folder of their own (commands take the newest store), and stop once
# the bug has grown, for five minutes in all.
demo: $(VENV)/installed  ## set up, then cache, patch and report the embedded series, two controls, and two more seeds
	@$(MAKE) --no-print-directory --jobs 2 first-seed more-seeds
	@$(VENV)/bin/headlapse compare --verbose cache/demo-decimal.zarr cache/seeds/demo-seed?-decimal.zarr

first-seed:
	$(VENV)/bin/headlapse cache
	$(VENV)/bin/headlapse patch --protocol published --layers all --checkpoints step48 step64 step80 step256
	$(VENV)/bin/headlapse patch --subsets lattice
	@$(VENV)/bin/headlapse mechanism --parts roles
	@$(VENV)/bin/headlapse report
	@$(RUN) scripts/controls.py

more-seeds: export HEADLAPSE_CACHE = cache/seeds
more-seeds:
	@mkdir -p cache/seeds && (for seed in 1 2; do $(VENV)/bin/headlapse cache --model demo-seed$$seed \
		--checkpoints step0..step128 --then patch --subsets even odd all each balanced || exit 1; done) > cache/seeds/log.txt 2>&1 \
		|| { cat cache/seeds/log.txt; exit 1; }

# Type checkers use one core each.
test: $(VENV)/tools  ## set up, then run everything: lint, types, all tests
	$(MAKE) --no-print-directory --jobs 2 lint imports
	$(RUN) $(PYTEST)

check: lint  ## lint, types and the fast tests
	$(RUN) $(PYTEST) --quiet -m 'not slow and not thorough'

lint: $(VENV)/tools  ## ruff and strict mypy
	$(RUN) -m ruff check --quiet .
	$(RUN) -m ruff format --quiet --check .
	$(RUN) -m mypy

imports: $(VENV)/tools  ## pyright finds every import in the bare clone
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(RUN)

# Verdicts stay in build/mutants: what was interrupted goes on.  `python -m tests.mutants --help` has shares and rooms.
mutants: $(VENV)/tools  ## change the code in small ways and list what no test notices; hours
	$(RUN) $(PIP) 'mutmut>=3.8,<4'
	$(RUN) -m tests.mutants --survivors $(MUTANTS)

# Both ends of the ranges in pyproject.toml, each in an environment of its own.  The oldest torch that is tried is the
# one above: PyPI's older ones for Linux are CUDA builds, and each wants the one Triton it was built with.
test-newest:  ## the whole suite with the newest versions that pyproject.toml admits
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python $(PIP) --upgrade setuptools
	$(VENV)-newest/bin/python $(PIP) --upgrade --upgrade-strategy eager --no-build-isolation --editable '.[test]'
	$(VENV)-newest/bin/python $(PYTEST)

test-oldest:  ## the whole suite with the oldest versions that pyproject.toml admits; needs Python 3.11 or 3.12
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python $(PIP) --constraint constraints-oldest.txt setuptools
	$(VENV)-oldest/bin/python $(PIP) --constraint constraints-oldest.txt --no-build-isolation --editable '.[test]'
	$(VENV)-oldest/bin/python $(PYTEST)

# What is installed stays as it is pinned, unless UPGRADE=--upgrade.
constraints: $(VENV)/tools  ## pin what pyproject.toml newly requires
	$(RUN) $(PIP) uv
	$(COMPILE) --extra test --extra lint --output-file constraints.txt
	$(COMPILE) --extra test --resolution lowest-direct --upgrade --output-file constraints-oldest.txt

# The stamp is touched last: an interrupted installation is simply done again.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headlapse needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) $(PIP) --constraint constraints.txt setuptools
	$(RUN) $(PIP) --constraint constraints.txt --no-build-isolation --editable .
	touch $@

$(VENV)/tools: $(VENV)/installed  # what tests, linters and type checkers need besides
	$(RUN) $(PIP) --constraint constraints.txt --no-build-isolation --editable '.[test,lint]'
	touch $@

clean:  ## remove environments and what tools leave behind; cache/ stays
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest *.egg-info build dist .mypy_cache .pytest_cache .ruff_cache
