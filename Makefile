# Every target installs what it needs into .venv once, and again when the requirements change.

.DEFAULT_GOAL := help
.PHONY: help demo test check bench gpu clean
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet -c constraints-cpu.txt
TYPED := gist_rag kernels/gist_rag_kernels integrations
SERVING := benchmarks/serving

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo ## compress a small corpus, then ask through LangChain and LlamaIndex
	$(BIN)/gist-rag demo

test: .venv/.dev ## run the tests
	$(BIN)/pytest

check: .venv/.dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)

bench: .venv/.demo ## time to first token on this CPU, into benchmarks/serving/ttft_cpu.json
	CUDA_VISIBLE_DEVICES= $(BIN)/gist-rag bench ttft --json > $(SERVING)/ttft_cpu.json.new
	mv $(SERVING)/ttft_cpu.json.new $(SERVING)/ttft_cpu.json

gpu: .venv/.dev ## tests and time to first token on a CUDA device, where there is one
	@if $(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then \
		echo 'running the tests marked gpu, then writing $(SERVING)/ttft_cuda.json'; \
		$(BIN)/pytest -m gpu && \
		$(BIN)/gist-rag bench ttft --json > $(SERVING)/ttft_cuda.json.new && \
		mv $(SERVING)/ttft_cuda.json.new $(SERVING)/ttft_cuda.json; \
	else \
		echo 'torch sees no CUDA device here, so there is nothing to run'; \
	fi

clean: ## remove .venv, builds and caches
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.torch: constraints-cpu.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(INSTALL) -e '.[demo]'
	touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(INSTALL) -e '.[dev]'
	touch $@
