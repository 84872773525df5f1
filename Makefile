# Every target brings what it needs into .venv first; `make help` lists them.

PYTHON ?= python3
JOBS ?= 2
SECONDS ?= 10
MINUTES ?= 20

VENV := .venv
BIN := $(VENV)/bin
PARTS := protos scheduler worker client
CHECKED := $(PARTS) tests bench models docs/examples
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Stamps: installing again is only due when one of the files before them changes.
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev

PROTOS := $(wildcard protos/tokenloom/v1/*.proto)
GENERATED := build/gen
BUF_VERSION := 1.75.0
BUF := $(VENV)/buf-$(BUF_VERSION)/node_modules/.bin/buf

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) makes the .venv, JOBS=$(JOBS) test processes, ARGS= goes to pytest, demo or bench."

.PHONY: demo
demo: $(INSTALLED) ## Serve the pocket model on this machine and ask it a few things
	$(BIN)/python docs/examples/demo.py $(ARGS)

# Each test process has a core; more threads than that only get in each other's way.
.PHONY: test
test: $(INSTALLED_DEV) ## Run the tests that need no GPU; ARGS="-k name -x" narrows them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(JOBS) --dist loadfile $(ARGS)

# What a target finds is written to build/fuzz; CI runs each for some thousand executions.
.PHONY: fuzz
fuzz: $(INSTALLED_DEV) ## Write random bytes to all that strangers can write to, for SECONDS=10 each
	for target in validation wire stops; do \
		$(BIN)/python -m tests.fuzz $$target -max_total_time=$(SECONDS) || exit 1; \
	done

.PHONY: soak
soak: $(INSTALLED_DEV) ## Serve the pocket model to bad clients for MINUTES=20, watching what grows
	$(BIN)/python -m bench.soak --minutes $(MINUTES) $(ARGS)

# Nothing can be installed on some GPU hosts, so any python3 that has torch will do.
.PHONY: test-gpu
test-gpu: ## Run the tests that need a CUDA device, with .venv or else PYTHON
	@python=$(BIN)/python; \
	$$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || python=$(PYTHON); \
	PYTHONPATH=protos:scheduler:worker:client$${PYTHONPATH:+:$$PYTHONPATH} $$python -m pytest -m gpu tests/gpu $(ARGS)

.PHONY: check
check: check-style check-types check-imports check-protos check-generated ## Lint, types, import contracts, proto files

.PHONY: check-style
check-style: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: check-types
check-types: $(INSTALLED_DEV)
	$(BIN)/mypy $(CHECKED)

.PHONY: check-imports
check-imports: $(INSTALLED_DEV)
	$(BIN)/lint-imports

# A release is a promise, so the proto files are compared with the last one; before the
# first release with the last commit, which shows what an uncommitted change would break.
.PHONY: check-protos
check-protos: $(BUF)
	$(BUF) lint protos
	@base=$$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null || echo HEAD); \
	rm -rf build/protos-base && mkdir -p build/protos-base && \
	git archive "$$base" protos | tar -x -C build/protos-base && \
	echo "$(BUF) breaking protos --against $$base" && \
	$(BUF) breaking protos --against build/protos-base/protos

.PHONY: check-generated
check-generated: generated
	@diff -qr -x __init__.py -x __pycache__ -x py.typed -x '*.proto' protos/tokenloom/v1 $(GENERATED)/tokenloom/v1 \
	|| { echo "generated code is stale: run make gen"; exit 1; }
	@echo "generated code is up to date"

.PHONY: gen
gen: generated ## Generate the Python code of the proto files
	rm -f protos/tokenloom/v1/*_pb2*
	cp $(GENERATED)/tokenloom/v1/* protos/tokenloom/v1/

# Into a folder of its own: a mistake in a proto file leaves the last good code in place.
.PHONY: generated
generated: $(INSTALLED_DEV)
	@rm -rf $(GENERATED) && mkdir -p $(GENERATED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc -Iprotos \
		--python_out=$(GENERATED) --mypy_out=quiet:$(GENERATED) $(PROTOS)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc -Iprotos \
		--grpc_python_out=$(GENERATED) --mypy_grpc_out=quiet:$(GENERATED) $$(grep -l '^service ' $(PROTOS))

.PHONY: bench
bench: $(INSTALLED) ## Measure the core and the path of a stream; bench/README.md explains
	$(BIN)/python -m bench $(ARGS)

.PHONY: clean
clean: ## Remove .venv, build outputs and caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf $(foreach part,$(PARTS),$(part)/build $(part)/*.egg-info)
	find $(PARTS) tests bench docs models -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes by its exact version: a range lets pip choose a build with gigabytes of CUDA
# libraries where a CPU build is offered beside it. setuptools builds the parts in place.
$(INSTALLED): constraints.txt $(PARTS:%=%/pyproject.toml)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the PATH; tokenloom needs Python 3.11 or newer: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); tokenloom needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@echo "Installing tokenloom into $(VENV) (minutes the first time, mostly torch)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) torch setuptools
	@$(PIP_INSTALL) --no-build-isolation $(PARTS:%=--editable %)
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.txt
	@echo "Installing the tools for tests and checks into $(VENV)"
	@$(PIP_INSTALL) --requirement requirements-dev.txt
	@touch $@

$(BUF): | $(INSTALLED)
	@command -v npm >/dev/null || { echo "npm is not on the PATH; checking the proto files takes buf, which comes with npm (Node.js 18 or newer)"; exit 1; }
	npm install --loglevel=error --no-save --no-package-lock --no-audit --no-fund --prefix $(VENV)/buf-$(BUF_VERSION) @bufbuild/buf@$(BUF_VERSION)
	@touch $@
