SHELL := /bin/bash
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
IMAGE ?= overlay-csi:$(VERSION)
FUZZTIME ?= 30s
KERNELS ?= 6.1 6.12

export CGO_ENABLED ?= 0

.PHONY: help
help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the driver and overlayctl into bin/
	go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/...

.PHONY: image
image: ## Build the image of the driver as IMAGE (overlay-csi:VERSION) with DOCKER_BUILD_FLAGS
	docker build $(DOCKER_BUILD_FLAGS) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) -t $(IMAGE) .

.PHONY: demo
demo: build ## Show what the driver does, step by step (root)
	@go build -o bin/demo ./test/demo
	@bin/demo bin/overlay-csi

.PHONY: test
test: ## Run all tests with real mounts, csi-sanity and crash tests included (root)
	go test -count=1 -timeout 30m ./...

.PHONY: test-race
test-race: ## The same tests with the race detector, in the driver's process too (root, a C compiler)
	CGO_ENABLED=1 OVERLAY_CSI_BUILD_FLAGS=-race go test -race -count=1 -timeout 40m ./...

.PHONY: test-kernels
test-kernels: export KERNEL_DISKS := $(KERNEL_DISKS)
test-kernels: export KERNEL_FLAGS := $(KERNEL_FLAGS)
test-kernels: export KERNEL_RUN := $(KERNEL_RUN)
test-kernels: export KERNEL_BENCH := $(KERNEL_BENCH)
test-kernels: ## The integration tests on Debian's kernels KERNELS (6.1 6.12) in qemu (root, Debian; see test/kernel/run; hours)
	test/kernel/run $(KERNELS)

# Before Go 1.27 the fuzzer now and then fails when its time is over, with nothing found (go.dev/issue/75804).
.PHONY: fuzz
fuzz: export GOTOOLCHAIN = go1.27.4
fuzz: ## Run each fuzz target for FUZZTIME (30s)
	@set -e; for package in $$(grep -rl --include='*_test.go' '^func Fuzz' pkg | xargs -n1 dirname | sort -u); do \
	  for target in $$(grep -ho '^func Fuzz[A-Za-z]*' $$package/*_test.go | cut -d' ' -f2); do \
	    echo "== $$package $$target"; go test ./$$package -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1s; \
	  done; done

.PHONY: bench
bench: ## Print the table of docs/performance.md: the driver beside the raw system calls (root, 5 minutes)
	go run ./test/bench

.PHONY: docs
docs: ## Write docs/flags.md and the kernel features in docs/operations.md from the code
	@{ printf '# Flags of overlay-csi\n\nMade from `overlay-csi --help` by `make docs`.\n\n```\n'; go run ./cmd/overlay-csi --help 2>&1; printf '```\n'; } > docs/flags.md
	@go test -count=1 ./test -run TestKernelFeaturesAreDocumented -update

.PHONY: e2e
e2e: ## Run the end-to-end tests on a kind cluster made for them (docker, kind, kubectl, helm; see test/e2e/run)
	test/e2e/run

.PHONY: manifests
manifests: ## Write deploy/overlay-csi.yaml from the chart (helm)
	@{ printf '# Made from charts/overlay-csi and deploy/values.yaml by make manifests. The namespace is in namespace.yaml.\n'; \
	  helm template overlay-csi charts/overlay-csi --namespace overlay-csi --values deploy/values.yaml | \
	  grep -v -e 'helm.sh/chart:' -e 'app.kubernetes.io/managed-by: Helm'; } > deploy/overlay-csi.yaml

.PHONY: lint-chart
lint-chart: ## Check the chart, and that deploy/ is made from it (helm)
	@for values in deploy/values.yaml charts/overlay-csi/ci/*.yaml; do \
	  echo "helm lint --strict --values $$values"; helm lint --quiet --strict --values $$values charts/overlay-csi || exit 1; done
	@mkdir -p bin; cp deploy/overlay-csi.yaml bin/manifests-before.yaml
	@$(MAKE) --no-print-directory manifests
	@diff -u bin/manifests-before.yaml deploy/overlay-csi.yaml || { echo "deploy/overlay-csi.yaml was not made from the chart: commit what make manifests has written"; exit 1; }

.PHONY: lint
lint: ## Check form, vet and staticcheck
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "run gofmt -w on these"; exit 1; }
	go vet -tags e2e ./...
	go tool staticcheck -tags e2e ./...

.PHONY: vulncheck
vulncheck: ## Look for known vulnerabilities (needs vuln.go.dev)
	go tool govulncheck ./...
