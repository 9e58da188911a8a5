PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test zoo lint bench clean
.DELETE_ON_ERROR:

demo: .venv/installed  ## a small GPT trains as a pipeline on two processes
	$(BIN)/pipework demo

test: lint  ## every check there is
	$(BIN)/python -m pytest

zoo: .venv/installed  ## the models of the transformers library; goes on where it was stopped; writes docs/coverage.md
	$(BIN)/python -m tests.zoo

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/installed  ## the figures against torch.distributed.pipelining
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cli,hf]' --group dev
	touch $@
