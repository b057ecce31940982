# Developer tasks; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/zitadel-tokens
TOOLS := $(CACHE)/tools
CARGO_DENY_VERSION := 0.20.2
# Tests mostly start processes and wait; a low thread count avoids overloading a machine with two cores.
TEST_THREADS ?= 4
# Binary for the image, if it is not the one that `make build` builds.
BINARY ?=
IMAGE_ARCHIVE ?= target/image/zitadel-tokens.tar
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
GO_TOOL := go -C tests/testbed/tools tool
CHART := $(CURDIR)/charts/zitadel-tokens
# The servers of the testbed; its other parts are tools that only some tests need.
SERVERS := cluster controlplane issuer
# Duration for each target in fuzz/targets.rs.
FUZZ_SECONDS ?= 10

.PHONY: help demo test fuzz soak e2e lint chart fmt build image run testbed generate bench bench-quick test-zitadel ci

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Demo on this machine: a real API server, one token, one refresh, one user that calls the ZITADEL API
	@echo "==> testbed (the first time it builds a Kubernetes control plane: about 10 minutes)"
	@tests/testbed/build $(SERVERS) >/dev/null
	@echo "==> operator"
	@cargo build --quiet --bin zitadel-tokens --example demo
	@target/debug/examples/demo

test: testbed ## Run unit tests, and integration tests against a real API server
	cd tests/testbed/issuer && go test ./...
	cargo test -- --test-threads=$(TEST_THREADS)

fuzz: ## Fuzz external inputs: keys, responses, templates, records (FUZZ_SECONDS for each target)
	FUZZ_SECONDS=$(FUZZ_SECONDS) cargo test --test fuzz -- --nocapture

soak: servers ## Run endurance tests with kills and watch faults; takes minutes (CI=true: fewer rounds)
	cargo test --test soak -- --test-threads=1 --nocapture

e2e: ## Test image and chart on a real node (E2E_KUBECONFIG: use your cluster; BINARY: use this binary)
	@BINARY=$(BINARY) IMAGE_ARCHIVE=$(IMAGE_ARCHIVE) tests/e2e/run

lint: ## Check formatting, clippy, licenses, chart, workflows and generated files
	cargo fmt --check
	@unformatted=$$(gofmt -l tests/testbed); [ -z "$$unformatted" ] || { echo "gofmt: $$unformatted"; exit 1; }
	cd tests/testbed/issuer && go vet ./...
	cd tests/testbed/cluster && go vet .
	cd tests/testbed/gitops && go vet .
	cargo clippy --all-targets -- -D warnings
	cargo clippy --test soak --test e2e -- -D warnings # --all-targets excludes targets with test = false
	$(MAKE) --no-print-directory deny
	$(MAKE) --no-print-directory generate chart
	@git diff --exit-code --stat -- crds charts docs || { echo "generated files are out of date: run 'make generate' and commit the result"; exit 1; }

.PHONY: deny
deny: $(TOOLS)/bin/cargo-deny
	$< --log-level error check bans licenses sources

$(TOOLS)/bin/cargo-deny:
	cargo install --quiet cargo-deny --locked --version $(CARGO_DENY_VERSION) --root $(TOOLS)

chart: ## Lint the chart and the workflows, and run the chart's unit tests
	@$(GO_TOOL) helm lint --strict --quiet $(CHART)
	@$(GO_TOOL) helm-unittest --strict $(CHART)
	@$(GO_TOOL) actionlint -shellcheck= -pyflakes= $(wildcard $(CURDIR)/.github/workflows/*.yaml)

fmt: ## Format Rust and Go
	cargo fmt
	gofmt -w tests/testbed

build: ## Build the operator (release)
	cargo build --release --locked

image: ## Write the image as an OCI archive (BINARY: use this binary instead of building one)
	@[ -n "$(BINARY)" ] || $(MAKE) --no-print-directory build
	image/build "$(or $(BINARY),target/release/zitadel-tokens)" "$(IMAGE_ARCHIVE)" \
		--label org.opencontainers.image.version=$(VERSION) \
		--label org.opencontainers.image.source=https://github.com/zitadel-tokens/zitadel-tokens \
		--label org.opencontainers.image.licenses=Apache-2.0

run: ## Run the operator against the current kubeconfig context
	cargo run --bin zitadel-tokens -- run --listen 127.0.0.1:8080

testbed: ## Build the testbed: control plane, ZITADEL stand-in, Helm and more (first time: about 10 minutes)
	@tests/testbed/build

.PHONY: servers
servers:
	@tests/testbed/build $(SERVERS)

generate: ## Write the generated files: CRDs, the chart's copies and README, reference pages
	cargo run --quiet --example xtask
	@$(GO_TOOL) helm-docs --log-level warning --chart-search-root $(CHART) --sort-values-order file

bench-quick: servers ## Benchmark burst, new object and restart against a baseline (about five minutes)
	cargo bench --bench fleet -- quick

bench: bench-quick ## Run the full benchmark

test-zitadel: ## Run the contract tests on a real ZITADEL (TEST_ZITADEL_URL, TEST_ZITADEL_ADMIN_KEY)
	@if [ -z "$${TEST_ZITADEL_URL:-}" ] || [ -z "$${TEST_ZITADEL_ADMIN_KEY:-}" ]; then \
		echo "skipped: set TEST_ZITADEL_URL and TEST_ZITADEL_ADMIN_KEY; see CONTRIBUTING.md"; \
	else \
		CONTRACT_SERVER=zitadel cargo test --test contract any_server:: -- --test-threads=$(TEST_THREADS); \
	fi

ci: ## Run what CI runs
	.ci/run
