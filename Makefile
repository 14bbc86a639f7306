# Set-up is part of every target: .venv is made on a machine that has only Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PLANNING := .venv-aot
# A file of tests at a time on each core, on four at most: a worker takes about 3 GiB.
TEST := $(RUN) -m pytest -n auto --maxprocesses=4 --dist=loadfile

.PHONY: demo test test-slow lint plan docs

demo: $(VENV)/ready
	$(RUN) -m tools.demo

test: $(VENV)/ready-dev
	$(TEST)

test-slow: $(VENV)/ready-dev
	$(TEST) -m "slow or not slow"

# What fits on which accelerator; its compilers need an environment of their own.
plan: $(PLANNING)/ready
	mkdir -p runs
	$(PLANNING)/bin/python -m tools.aot_compile --all --json=runs/plans.json

lint: $(VENV)/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The site, in site/; its pages open without a web server.
docs: $(VENV)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

# What runs the model; the tests need the reference implementations, PyTorch's among them, besides.
$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-dev: $(VENV)/ready $(foreach name,convert corpus evaluation dev,requirements-$(name).txt)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(PLANNING)/ready: requirements.txt requirements-aot.txt
	$(PYTHON) -m venv $(PLANNING)
	$(PLANNING)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-aot.txt
	touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@
