# Every target does the set-up it needs, on a fresh machine with Python 3.11+, pip, make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test test-gpu gpu-report lint bench reference backbones embedded-table clean

help:
	@echo "make setup            the environment alone (.venv)"
	@echo "make demo             train Mixture-of-Adapters on the embedded data with two processes"
	@echo "make test             the CPU test suite"
	@echo "make test-gpu         what only a GPU can show"
	@echo "make gpu-report       that, and what a GPU takes for steps and runs (under 8 minutes)"
	@echo "make lint             ruff, mypy, codespell, hadolint, shellcheck"
	@echo "make bench            speed and memory ratios, one table"
	@echo "make reference        the pages that are made from the code"
	@echo "make backbones        the page on timm's models (some minutes)"
	@echo "make embedded-table   methods x held-out domains x seeds on the embedded data (162 runs)"
	@echo "make clean            remove the environment and what was built; outputs/ stays"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@# What is left of a failure (Debian without python3-venv) would count as done from then on.
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# One stamp per extra: made anew when pyproject.toml changes.
$(VENV)/.installed-core: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

setup: $(VENV)/.installed-core

demo: $(VENV)/.installed-core
	$(BIN)/deepspeed --num_gpus 2 trainer/run.py --ds_config ds_configs/zero2.json --output_dir outputs/demo

test: $(VENV)/.installed-test
	@# One process more than cores, up to five: tests of SLURM wait more than they compute.
	processes=$$(($$(nproc) + 1)); CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest \
	  -n $$((processes < 5 ? processes : 5)) --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/gpu_checks.py

# The checks may take 200 s, and no table is begun after 3 minutes more.
gpu-report: $(VENV)/.installed-test
	@mkdir -p outputs/gpu-report
	timeout 200 $(BIN)/python -m pytest tests/gpu_checks.py; checks=$$?; \
	$(BIN)/python -m trainer.bench --part report --device cuda --workers 8 \
	  --json outputs/gpu-report/figures.json; report=$$?; exit $$((checks ? checks : report))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; fi
	@if command -v shellcheck >/dev/null; then \
	  git ls-files -z '*.sh' '*.env.example' .ci/run | xargs -0 shellcheck; \
	elif [ -n "$$CI" ]; then \
	  echo "shellcheck is missing: apt-get install shellcheck"; exit 1; \
	else \
	  echo "shellcheck is missing, shell scripts were not checked: apt-get install shellcheck"; \
	fi

reference: $(VENV)/.installed-core
	$(BIN)/python docs/pages.py flags > docs/reference.md
	$(BIN)/python docs/pages.py modules > docs/modules.md

backbones: $(VENV)/.installed-core
	$(BIN)/python docs/pages.py backbones > docs/backbones.md

bench: $(VENV)/.installed-test
	$(BIN)/python -m trainer.bench

METHODS := linear,bias,attention,lora,kadaptation,multi_lora,moa_lora,moa_kron,full
embedded-table: $(VENV)/.installed-core
	$(BIN)/python -m trainer.sweep --methods $(METHODS) \
	  --held_out plain,inverted,outline,coarse,textured,rotated --seeds 0,1,2 \
	  --jobs $$(nproc) --output_dir outputs/embedded
	$(BIN)/python -m trainer.report outputs/embedded --format markdown --compare linear

# Not outputs: results and checkpoints of every run.
clean:
	rm -rf $(VENV) build *.egg-info
