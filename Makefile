# `make pretrain` and `make test` set up .venv when it is missing or older than its requirements.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python pretrain.py

.PHONY: pretrain test soak lint
.DEFAULT_GOAL := test

# Train a small DeepSeekMoE on the Python standard library's sources with two expert-parallel workers.
# Hydra overrides: make pretrain OVERRIDES="data.seed=7 run.name=other"
pretrain: $(INSTALLED)
	$(RUN) parallel=ep2 run.name=first_run train.micro_batch_size=4 $(OVERRIDES)

# pytest arguments: make test ARGS="tests/unit -k layout"
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# The long tests of faults and restarts, of which `make test` runs a tenth a day; ends with a table.
soak: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m soak --soak=all $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck .ci/run slurm/*.sh slurm/*.sbatch

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; choose one with: make PYTHON=python3.11 ..."; exit 2; }
	@echo "Setting up $(VENV) (one to three minutes, mostly PyTorch) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@
