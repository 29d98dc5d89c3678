# The day's commands. Everything that is fetched goes into $XDG_CACHE_HOME/roost.
SHELL := /bin/bash
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/roost
LINT_VERSION := 2.15.0
LINT := $(CACHE)/golangci-lint-$(LINT_VERSION)
GO ?= go
RUNTESTS := $(GO) run ./cmd/internal/runtests -timeout 20m
ROOST_REQUIRE ?= envoy,consul,grpcio
export ROOST_REQUIRE

.PHONY: help build demo test race fuzz lint bench bench-ledger bench-migrate bench-xds check clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

build: ## bin/roost
	$(GO) build -o bin/roost ./cmd/roost

demo: build ## the main job live on loopback, with a real Envoy (downloaded the first time)
	./bin/roost demo

test: ## all tests, with a real Envoy, Consul and Python gRPC client (fetched or built the first time)
	@$(RUNTESTS) ./...

race: ## all tests under the race detector
	@$(RUNTESTS) -race ./...

fuzz: ## each fuzz target for a short while
	@for t in $$(grep -rhoE --include='*_test.go' '^func Fuzz[A-Za-z0-9]+' . | awk '{print $$2}' | sort); do \
		p=$$(grep -rlE --include='*_test.go' "^func $$t\b" . | xargs -n1 dirname); \
		echo "fuzz $$p $$t"; out=$$($(GO) test -run '^$$' -fuzz "^$$t$$" -fuzztime $(or $(FUZZTIME),10s) $$p 2>&1) || { echo "$$out"; exit 1; }; \
		echo "$$out" | tail -n 2; \
	done

lint: $(LINT) ## go vet and golangci-lint (built the first time, about a minute)
	$(GO) vet ./...
	$(LINT) run ./...

$(LINT):
	@echo "building golangci-lint $(LINT_VERSION) into $(CACHE)"
	@mkdir -p $(CACHE)
	cd cmd/internal/tools/lint && $(GO) build -trimpath -o $(LINT) github.com/golangci/golangci-lint/v2/cmd/golangci-lint

bench: ## the benchmarks of the packages
	$(GO) test -run '^$$' -bench . -benchmem ./...

bench-ledger: build ## a new address, ten thousand services, a drain with 200 proxies
	$(GO) run ./bench/ledger $(if $(OUTPUT),-o $(OUTPUT))

bench-migrate: build ## time from a registration to the first answer, beside a peer
	$(GO) run ./bench/migrate

bench-xds: ## what serving thousands of proxies costs, beside a peer (a quarter of an hour)
	$(GO) run ./bench/xds $(if $(OUTPUT),-o $(OUTPUT))

check: build ## what this host lacks
	./bin/roost check

clean: ## bin
	rm -rf bin
