# Every target sets itself up: a virtual environment in this checkout, made again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
RECIPE ?= recipes/quickstart.yaml
NPROC  ?= 2
ARGS   ?=
TORCH_INDEX ?=

BIN   := .venv/bin
READY := .venv/.installed
CORES := $(shell getconf _NPROCESSORS_ONLN)
# A whole suite runs file by file in so many processes, each of which has ranks of its own; a part of it in one.
SPREAD := $(if $(ARGS),,--numprocesses $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 ))) --dist loadfile)
OMP_NUM_THREADS ?= $(shell echo $$(( $(CORES) > $(NPROC) ? $(CORES) / $(NPROC) : 1 )))

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(READY) ## train RECIPE (recipes/quickstart.yaml) on NPROC (2) processes, with ARGS="model.ratio=1/8 train.steps=20"
	@WORLD_SIZE=$(NPROC) $(BIN)/python -m recipes.train $(RECIPE) --dry-run $(ARGS) > /dev/null
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(NPROC) \
		-m recipes.train $(RECIPE) $(ARGS)

test: $(READY) ## the tests of every law, in minutes; ARGS="tests/layers -x" for a part of them
	$(BIN)/python -m pytest -m "not slow" $(SPREAD) $(ARGS)

test-all: $(READY) ## the whole test suite, with what is marked slow: more cases of the same laws
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)

check: $(READY) ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

mutants: $(READY) ## break the source in every committed way and see a named test fail
	$(BIN)/python -m tests.mutants.run $(ARGS)

ablation: $(READY) ## loss against the share of softmax blocks: 11 runs on 2 processes each, and their report
	OMP_NUM_THREADS=1 $(BIN)/python -m recipes.sweep recipes/ablations/hybrid_ratio.yaml $(ARGS)
	$(BIN)/python -m analysis.report runs/hybrid_ratio --out analysis/results/hybrid_ratio

kernels: $(READY) ## compile every kernel for sm_80, sm_90 and sm_100, without a GPU: half an hour; ARGS="--grid main" for minutes
	$(BIN)/python -m tests.hybrid_sp.kernels.aot --out analysis/results/kernels/aot.md $(ARGS)

bench: $(READY) ## the measurements of analysis/README.md; ARGS=linear for one of them
	$(BIN)/python -m analysis.bench $(ARGS)

# On a machine with a GPU, which may have no package index: PYTHON itself, no virtual environment.
gpu-test: ## every backend on a CUDA device, by PYTHON itself with pytest: minutes; ARGS="-k delta" for a part of it
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu-test needs a CUDA device")'
	HYBRID_SP_ANY_TRITON=1 $(PYTHON) -m tests.gpu.ptxas runs/gpu-test --tests $(ARGS)

gpu-first: ## on a GPU for the first time: checks, tuning and speed in ten minutes, by PYTHON itself; ARGS="--ranks 2" for two
	HYBRID_SP_ANY_TRITON=1 $(PYTHON) -m analysis.first $(ARGS)

clean: ## remove the virtual environment and all caches; run folders stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache hybrid_sp.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "Installing torch 2.13.0 and the packages of constraints.txt into .venv: minutes on a fresh machine."
	@echo "pip's default torch for Linux carries CUDA, gigabytes; make TORCH_INDEX=URL takes it from another index," \
		"such as that of PyTorch's CPU wheels, a tenth of the size."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_INDEX:%=--extra-index-url %) torch==2.13.0 setuptools
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $(READY)

.PHONY: help train test test-all check mutants ablation kernels bench gpu-test gpu-first clean
