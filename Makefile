# Everything a person does here; `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/zitadel-tokens
TOOLS := $(CACHE)/tools
CARGO_DENY_VERSION := 0.20.2
# Tests are processes and waits more than work; few threads keep two cores from thrashing.
TEST_THREADS ?= 4
# Where an image is to be made of another build than `make build`'s.
BINARY ?=
IMAGE_ARCHIVE ?= target/image/zitadel-tokens.tar
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
GO_TOOL := go -C tests/testbed/tools tool
CHART := $(CURDIR)/charts/zitadel-tokens
# The parts of the testbed that serve; the others are tools for single tests.
SERVERS := cluster controlplane issuer
# For each of the targets in fuzz/targets.rs.
FUZZ_SECONDS ?= 10

.PHONY: help demo test fuzz soak e2e lint chart fmt build image run testbed generate bench bench-quick test-zitadel ci

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Show the main job on this machine: a real API server, one token, one refresh
	@echo "==> testbed (the first time it builds a Kubernetes control plane: about 10 minutes)"
	@tests/testbed/build $(SERVERS) >/dev/null
	@echo "==> operator"
	@cargo build --quiet --bin zitadel-tokens --example demo
	@target/debug/examples/demo

test: testbed ## Unit and integration tests against a real API server
	cd tests/testbed/issuer && go test ./...
	cargo test -- --test-threads=$(TEST_THREADS)

fuzz: ## Random inputs from outside: keys, answers, templates, records (FUZZ_SECONDS for each)
	FUZZ_SECONDS=$(FUZZ_SECONDS) cargo test --test fuzz -- --nocapture

soak: servers ## Endurance, kills and watch faults, in minutes (CI=true: fewer rounds)
	cargo test --test soak -- --test-threads=1 --nocapture

e2e: ## Image and chart on a real node; E2E_KUBECONFIG takes a cluster of yours, BINARY another build
	@BINARY=$(BINARY) IMAGE_ARCHIVE=$(IMAGE_ARCHIVE) tests/e2e/run

lint: ## Format, clippy, licences, generated files
	cargo fmt --check
	@unformatted=$$(gofmt -l tests/testbed); [ -z "$$unformatted" ] || { echo "gofmt: $$unformatted"; exit 1; }
	cd tests/testbed/issuer && go vet ./...
	cd tests/testbed/cluster && go vet .
	cd tests/testbed/gitops && go vet .
	cargo clippy --all-targets -- -D warnings
	cargo clippy --test soak --test e2e -- -D warnings # not among all targets, since `cargo test` leaves them out
	$(MAKE) --no-print-directory deny
	$(MAKE) --no-print-directory generate chart
	@git diff --exit-code --stat -- crds charts docs || { echo "generated files differ; commit what 'make generate' wrote"; exit 1; }

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

build: ## Build the operator
	cargo build --release --locked

image: ## Write the image as an OCI archive; BINARY= takes another binary than that of `make build`
	@[ -n "$(BINARY)" ] || $(MAKE) --no-print-directory build
	image/build "$(or $(BINARY),target/release/zitadel-tokens)" "$(IMAGE_ARCHIVE)" \
		--label org.opencontainers.image.version=$(VERSION) \
		--label org.opencontainers.image.source=https://github.com/zitadel-tokens/zitadel-tokens \
		--label org.opencontainers.image.licenses=Apache-2.0

run: ## Run the operator against the current kubeconfig context
	cargo run --bin zitadel-tokens -- run --listen 127.0.0.1:8080

testbed: ## Build all that tests need: control plane, ZITADEL stand-in, Helm and more (cold: about 10 minutes)
	@tests/testbed/build

.PHONY: servers
servers:
	@tests/testbed/build $(SERVERS)

generate: ## Write the generated files: CRDs, the chart's copies and README, the reference pages
	cargo run --quiet --example xtask
	@$(GO_TOOL) helm-docs --log-level warning --chart-search-root $(CHART) --sort-values-order file

bench-quick: servers ## Burst, newcomer and restart beside a floor: a table in about five minutes
	cargo bench --bench fleet -- quick

bench: bench-quick ## The full benchmark

test-zitadel: ## The contract cases on a real ZITADEL (TEST_ZITADEL_URL, TEST_ZITADEL_ADMIN_KEY)
	@if [ -z "$${TEST_ZITADEL_URL:-}" ] || [ -z "$${TEST_ZITADEL_ADMIN_KEY:-}" ]; then \
		echo "skipped: set TEST_ZITADEL_URL and TEST_ZITADEL_ADMIN_KEY; see CONTRIBUTING.md"; \
	else \
		CONTRACT_SERVER=zitadel cargo test --test contract any_server:: -- --test-threads=$(TEST_THREADS); \
	fi

ci: ## What CI runs
	.ci/run
