# Each target makes the virtual environment .venv when it is missing. PYTHON picks the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
PIP := .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: quickstart test lint clean

quickstart: .venv/.installed-quickstart
	.venv/bin/python scripts/quickstart.py $(ARGS)

test: .venv/.installed-test
	.venv/bin/python -m pytest $(ARGS)

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/.installed-%: setup.py constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) '.[$*]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
