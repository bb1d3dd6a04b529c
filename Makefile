# Each target makes the virtual environment .venv when it is missing. PYTHON picks the interpreter, VENV another folder:
# make test PYTHON=python3.12 VENV=.venv-3.12
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
PYTHON_OF_VENV := $(VENV)/bin/python
PIP := $(PYTHON_OF_VENV) -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS) --editable

.PHONY: quickstart test test-lowest coverage mutations faults lint docs-check bench bench-gpu clean

quickstart: $(VENV)/.installed-quickstart
	$(PYTHON_OF_VENV) scripts/quickstart.py $(ARGS)

test: $(VENV)/.installed-test
	$(PYTHON_OF_VENV) -m pytest $(ARGS)

# with the lowest versions that setup.py admits
test-lowest:
	$(MAKE) test VENV=$(VENV)-lowest CONSTRAINTS=constraints-lowest.txt

coverage: $(VENV)/.installed-test
	$(PYTHON_OF_VENV) -m pytest --cov lit_llama --cov-branch --cov-report term-missing $(ARGS)

mutations: $(VENV)/.installed-test
	$(PYTHON_OF_VENV) tests/mutations.py $(ARGS)

faults: $(VENV)/.installed-test
	$(PYTHON_OF_VENV) tests/faults.py $(ARGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs-check: $(VENV)/.installed-test
	$(PYTHON_OF_VENV) tests/docs_check.py $(ARGS)

bench: $(VENV)/.installed-litgpt
	$(PYTHON_OF_VENV) benchmarks/finetune.py $(ARGS)
	$(PYTHON_OF_VENV) benchmarks/generate.py
	$(PYTHON_OF_VENV) benchmarks/busy.py $(ARGS)
	$(PYTHON_OF_VENV) benchmarks/prepare.py $(ARGS)
	$(PYTHON_OF_VENV) benchmarks/load.py
	$(PYTHON_OF_VENV) benchmarks/many_loras.py
	$(PYTHON_OF_VENV) benchmarks/flags.py $(ARGS)
	$(PYTHON_OF_VENV) benchmarks/report.py

bench-gpu: $(VENV)/.installed-benchmarks
	$(PYTHON_OF_VENV) benchmarks/gpu.py $(ARGS)

# litgpt pins older versions of what it needs than those tested here; the installed ones do
$(VENV)/.installed-litgpt: $(VENV)/.installed-benchmarks
	$(PYTHON_OF_VENV) -m pip install --disable-pip-version-check --no-deps litgpt==0.5.13
	touch $@

$(VENV)/.installed-%: setup.py $(CONSTRAINTS)
	test -x $(PYTHON_OF_VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) '.[$*]'
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache
