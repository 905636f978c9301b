# make reproduce [SCALE=tiny|small|paper|smoke] [CORES=n]   every table and figure, from training to reports/; with DRY=1 only the plan
# make test                                                 all checks and all library notebooks
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

SCALE ?= tiny
EVERY ?= 50
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PY := .venv/bin/python
STAMP := .venv/.complete

export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help reproduce test check zoo bench bench-gpu official lab notebooks readme env clean

help:      ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

env: $(STAMP)  ## the virtual environment .venv, as pinned in constraints.txt

# torch alone and first: the rest must find it in place instead of choosing a build of its own.
$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	@echo "[1/3] a virtual environment in .venv ($$($(PYTHON) --version))"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "[2/3] torch, the largest part (2 to 5 minutes are left, by your connection)"
	@$(PY) -m pip install -c constraints.txt torch
	@echo "[3/3] everything else (about 1 to 2 minutes are left)"
	@$(PY) -m pip install -e '.[dev]' -c constraints.txt | sed -u '/already satisfied/d'
	@touch $@

reproduce: $(STAMP)  ## train, evaluate and report at SCALE; goes on where a stopped run ended; DRY=1 prints the plan
	@$(PY) -m focusdiff.pipeline reproduce $(SCALE) --cores $(CORES) $(if $(filter-out 0,$(DRY)),--dry)

test: $(STAMP)  ## the house-rule checks, every library notebook, the import time
	@$(PY) .ci/notebooks.py test

check: $(STAMP)  ## the house-rule checks alone
	@$(PY) .ci/check.py

zoo: $(STAMP)  ## train the tiny checkpoints of data/zoo again, from nothing
	@for n in 60_train_zoo 70_train_diffusion_zoo 71_train_scorers; do $(PY) -m focusdiff.pipeline run nbs/experiments/$$n.ipynb out/zoo/notebooks/$$n.ipynb --threads $(CORES); done

bench: $(STAMP)  ## images/s of our roll-out against the generate of transformers; what attention modulation and a contrastive step cost
	@$(PY) -m focusdiff.pipeline run nbs/experiments/69_bench.ipynb out/bench/notebooks/69_bench.ipynb --threads $(CORES) --show
	@$(PY) -m focusdiff.pipeline run nbs/experiments/68_bench_diffusion.ipynb out/bench/notebooks/68_bench_diffusion.ipynb --threads $(CORES) --show
	@$(PY) -m focusdiff.pipeline run nbs/experiments/73_bench_soft.ipynb out/bench/notebooks/73_bench_soft.ipynb --threads $(CORES) --show

bench-gpu: $(STAMP)  ## Janus-Pro-1B and 7B shapes on one GPU: roll-out, scoring, a Pair-GRPO step, beside generate and the memory bound; SCALE=smoke tries it on a CPU
	@test "$(SCALE)" = smoke || $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "make bench-gpu needs a GPU, and torch sees none here: SCALE=smoke tries the command on a CPU, with a small shape" >&2; exit 1; }
	@$(PY) -m focusdiff.pipeline run nbs/experiments/75_bench_gpu.ipynb out/bench/notebooks/75_bench_gpu.ipynb --threads $(CORES) --show -p scale $(if $(filter smoke,$(SCALE)),smoke,paper)

official: $(STAMP)  ## a small part of every official benchmark whose files are there, through folders and rules, with tiny models; EVERY=k takes each k-th case
	@$(dir $(PY))focusdiff-benchmark all --every $(EVERY) --out out/official

lab: $(STAMP)  ## JupyterLab on the notebooks
	@$(PY) -m jupyter lab nbs

notebooks: $(STAMP)  ## run the library notebooks and store their outputs
	@$(PY) .ci/notebooks.py refresh

readme: $(STAMP)  ## README.md from nbs/index.ipynb
	@$(PY) .ci/notebooks.py readme

clean:     ## forget all runs; the environment and reports/ stay
	rm -rf out .snakemake
