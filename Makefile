# Every command a person or CI runs. Variables: SIM= SEED= WAVES=1 for every run, WIDTH= LATENCY= IMAGE= TARGET= for `make sim`, JOBS= for `make test`.
PYTHON ?= python3
JOBS ?= 3
BIN := .venv/bin

export SIM SEED WIDTH LATENCY IMAGE WAVES TARGET GUEST IOMMU GUEST_ARCH PROMPT RECORD JOB TIMEOUT TABLE

.PHONY: help setup sim linux replay guests test models lint formal bench board board-report nightly clean

help:
	@echo "make sim      a disk image through the card and back, golden model watching; SIM= SEED= WIDTH= LATENCY= IMAGE= WAVES=1; TARGET=tunnel:... on a board"
	@echo "make linux    Linux whose disks are the RTL; GUEST=uml|qemu IOMMU= GUEST_ARCH= PROMPT=1 RECORD=file JOB= SEED= LATENCY="
	@echo "make replay   a recorded run again, on the RTL without a guest and through the golden model; FILE="
	@echo "make test     every test, $(JOBS) at a time"
	@echo "make models   the golden model alone, in an environment with neither Amaranth nor cocotb"
	@echo "make lint     ruff and pyright"
	@echo "make formal   the proofs"
	@echo "make bench    figures in cycles"
	@echo "make board    the card of a board, as far as open tools go; BOARD=ecpix5|versa_ecp5|litefury|nitefury|alveo_u50"
	@echo "make board-report  the table of boards/README.md, from the boards' results"
	@echo "make nightly  fetches QEMU and Debian's kernels into the cache; every test, with whole machines of both architectures and ten million IOMMU requests"
	@echo "make clean    remove build/ (not the Python environment)"

# The environment is made anew when pyproject.toml changes; build/ready is its stamp.
setup: build/ready

DEBIAN := python3-venv iverilog g++ make perl ccache e2fsprogs liblz4-dev zlib1g-dev xz-utils

build/ready: pyproject.toml
	@missing=; for tool in $(PYTHON) iverilog vvp g++ perl ccache mke2fs xz; do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v $$tool > /dev/null || missing="$$missing $$tool"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2> /dev/null; then root=sudo; else \
	    echo "missing:$$missing. Type: sudo apt-get install -y $(DEBIAN)" >&2; exit 2; fi; \
	  echo "installing Debian packages for:$$missing"; \
	  $$root apt-get update -qq && $$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(DEBIAN) > /dev/null; fi
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing Python packages into .venv"
	@$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@mkdir -p build && touch $@

sim: build/ready
	@$(BIN)/python -m ringwall.sim.main

linux: build/ready
	@$(BIN)/python -m ringwall.sim.linux.main

replay: build/ready
	@test -n "$(FILE)" || { echo "usage: make replay FILE=log.jsonl" >&2; exit 2; }
	@$(BIN)/python -m ringwall.sim.replay "$(FILE)"

# Without them the tests of Linux guests are left out.
guests: build/ready
	@$(BIN)/python -m ringwall.sim.linux.kernel uml || echo "NO LINUX GUESTS: their tests are left out. Again: make guests" >&2

test: guests
	$(BIN)/pytest -q -n $(JOBS) --dist worksteal --durations=40 --durations-min=5 tests

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

board: build/ready
	@$(BIN)/python -m ringwall.boards.build $(BOARD)

board-report: build/ready
	@$(BIN)/python -m ringwall.boards.build --report

# QEMU and the kernels stay in the cache: from then on `make test` boots them, too.
nightly: build/ready
	$(BIN)/python -m ringwall.sim.linux.kernel uml amd64 riscv64
	RINGWALL_NIGHTLY=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal --durations=40 --durations-min=5 tests

clean:
	rm -rf build
