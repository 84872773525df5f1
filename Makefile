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
# What Envoy turns into JSON: the API, and the messages in which a status is explained.
DESCRIBED := tokenloom/v1/inference.proto google/rpc/status.proto google/rpc/error_details.proto
BUF_VERSION := 1.75.0
BUF := $(VENV)/buf-$(BUF_VERSION)/node_modules/.bin/buf
PROMETHEUS := $(VENV)/prometheus
UV_VERSION := 0.13.9
UV := $(VENV)/uv-$(UV_VERSION)/bin/uv

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
test: $(INSTALLED_DEV) $(PROMETHEUS) ## Run the tests that need no GPU; ARGS="-k name -x" narrows them
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
	@diff -q deploy/envoy/tokenloom.pb $(GENERATED)/tokenloom.pb || { echo "the descriptors for Envoy are stale: run make gen"; exit 1; }
	@echo "generated code is up to date"

.PHONY: gen
gen: generated ## Generate the Python code of the proto files, and their descriptors for Envoy
	rm -f protos/tokenloom/v1/*_pb2*
	cp $(GENERATED)/tokenloom/v1/* protos/tokenloom/v1/
	cp $(GENERATED)/tokenloom.pb deploy/envoy/

# Into a folder of its own: a mistake in a proto file leaves the last good code in place.
.PHONY: generated
generated: $(INSTALLED_DEV)
	@rm -rf $(GENERATED) && mkdir -p $(GENERATED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc -Iprotos \
		--python_out=$(GENERATED) --mypy_out=quiet:$(GENERATED) $(PROTOS)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc -Iprotos \
		--grpc_python_out=$(GENERATED) --mypy_grpc_out=quiet:$(GENERATED) $$(grep -l '^service ' $(PROTOS))
	@$(BIN)/python -m grpc_tools.protoc -Iprotos -I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		--include_imports --descriptor_set_out=$(GENERATED)/tokenloom.pb $(DESCRIBED)

# What the images install. triton is torch's own choice there; the tests pin another one for its interpreter.
# The build of torch for CPUs is on no default package index: TORCH_CPU is a folder or a page that has it.
LOCK := $(UV) pip compile --quiet --generate-hashes --no-header --no-annotate --constraint build/constraints.txt \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 $(PARTS:%=--no-emit-package tokenloom-%)

.PHONY: lock
lock: $(UV) ## Pin what the images install, with hashes; TORCH_CPU=DIR has torch's build for CPUs
	@mkdir -p build && grep -v '^triton==' constraints.txt > build/constraints.txt
	for image in build scheduler worker; do $(LOCK) deploy/images/$$image.in -o deploy/images/$$image.lock || exit; done
	$(LOCK) --find-links "$(TORCH_CPU)" deploy/images/cpu.in -o deploy/images/cpu.lock

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

# Prometheus and promtool, for the tests of metrics, alert rules and dashboards: those of the PATH, or
# Debian's package, unpacked and not installed. Where neither can be had these tests are skipped; not in CI.
$(PROMETHEUS): | $(INSTALLED)
	@mkdir -p $@.draft
	@if command -v prometheus >/dev/null && command -v promtool >/dev/null; then \
		echo "prometheus and promtool are on the PATH"; \
	elif command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then \
		cd $@.draft && { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }; } && \
		dpkg-deb --extract prometheus_*.deb . && rm prometheus_*.deb; \
	else \
		echo "prometheus and promtool are not on the PATH: what needs them is skipped"; \
	fi
	@mv $@.draft $@

$(UV): | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $(VENV)/uv-$(UV_VERSION) uv==$(UV_VERSION)
	@touch $@
