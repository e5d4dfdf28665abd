# Two commands do all the set-up, each by itself: `make demo` and `make test`.
.PHONY: demo test lint vllm-env test-vllm clean

PYTHON := .venv/bin/python
TORCH := 2.13.0

.venv: FORCE
	@.ci/environment .venv $(TORCH) -e ".[llmcompressor,dev]"

demo: .venv  ## quantize the shipped model, compare with stock GPTQ, reload, generate
	$(PYTHON) examples/demo.py

lint: .venv
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: lint
	$(PYTHON) -m pytest

FORCE:
