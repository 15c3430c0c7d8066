# Everything that a person runs. The environment is .venv/, made from pyproject.toml (ranges) and constraints.txt (pins).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# STAMP is written last. INCOMPLETE stands in a new environment until then: if its first installation was interrupted,
# it is made anew, since pip takes half-copied packages for whole ones. A later update that fails (no network, say) is
# only tried again.
STAMP := $(VENV)/.installed
INCOMPLETE := $(VENV)/.incomplete

# A finished environment dies when its interpreter is upgraded or the folder is moved (scripts carry absolute paths).
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell $(BIN)/python -c '' 2>/dev/null && grep -qF '$(CURDIR)/$(BIN)/python' $(BIN)/ldm-scale && echo alive),alive)
$(shell mv $(STAMP) $(INCOMPLETE))
endif
endif

# DeepSpeed builds no operator at installation; the code needs none of them.
export DS_BUILD_OPS := 0
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off --constraint constraints.txt
# pip's own report reduced to what takes time: large downloads, source builds and the copying at the end.
PIP_PROGRESS := sed -un 's/^ *\(Downloading\|Using cached\) \([^ ]*\) \(([0-9.]* MB)\)/      \2 \3/p; s/^ *Building [^ ]* for \([^ ]*\) .*started/      building \1/p; s/^Installing collected packages.*/      copying files/p'

.PHONY: help env lint types test test-rest test-slurm test-slurm-quick slurm-programs soak soak-short browser-programs test-browser aot demo docs bench pixel-vs-latent data-soak gpu-proof gpu-demo clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

env: $(STAMP) ## the environment in .venv/ (about 3 minutes and 6 GB; at once when nothing changed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: ldm-scale needs Python 3.11 or newer and $(PYTHON) is not; name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments; run: apt-get install python3-venv" >&2; exit 1; }
	@if [ -e $(INCOMPLETE) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "[1/3] making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); touch $(INCOMPLETE); \
	else \
		echo "[1/3] keeping $(VENV)"; \
	fi
	@echo "[2/3] torch and torchvision: 2.5 GB to download the first time"
	@$(PIP_INSTALL) torch torchvision | $(PIP_PROGRESS)
	@echo "[3/3] the other dependencies, and ldm-scale itself (editable)"
	@$(PIP_INSTALL) --editable '.[evaluation,interchange,dev,docs]' | $(PIP_PROGRESS)
	@rm -f $(INCOMPLETE); touch $@

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

# In order of folders: xdist would leave the files of few tests, which are the slow ones, to the end, and one process to them.
# Three processes: Triton interprets all kernels of a process or none, and ahead-of-time compilation needs real ones.
test: lint types ## lint, types and the test suite (no GPU and no root needed; what is long beyond: test-rest)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses 2 --dist load tests/kernels
	$(BIN)/python -m ldm_kernels.common.aot

# No program is run before its package is there, and none of Debian's daemons: tests start their own.
slurm-programs:
	@[ "$$(id -u)" = 0 ] || { \
		echo "error: a Slurm cluster in namespaces needs root; run as root: make $(MAKECMDGOALS)" >&2; exit 1; }
	@if ! PATH="$$PATH:/usr/sbin:/sbin" which slurmctld slurmd munged sbatch ip >/dev/null; then \
		command -v apt-get >/dev/null || { \
			echo "error: slurmctld, slurmd, munged, sbatch or ip is missing and there is no apt-get; install Slurm and iproute2" >&2; exit 1; }; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurm-wlm munge iproute2; \
	fi

test-slurm: $(STAMP) slurm-programs ## as root: jobs on a real Slurm cluster in namespaces, disturbed in every way (20 to 30 minutes)
	$(BIN)/python -m pytest tests/slurm

test-slurm-quick: $(STAMP) slurm-programs ## as root: both stages over two nodes, one requeue, one lost node (at most 6 minutes)
	$(BIN)/python -m pytest tests/slurm/test_quick.py

# The driver stands in Debian's chromium-driver, so that no program is fetched from anywhere else.
browser-programs: $(STAMP)
	@if ! which chromium chromedriver >/dev/null; then \
		[ "$$(id -u)" = 0 ] || { \
			echo "error: chromium or chromedriver is missing; install them, or run as root: make $(MAKECMDGOALS)" >&2; exit 1; }; \
		command -v apt-get >/dev/null || { \
			echo "error: chromium or chromedriver is missing and there is no apt-get; install both" >&2; exit 1; }; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
			chromium chromium-driver fonts-dejavu-core; \
	fi
	@$(BIN)/python -c 'import selenium' 2>/dev/null || $(PIP_INSTALL) --editable '.[browser]' | $(PIP_PROGRESS)

test-browser: browser-programs ## a run's page in a real browser, phone and desktop (as root where chromium is to be installed)
	$(BIN)/python -m pytest tests/browser

soak: $(STAMP) slurm-programs ## as root: a run on that cluster for two hours, a fault every ten minutes, and what they take (130 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak

soak-short: $(STAMP) slurm-programs ## as root: five of the faults in ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak --short

test-rest: $(STAMP) ## what `make test` leaves out: kills at every point of a save, hangs, resumptions, ranks and ZeRO stages, all conditioning
	$(BIN)/python -m pytest --numprocesses 2 --dist load -m rest

aot: $(STAMP) ## compile every kernel for sm_80, sm_90 and sm_100 and compare with the committed table (no GPU needed)
	$(BIN)/python -m ldm_kernels.common.aot --all

demo: $(STAMP) ## both stages on real images, from shards to samples and an export (at most 20 minutes on 2 cores)
	$(BIN)/ldm-scale demo

docs: $(STAMP) ## the documentation as a site that needs no network, in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html in a browser; no server is needed, to search neither"

bench: $(STAMP) ## the training step's speed against diffusers' UNet, on this machine
	$(BIN)/python -m benchmarks.unet_step

pixel-vs-latent: $(STAMP) ## what diffusion costs in pixels and in latents, narrowed networks on this machine (about 5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/pixel_vs_latent.py

data-soak: MINUTES ?= 30
data-soak: $(STAMP) ## memory and open files of loading, local and over HTTP with resets, for half an hour (MINUTES=)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.data_soak --minutes $(MINUTES)

# PYTHON=python3 takes that Python as it is, without .venv: for a GPU machine that has torch and no network.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
gpu-proof gpu-demo: $(STAMP)
endif
gpu-proof: OUT ?= runs/gpu_proof
gpu-proof: ## on a machine with a GPU, in 8 minutes: kernel tests, benchmarks, the UNet step (OUT=folder PYTHON=python3)
	PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m benchmarks.gpu_proof --out $(OUT)

# Shards are rendered beforehand; without them the command that does it is printed. The same call goes on where the last
# one stopped.
gpu-demo: OUT ?= runs/gpu_demo
gpu-demo: MINUTES ?= 8
gpu-demo: ## on a machine with a GPU, in two calls of 8 minutes: both stages at 128 px, pictures, weights (OUT= MINUTES= PYTHON=)
	PYTHONPATH=kernels:.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m benchmarks.gpu_demo --out $(OUT) --minutes $(MINUTES)

clean: ## remove caches and build outputs; the environment, data/ and runs/ stay
	rm -rf build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache
	find ldm_scale kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
