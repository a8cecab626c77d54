# Every target makes the virtual environment that it needs. The variables can be set on the command line:
#     make test PYTHON=python3.12 VENV=/tmp/venv WORKERS=8
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
# No notice of mkdocs-material about its successor.
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo test fast lint docs clean

help:
	@echo "make demo   train, evaluate and report a small BART on generated documents: CPU, a few minutes"
	@echo "make test   run the tests: CPU, Triton kernels in Triton's interpreter"
	@echo "make fast   run the tests that are known to be fast: two minutes"
	@echo "make lint   check style, formatting and types"
	@echo "make docs   build the documentation into site/"
	@echo "make clean  remove $(VENV) and site/"

demo: $(VENV)/.recipes
	$(BIN)/python recipes/xsum/train.py --config recipes/xsum/configs/smoke.yaml --overwrite
	$(BIN)/python recipes/xsum/report.py runs/smoke --out runs/smoke/report

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS)

fast: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) -m fast

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site

# Linting needs no more than its two tools; each other extra is installed once, and again when its requirements change.
$(VENV)/.lint: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt ruff mypy
	touch $@

$(VENV)/.recipes $(VENV)/.test $(VENV)/.docs: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$*]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer; \
	run make with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
