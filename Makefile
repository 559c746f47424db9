# Every target sets itself up first: Python 3.11 or later, make and a package index are all it takes.
PYTHON ?= python3
BIN := .venv/bin
# The machine's own certificate store is trusted, as pip trusts it: behind a company proxy uv's built-in list is not enough.
UV := UV_SYSTEM_CERTS=1 $(BIN)/uv
UV_VERSION := $(shell sed -n 's/^uv==\([0-9.]*\).*/\1/p' requirements-dev.lock)
stamp := .venv/.ready
PYTEST := $(BIN)/python -m pytest
# Three at a time also on two cores: tests wait for processes and timeouts more than they work.
WORKERS ?= 3
PARALLEL := --numprocesses $(WORKERS) --dist worksteal
IMAGE ?= mayfly:local
ENGINE ?= podman

.PHONY: help setup up demo test test-fast test-deploy test-lowest audit sbom check format bench chaos fire lock clean

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(stamp) ## make .venv with everything in it

$(stamp): pyproject.toml requirements-dev.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Mayfly needs Python 3.11 or later; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements-dev.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

up: setup ## the service, all in one process on embedded defaults
	$(BIN)/mayfly up

demo: setup ## the whole story in under a minute, without keys or servers
	$(BIN)/mayfly demo

test: test-fast ## every test, on a real Redis, SQLite and PostgreSQL; about fifteen minutes
	$(PYTEST) $(PARALLEL) tests/e2e tests/faults

test-fast: setup ## unit and integration tests; about six minutes
	$(PYTEST) tests/unit tests/test_*.py tests/deploy
	$(PYTEST) $(PARALLEL) tests/integration

test-deploy: setup .venv-deploy/.ready ## build the image, run the compose stack, check the manifests
	$(PYTEST) -m "deploy or not deploy" tests/deploy

test-lowest: setup ## unit and integration tests with the oldest dependencies that pyproject.toml allows
	$(UV) venv --quiet --clear --python $(PYTHON) build/lowest
	$(UV) pip install --quiet --python build/lowest --resolution lowest-direct --group dev --editable .
	build/lowest/bin/python -m pytest $(PARALLEL) tests/unit tests/integration

audit: .venv-deploy/.ready ## look the locked versions up in a list of known vulnerabilities
	for lock in requirements-dev.lock deploy/requirements-tools.lock; do \
	    .venv-deploy/bin/pip-audit --strict --progress-spinner off --disable-pip --require-hashes --requirement $$lock || exit 1; \
	done

sbom: .venv-deploy/.ready ## list the Python packages of an image; IMAGE=mayfly:local ENGINE=podman
	rm -rf build/sbom
	$(PYTHON) -m venv --without-pip build/sbom
	container=$$($(ENGINE) create $(IMAGE)) \
	    && $(ENGINE) cp $$container:/opt/mayfly/lib/python3.11/site-packages/. build/sbom/lib/python*/site-packages \
	    && $(ENGINE) rm $$container
	.venv-deploy/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	    --output-file build/mayfly.cdx.json build/sbom

.venv-deploy/.ready: deploy/requirements-tools.lock | $(stamp)
	test -x .venv-deploy/bin/python || $(PYTHON) -m venv .venv-deploy
	$(UV) pip sync --quiet --compile-bytecode --python .venv-deploy/bin/python --require-hashes deploy/requirements-tools.lock
	touch $@

chaos: setup ## random faults against whole systems; SECONDS=60 each, SEED="1 2" or any
	CHAOS_SECONDS=$(or $(SECONDS),60) CHAOS_SEED="$(SEED)" $(PYTEST) -s -m chaos tests/faults

fire: setup ## 120 000 short connections, and the memory that they take; CONNECTIONS=120000
	FIRE_CONNECTIONS=$(or $(CONNECTIONS),120000) $(PYTEST) -s tests/faults/test_connections_under_fire.py

bench: setup ## the benchmarks, about ten minutes; ONLY=intake selects, FULL=1 takes a million records
	$(BIN)/python -m tests.bench $(if $(ONLY),--only $(ONLY)) $(if $(FULL),--full)

check: setup ## lint, format, types, and what each folder may import
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy deploy/examples
	$(BIN)/lint-imports

format: setup ## put the code into its form
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

lock: setup ## resolve the dependencies anew
	$(UV) lock --upgrade
	$(UV) export --quiet --frozen --no-dev --no-emit-project --output-file requirements.lock
	$(UV) export --quiet --frozen --all-groups --no-emit-project --output-file requirements-dev.lock

clean: ## remove what the other targets made
	rm -rf .venv .venv-deploy .pytest_cache .mypy_cache .ruff_cache build dist
