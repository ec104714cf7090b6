# setup: environment in .venv (another place: VENV=...; another Python: PYTHON=...)
# demo: the quickstart, end to end    test: the test suite, on the CPU
# test-gpu: what needs a CUDA device    lint, format: ruff
PYTHON ?= python3
PIP_OPTIONS ?=
ARGS ?=
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-gpu lint format

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a minute or two the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e '.[dev,eval,fast,duplicates]'
	@$(BIN)/python tools/check_setup.py dev eval fast duplicates
	@touch $@

# Corpus, tokenizer, preprocessing and the run itself; ARGS go to the script, such as ARGS=--short
demo: setup
	@BLISS_PYTHON="$(abspath $(BIN))/python" bash examples/quickstart/run.sh $(ARGS)

# WORKERS files of tests at a time, one thread a process: distributed tests start several. GPUs are hidden, because these
# take gloo and several ranks.
test: setup
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

test-gpu: setup
	@$(BIN)/python -m pytest -q tests/test_gpu.py $(ARGS)

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .
