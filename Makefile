# Each target makes the virtual environment .venv when it is missing. PYTHON picks the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
PYTHON_OF_VENV := .venv/bin/python
PIP := $(PYTHON_OF_VENV) -m pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: quickstart test lint docs-check bench bench-gpu clean

quickstart: .venv/.installed-quickstart
	.venv/bin/python scripts/quickstart.py $(ARGS)

test: .venv/.installed-test
	.venv/bin/python -m pytest $(ARGS)

lint: .venv/.installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs-check: .venv/.installed-test
	.venv/bin/python tests/docs_check.py $(ARGS)

bench: .venv/.installed-litgpt
	$(PYTHON_OF_VENV) benchmarks/finetune.py $(ARGS)
	$(PYTHON_OF_VENV) benchmarks/generate.py
	$(PYTHON_OF_VENV) benchmarks/prepare.py $(ARGS)
	$(PYTHON_OF_VENV) benchmarks/load.py
	$(PYTHON_OF_VENV) benchmarks/many_loras.py
	$(PYTHON_OF_VENV) benchmarks/flags.py $(ARGS)
	$(PYTHON_OF_VENV) benchmarks/report.py

bench-gpu: .venv/.installed-litgpt
	$(PYTHON_OF_VENV) benchmarks/random_model.py
	$(PYTHON_OF_VENV) benchmarks/report.py

# litgpt pins older versions of what it needs than those tested here; the installed ones do
.venv/.installed-litgpt: .venv/.installed-benchmarks
	$(PYTHON_OF_VENV) -m pip install --disable-pip-version-check --no-deps litgpt==0.5.13
	touch $@

.venv/.installed-%: setup.py constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) '.[$*]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
