# Every target makes .venv itself where it is absent. `make gpu PYTHON=python3` uses a machine's own Python instead.
VENV := .venv
PYTHON ?= $(VENV)/bin/python
READY := $(if $(findstring $(VENV)/,$(PYTHON)),$(VENV)/ready)

.PHONY: t1 demo demo-lm findings test lint bench gpu gpu-peers gpu-tests gpu-kernels gpu-sampler gpu-training help

help:
	@echo "make t1      all of T1 in one file of 300 lines: chains, SFT, RL, accuracy against thinking budget"
	@echo "make demo    T1 in miniature on a CPU: chains of thought, SFT, RL, evaluation, figures in runs/demo"
	@echo "make demo-lm a real language model taught by its own attempts and RL, on a CPU; MODEL=DIR for a folder"
	@echo "make findings   the paper's findings in miniature, on a CPU: four to seven hours, tables and figures in runs/findings"
	@echo "make test    the whole suite"
	@echo "make lint    ruff"
	@echo "make bench   speed beside the peers, on this machine's CPU"
	@echo "make gpu     the tests and benchmarks that need a GPU (ten minutes on an H100)"
	@echo "make gpu-peers   the same work done by others, where they are installed"

t1: $(READY)
	$(PYTHON) t1.py

demo: $(READY)
	$(PYTHON) demo.py --out runs/demo

# MODEL: a Hugging Face folder, or a name of its hub.
demo-lm: $(READY)
	$(PYTHON) demo_lm.py $(if $(MODEL),--model '$(MODEL)') --out runs/demo-lm

findings: $(READY)
	$(PYTHON) findings.py all --out runs/findings

test: $(READY)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PYTHON) -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# The GPU's kernels run at toy size here: it is their code that a CPU can check, not their speed.
bench: $(READY)
	$(PYTHON) benchmarks/sample_bench.py
	$(PYTHON) benchmarks/verify_bench.py
	$(PYTHON) benchmarks/rl_bench.py
	$(PYTHON) benchmarks/kernels_bench.py --smoke

# What fails does not keep the rest from being measured; make says so at its end. Every row is also a line of JSON:
# `python benchmarks/fill_results.py benchmarks/gpu.jsonl` takes them into RESULTS.md.
gpu: $(READY)
	$(PYTHON) benchmarks/ready.py
	$(MAKE) --keep-going gpu-tests gpu-kernels gpu-sampler gpu-training

gpu-tests: $(READY)
	$(PYTHON) -m pytest -m gpu

gpu-kernels: $(READY)
	$(PYTHON) benchmarks/kernels_bench.py

gpu-sampler: $(READY)
	$(PYTHON) benchmarks/sample_bench.py --gpu

gpu-training: $(READY)
	$(PYTHON) benchmarks/train_bench.py

# Liger and Cut Cross Entropy, transformers' `generate` and continuous batching, TRL. Those that are absent are named.
gpu-peers: $(READY)
	$(PYTHON) benchmarks/ready.py
	$(PYTHON) benchmarks/kernels_bench.py --peers
	$(PYTHON) benchmarks/sample_bench.py --gpu --peers
	$(PYTHON) benchmarks/rl_bench.py

# The stamp is touched last: an installation that was interrupted is done again, a finished one is not.
$(VENV)/ready: requirements.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@
