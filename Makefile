# make demo      serve the bundled models on 127.0.0.1:8000; other ports: make demo ARGS='--http-port 9000'
# make test      the fast test suite          make test-all   the slow tests too
# make lint      ruff, mypy --strict, layering
# make bench     measure against nginx and a real Triton (Linux, needs nginx-light, wrk, nghttp2-client)
#
# Needs Linux and Python 3.11 or newer, nothing else: everything is installed into .venv.
# Another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/python
# The suites run on two processes; SPREAD= runs them on one.
SPREAD ?= -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all lint bench clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(RUN) -m gateway demo $(ARGS)

test: $(VENV)/.installed-test
	$(RUN) -m pytest -m "not slow" $(SPREAD) $(ARGS)

test-slow: $(VENV)/.installed-test
	$(RUN) -m pytest -m slow $(SPREAD) $(ARGS)

test-all: $(VENV)/.installed-test
	$(RUN) -m pytest $(SPREAD) $(ARGS)

lint: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest tests/test_layering.py tests/test_repository.py

bench: $(VENV)/.installed-test
	$(RUN) -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) .venvs .bench .hypothesis .mypy_cache .ruff_cache

# The stamps depend on pyproject.toml, so a second run installs nothing and a changed dependency installs again.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/pip
	@echo "installing into $(VENV) (about 20 s) …"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/pip
	@echo "installing into $(VENV) (a minute or two) …"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or run: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old, 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
