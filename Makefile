# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Idle OpenMP threads must not spin where several processes share two cores.
export OMP_WAIT_POLICY = passive
export GOMP_SPINCOUNT = 0
export HF_HUB_OFFLINE = 1
# The adapter to transformers is tested with the oldest supported version too.
OLDEST := .venv-oldest
ADAPTER := tests/hub tests/generating tests/convert tests/models tests/test_models.py

.PHONY: venv venv-oldest demo test test-all test-oldest test-matrix lint bench docs clean

venv: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[data,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/longspan compare --data stdlib --length 2048 --budget 25s --out runs/demo \
		--mechanisms core,reformer-lsh

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu'

venv-oldest: $(OLDEST)/.installed

$(OLDEST)/.installed: constraints.txt pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed -e 's/^transformers==.*/transformers==5.6.0/' \
		-e 's/^huggingface_hub==.*/huggingface_hub==1.33.0/' \
		-e 's/^tokenizers==.*/tokenizers==0.22.2/' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt torch
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt \
		--editable '.[data,dev]'
	touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal $(ADAPTER)

test-matrix: $(STAMP) test-oldest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ADAPTER)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/python benchmarks/harness.py
	$(BIN)/python benchmarks/ratios.py float32
	$(BIN)/python benchmarks/ratios.py bfloat16
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/pip install --quiet --no-deps --target .peers --requirement benchmarks/peers.txt
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/million.py

docs: $(STAMP)
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv $(OLDEST) runs .pytest_cache .ruff_cache
