# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
#   CUDA=12 make …     wheels for older NVIDIA drivers (see constraints-cuda12.txt)
#   SITE=slurm/sites/minicluster.yaml make demo     the demo as SLURM jobs (first: make cluster-up, and source what it names)
#   PYTHON=python3.12  the interpreter the environment is made with (3.11 or 3.12)
SHELL := /bin/bash
PYTHON ?= python3
CUDA ?= 13
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready-cuda$(CUDA)
export CUDA
export MLFLOW_DISABLE_TELEMETRY := true

# the demo's experiment folder, where its folds run, the size of its fixture, and further words for submit_folds.py
DEMO ?= runs/demo
SITE ?= slurm/sites/local.yaml
FIXTURE ?=
WORDS ?=
# bf16 autocast only where the processor has instructions for it: elsewhere it is far slower than fp32
PRECISION ?= $(shell grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null && echo autocast || echo fp32)

.PHONY: demo test test-slow test-gpu lint format cluster-up cluster-down

demo: $(READY)
	@$(PY) shards/make_fixture.py out=$(DEMO)/affwild2 $(FIXTURE)
	@$(PY) shards/pack_shards.py source=$(DEMO)/affwild2 out=$(DEMO)/shards samples_per_shard=32
	@$(MAKE) --silent --no-print-directory $(DEMO)/shards.verified
	@$(PY) launch/submit_folds.py recipe=launch/recipes/demo.yaml site=$(SITE) out=$(DEMO) wait=true compare=false data.shards=$(DEMO)/shards engine.precision=$(PRECISION) $(WORDS)
	@if grep -q '^executor: slurm' $(DEMO)/site.yaml; then $(PY) launch/sync_tracking.py out=$(DEMO); fi
	@$(PY) launch/compare_runs.py out=$(DEMO) fixture=$(DEMO)/affwild2/fixture.json

# a tar that was verified and has not been written since need not be read again
$(DEMO)/shards.verified: $(DEMO)/shards/manifest.json
	@$(PY) shards/verify_shards.py shards=$(DEMO)/shards against=$(DEMO)/affwild2
	@touch $@

test: $(READY)
	@echo "left out here: slow, kill, slurm, server, browser, highmem (make test-slow) and gpu (make test-gpu)"
	$(PY) -m pytest -m "not slow and not kill and not slurm and not server and not browser and not gpu and not highmem" $(TESTS)

# servers and a browser come from the distribution's packages; where they cannot be installed one line says which tests are left out
test-slow: $(READY)
	left=$$(tests/install_packages) && $(PY) -m pytest -m "(slow or kill or slurm or server or browser or highmem) and not gpu$$left" $(TESTS)

test-gpu: $(READY)
	$(PY) -m pytest -m gpu $(TESTS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

cluster-up: $(READY)
	slurm/minicluster/up

cluster-down:
	slurm/minicluster/down

# the environment: made once, made again when what it is made from changes
$(READY): setup.py constraints-cuda$(CUDA).txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python {v.major}.{v.minor} will not do: use PYTHON=python3.11 or python3.12")'
	@$(PYTHON) -m venv $(VENV) || { echo "No virtual environment could be made: on Debian and Ubuntu run  apt install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet --upgrade -c constraints-cuda$(CUDA).txt pip setuptools wheel
	$(PY) -m pip install --quiet -c constraints-cuda$(CUDA).txt -e '.[dev]'
	@touch $@
