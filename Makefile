# Every command a person or CI runs. Variables: SIM= SEED= WIDTH= LATENCY= IMAGE= WAVES=1 for `make sim`, JOBS= for `make test`.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin

export SIM SEED WIDTH LATENCY IMAGE WAVES

.PHONY: help setup sim test models lint formal bench clean

help:
	@echo "make sim      one run of the whole card: enumerate, write an ext4 image, read it back, report"
	@echo "make test     every test, on $(JOBS) cores"
	@echo "make models   the golden model alone, in an environment with neither Amaranth nor cocotb"
	@echo "make lint     ruff and pyright"
	@echo "make formal   the proofs"
	@echo "make bench    figures in cycles"
	@echo "make clean    remove build/ (not the Python environment)"

# The environment is made anew when pyproject.toml changes; build/ready is its stamp.
setup: build/ready

build/ready: pyproject.toml
	@for tool in $(PYTHON) iverilog vvp g++ make perl ccache mke2fs; do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v $$tool > /dev/null || missing="$$missing $$tool"; done; \
	  if [ -n "$$missing" ]; then \
	    echo "missing:$$missing; on Debian: apt install python3-venv iverilog g++ make perl ccache e2fsprogs liblz4-dev zlib1g-dev" >&2; \
	    exit 2; fi
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing Python packages into .venv"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@mkdir -p build && touch $@

sim: build/ready
	@$(BIN)/python -m ringwall.sim.main

test: build/ready
	$(BIN)/pytest -q -n $(JOBS) --dist worksteal tests

models: build/ready
	@test -x build/models-venv/bin/python || $(PYTHON) -m venv build/models-venv
	@build/models-venv/bin/pip install -q --disable-pip-version-check --no-deps -e .
	@build/models-venv/bin/pip install -q --disable-pip-version-check \
	  $$($(BIN)/pip freeze | grep -E '^(numpy|pytest|pytest-timeout|hypothesis)==')
	cd tests/models && ../../build/models-venv/bin/python -m pytest -q -c ../../pyproject.toml --rootdir ../.. .

lint: build/ready
	$(BIN)/ruff check .
	$(BIN)/pyright

formal: build/ready
	$(BIN)/pytest -q tests/formal

bench: build/ready
	$(BIN)/pytest -q -s tests/bench

clean:
	rm -rf build
