# Every target sets up .venv by itself; a second run finds the stamp and starts at once.
PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.lightning-optkit-installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench screenshots wheel clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,examples]'
	@touch $@

demo: $(STAMP)  ## train a small net on the CPU and show its loss surface
	$(BIN)/lightning-optkit demo

# Each check runs whatever the others said, so that one run tells everything; pytest comes last.
test: $(STAMP)  ## lint, types and tests; PYTEST_ARGS="-k lanczos" goes to pytest
	@failed=; \
	$(MAKE) --no-print-directory lint || failed="$$failed lint"; \
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS) || failed="$$failed pytest"; \
	test -z "$$failed" || { echo "make test failed in:$$failed" >&2; exit 1; }

lint: $(STAMP)  ## ruff check, ruff format --check and mypy
	@failed=; \
	for check in "ruff check ." "ruff format --check ." "mypy"; do \
		echo "$$check"; $(BIN)/python -m $$check || failed=1; \
	done; \
	test -z "$$failed"

format: $(STAMP)  ## rewrite the sources in the house style
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP)  ## run every benchmark in tests/benchmarks
	@set -e; for file in tests/benchmarks/bench_*.py; do \
		test -e "$$file" || { echo "no benchmarks in tests/benchmarks" >&2; exit 1; }; \
		name=$$(basename "$$file" .py); \
		echo "== $$name"; $(BIN)/python -m tests.benchmarks.$$name; \
	done

screenshots: $(STAMP)  ## take the pictures of docs/board.md anew, in Chromium
	test -d optkit_logs/tour || $(BIN)/python examples/board_tour.py
	$(BIN)/python -m tests.board.screenshots optkit_logs/tour docs/images

wheel: $(STAMP)  ## build the wheel into dist/
	$(BIN)/python -m pip wheel . --no-deps -w dist

clean:  ## remove what runs and builds leave behind; .venv stays
	rm -rf build dist lightning_logs optkit_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
