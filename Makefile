# Every target does the set-up it needs, on a fresh machine with Python 3.11+, pip, make and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test lint bench embedded-table clean

help:
	@echo "make setup            the environment alone (.venv)"
	@echo "make demo             train Mixture-of-Adapters on the embedded data with two processes"
	@echo "make test             the CPU test suite"
	@echo "make lint             ruff, mypy, codespell, shellcheck"
	@echo "make bench            speed and memory ratios, one table"
	@echo "make embedded-table   methods x held-out domains x seeds on the embedded data (72 runs)"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

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
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	@if command -v shellcheck >/dev/null; then \
	  git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck; \
	elif [ -n "$$CI" ]; then \
	  echo "shellcheck is missing: apt-get install shellcheck"; exit 1; \
	else \
	  echo "shellcheck is missing, shell scripts were not checked: apt-get install shellcheck"; \
	fi

bench: $(VENV)/.installed-test
	$(BIN)/python -m trainer.bench

embedded-table: $(VENV)/.installed-core
	$(BIN)/python -m trainer.sweep --methods linear,moa_lora,moa_kron,full \
	  --held-out plain,inverted,outline,coarse,textured,rotated --seeds 0,1,2 \
	  --jobs $$(nproc) --output-dir outputs/embedded
	$(BIN)/python -m trainer.report outputs/embedded/*/ --format markdown

clean:
	rm -rf $(VENV) outputs build *.egg-info
