# Every target makes .venv itself where it is absent. `make gpu PYTHON=python3` uses a machine's own Python instead.
VENV := .venv
PYTHON ?= $(VENV)/bin/python
READY := $(if $(findstring $(VENV)/,$(PYTHON)),$(VENV)/ready)

.PHONY: t1 demo test lint bench gpu help

help:
	@echo "make t1      all of T1 in one file of 300 lines: chains, SFT, RL, accuracy against thinking budget"
	@echo "make demo    T1 in miniature on a CPU: chains of thought, SFT, RL, evaluation, figures in runs/demo"
	@echo "make test    the whole suite"
	@echo "make lint    ruff"
	@echo "make bench   speed beside the peers, on this machine's CPU"
	@echo "make gpu     the tests and benchmarks that need a GPU"

t1: $(READY)
	$(PYTHON) t1.py

demo: $(READY)
	$(PYTHON) demo.py --out runs/demo

test: $(READY)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PYTHON) -m pytest

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# The GPU's kernels run at toy size here: it is their code that a CPU can check, not their speed.
bench: $(READY)
	$(PYTHON) benchmarks/sample_bench.py
	$(PYTHON) benchmarks/verify_bench.py
	$(PYTHON) benchmarks/rl_bench.py
	$(PYTHON) benchmarks/kernels_bench.py --smoke

gpu: $(READY)
	$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu: torch sees no GPU here')"
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) benchmarks/kernels_bench.py
	$(PYTHON) benchmarks/sample_bench.py --gpu
	$(PYTHON) benchmarks/rl_bench.py

# The stamp is touched last: an installation that was interrupted is done again, a finished one is not.
$(VENV)/ready: requirements.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@
