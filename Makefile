# Two commands for a fresh machine with Python 3.11 or newer: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(RUN) scripts/cache.py
	$(RUN) scripts/patch.py --protocol published --layers all
	$(RUN) scripts/patch.py --subsets lattice
	$(RUN) scripts/mechanism.py
	$(RUN) scripts/report.py

test: $(VENV)/installed lint
	$(RUN) -m pytest

# Type checkers do not follow editable installs: they see a plain copy.
lint: $(VENV)/installed
	$(RUN) -m ruff check .
	rm -rf build
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --upgrade --target build/typed .
	MYPYPATH=build/typed $(RUN) -m mypy

# The stamp is touched last: an interrupted installation is simply done again.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "headlapse needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info build .mypy_cache .pytest_cache .ruff_cache
