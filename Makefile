# make demo     ask a model a question through a prefill worker and a decode worker, on this machine
# make test     the whole test suite (under ten minutes on two cores)
# make check    format, lint, types, layers: the whole gate before a commit
# make help     everything else

VENV   ?= .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
PROMPT ?= What is the capital of France, and what is it known for?

# The first interpreter that runs and is new enough; a name on PATH may be a shim that does not run.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
PIP     = $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow chaos sim check format bench proto docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1|/' | column -t -s'|'

demo: $(STAMPS)/run ## Install, fetch the default model, serve it, ask it a question, stop
	@$(BIN)/pdserve demo "$(PROMPT)"

test: $(STAMPS)/dev ## Run the test suite
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --ignore=tests/kernels
	@OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest -m "not slow" tests/kernels

test-slow: $(STAMPS)/dev ## Run the tests that take minutes
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

chaos: $(STAMPS)/dev ## Kill, stop, cut off and restart real processes in every phase; SEED=n ROUNDS=m draw more faults
	@OMP_NUM_THREADS=1 PDSERVE_CHAOS_SEED=$(or $(SEED),0) PDSERVE_CHAOS_ROUNDS=$(or $(ROUNDS),4) \
		$(BIN)/pytest tests/e2e/test_chaos.py tests/e2e/test_chaos_coordinator.py tests/e2e/test_partition.py \
		tests/e2e/test_tier_faults.py tests/e2e/test_faults.py tests/e2e/test_drain.py \
		tests/e2e/test_restart.py tests/worker/test_faults.py tests/worker/test_fault_storms.py tests/worker/test_migration.py \
		tests/kvtransfer/test_nixl_processes.py tests/kvtransfer/test_integrity.py tests/kvtransfer/test_service.py

sim: $(STAMPS)/dev ## Simulate whole clusters with faults, each from a seed; SEED=n replays one, SEEDS=m runs so many
	@OMP_NUM_THREADS=1 PDSERVE_SIM_SEED=$(SEED) PDSERVE_SIM_SEEDS=$(or $(SEEDS),200) PDSERVE_SIM_ROUNDS=$(or $(ROUNDS),20) \
		$(BIN)/pytest -q tests/worker/test_simulation.py tests/worker/test_simulation_cluster.py

check: $(STAMPS)/dev ## The whole gate: format, lint, types, layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PYTHONPATH=kernels $(BIN)/lint-imports

format: $(STAMPS)/dev ## Format and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMPS)/dev ## Measure against transformers and vLLM on the same checkpoint
	@$(BIN)/python -m benchmarks

proto: $(STAMPS)/dev ## Regenerate the gRPC stubs
	@PYTHONPATH=. $(BIN)/python -m pdserve.core.proto.generate

docs: $(STAMPS)/dev ## Regenerate the pages that come from code
	@PYTHONPATH=kernels $(BIN)/python -m pdkernels.report
	@$(BIN)/python -m pdserve.cli.reference docs
	@$(BIN)/python tools/dashboards.py

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# --- installation -----------------------------------------------------------------------------------
# Stamps: a step runs again only when what it depends on has changed.

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "pdserve needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python" >&2; exit 2; }
	@tools/with-progress "making $(VENV) with $(PYTHON)" $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv constraints.txt
	@tools/with-progress "installing PyTorch $(TORCH), up to minutes the first time" \
		tools/install-torch $(BIN)/python $(TORCH)
	@touch $@

$(STAMPS)/run: $(STAMPS)/torch pyproject.toml
	@tools/with-progress "installing pdserve and what it needs" $(PIP) install -e ".[bench]" -c constraints.txt
	@touch $@

$(STAMPS)/dev: $(STAMPS)/run
	@tools/with-progress "installing what tests and checks need" $(PIP) install -e ".[dev]" -c constraints.txt
	@touch $@
