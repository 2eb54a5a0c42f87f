SHELL := /bin/bash
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
IMAGE ?= overlay-csi:$(VERSION)
FUZZTIME ?= 30s
KERNELS ?= 6.1 6.12

export CGO_ENABLED ?= 0

# grpcnotrace leaves html/template out of the driver, with which the linker could drop no method: 10 MB of 43.
BUILD_FLAGS := -trimpath -tags grpcnotrace -ldflags '-s -w -X main.version=$(VERSION)'
# The driver that all test packages share, built once. The tests of the race detector build their own.
TEST_BINARIES := $(CURDIR)/bin/test
# In a mount namespace of its own, a test that fails leaves nothing mounted on the machine.
ISOLATED := $(shell [[ $$(id -u) != 0 ]] || echo unshare --mount)

.PHONY: help
help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the driver, overlayctl and kubectl-overlay into bin/
	go build $(BUILD_FLAGS) -o bin/ ./cmd/...

.PHONY: image
image: ## Build the image of the driver as IMAGE (overlay-csi:VERSION) with DOCKER_BUILD_FLAGS
	docker build $(DOCKER_BUILD_FLAGS) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) -t $(IMAGE) .
	@docker image inspect --format '{{.Size}}' $(IMAGE) | \
	  awk '{printf "The image has %.1f MB, at most 55\n", $$1 / 1e6; exit $$1 > 55e6}'

.PHONY: demo
demo: build ## Show what the driver does, step by step (root)
	@go build -o bin/demo ./test/demo
	@bin/demo bin/overlay-csi

# The first tier of CI (.ci/run) runs test-unit, lint, demo, test, and a part of the rest; the second tier is proof.

# Under root the tests run in a user namespace that has no root, so that the same tests run as for anybody else.
.PHONY: test-unit
test-unit: ## Run the tests that need no root (a minute)
	env -u OVERLAY_CSI_TEST_ALL go test -timeout 5m -exec "$$([[ $$(id -u) = 0 ]] && echo 'unshare --user' || echo env)" ./cmd/... ./pkg/... ./test

.PHONY: test-binaries
test-binaries:
	@go build -o $(TEST_BINARIES)/ ./cmd/...

.PHONY: test
test: export OVERLAY_CSI_BINARY := $(TEST_BINARIES)/overlay-csi
test: test-binaries ## Run all tests with real mounts, csi-sanity and crash tests included (root)
	$(ISOLATED) go test -count=1 -timeout $(if $(OVERLAY_CSI_PROOF),6h,40m) ./...

.PHONY: test-race
test-race: export CGO_ENABLED = 1
test-race: export OVERLAY_CSI_BUILD_FLAGS = -race
test-race: ## The same tests with the race detector, in the driver's process too (root, a C compiler)
	$(ISOLATED) go test -race -count=1 -timeout $(if $(OVERLAY_CSI_PROOF),6h,60m) ./...

# RACE_RUN is what does many things at the same time: that finds races with the least repetition.
RACE_RUN ?= FiftyPods|ThirtyTwo|Race|UnderLoad|ManyPods|Predecessor|Blocked|TimedOut|Grow|HealthOfMany|Overlayctl|SlowPull|ManyDiskImages|Capacity|Kills

.PHONY: test-race-short
test-race-short: export CGO_ENABLED = 1
test-race-short: export OVERLAY_CSI_BUILD_FLAGS = -race
test-race-short: ## The packages and a part of the integration tests (RACE_RUN) with the race detector (root, a C compiler)
	$(ISOLATED) go test -race -short -count=1 -timeout 20m ./pkg/... ./test/sanity
	$(ISOLATED) go test -race -short -count=1 -timeout 20m -run '$(RACE_RUN)' ./test/integration

PROOFS := proof-test proof-race proof-kernel-6.1 proof-kernel-6.12 proof-e2e proof-fuzz proof-bench
.PHONY: proof $(PROOFS)
proof: ## The second tier, hours: long crash runs, race detector, whole kernels, end to end, an hour a fuzz target, all benchmarks (root, Debian, Docker)
	for part in $(PROOFS); do $(MAKE) $$part || exit 1; done
$(PROOFS): export OVERLAY_CSI_TEST_ALL := 1
$(PROOFS): export OVERLAY_CSI_PROOF := 1
proof-test: test
# All tests in both modes.
proof-e2e: export E2E_OTHER_RUN ?= .
proof-e2e: e2e
proof-race: test-race
proof-kernel-6.1 proof-kernel-6.12: proof-kernel-%:
	$(MAKE) test-kernels KERNELS=$*
proof-fuzz:
	$(MAKE) fuzz FUZZTIME=1h
proof-bench: bench
	$(ISOLATED) go run ./test/bench/kinds
	$(ISOLATED) go run ./test/bench/pull
	$(ISOLATED) go run ./test/bench/node

.PHONY: test-kernels
test-kernels: export KERNEL_DISKS := $(KERNEL_DISKS)
test-kernels: export KERNEL_FLAGS := $(KERNEL_FLAGS)
test-kernels: export KERNEL_RUN := $(KERNEL_RUN)
test-kernels: export KERNEL_BENCH := $(KERNEL_BENCH)
test-kernels: ## Run the integration tests on Debian's kernels KERNELS (6.1 6.12) in qemu (root, Debian; see test/kernel/run; hours)
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

.PHONY: bench-once
bench-once: ## Run each benchmark once, so that none stops working (root)
	$(ISOLATED) go test -run '^$$' -bench . -benchtime 1x ./pkg/...
	$(ISOLATED) go run ./test/bench -rounds 20 -views 50
	$(ISOLATED) go run ./test/bench/kinds -rounds 3 -files 1000
	$(ISOLATED) go run ./test/bench/node -views 50 -idle 1s -layered 2 -images 3 -pods 20 -churn 2s
	$(ISOLATED) go run ./test/bench/pull -rounds 1 -megabytes 50 -files 2000 $(BENCH_PULL_FLAGS)

.PHONY: scale
scale: ## Print the tables of docs/scale.md: etcd and an API server with up to 5,000 played nodes (SCALE_FLAGS; an hour)
	go build -o bin/scale-test ./test/scale
	bin/scale-test $(SCALE_FLAGS)

# They have no packages of their own, and to build them takes a quarter of an hour. That all of their packages are found, with the checksums of
# go.sum, takes seconds, and a minute where the modules are not there yet.
.PHONY: scale-modules
scale-modules: ## Check that what make scale builds is complete: etcd, Kubernetes and the sidecars (the Go module proxy)
	@for module in test/scale/servers test/scale/servers/provisioner; do \
	  (cd $$module && go list -mod=readonly -deps tool >/dev/null) || { echo "$$module: go mod tidy"; exit 1; }; done

.PHONY: docs
docs: ## Write docs/flags.md, docs/metrics.md and the kernel features in docs/operations.md from the code
	@{ printf '# Flags of overlay-csi\n\nMade from `overlay-csi --help` and `overlay-csi controller --help` by `make docs`.\n\n```\n'; \
	  go run ./cmd/overlay-csi --help 2>&1; printf '```\n\n```\n'; go run ./cmd/overlay-csi controller --help 2>&1; printf '```\n'; } > docs/flags.md
	@go test -count=1 ./test -run TestKernelFeaturesAreDocumented -update
	@go test -count=1 ./pkg/metrics -run TestMetricsAreDocumented -update

.PHONY: e2e
e2e: ## Run the end-to-end tests on a kind cluster made for them (docker, kind, kubectl, helm; see test/e2e/run)
	test/e2e/run

.PHONY: manifests
manifests: ## Write deploy/overlay-csi.yaml from the chart (helm)
	@{ printf '# Made from charts/overlay-csi and deploy/values.yaml by make manifests. The namespace is in namespace.yaml.\n'; \
	  helm template overlay-csi charts/overlay-csi --include-crds --namespace overlay-csi --values deploy/values.yaml | \
	  grep -v -e 'helm.sh/chart:' -e 'app.kubernetes.io/managed-by: Helm'; } > deploy/overlay-csi.yaml

.PHONY: lint-chart
lint-chart: ## Check the chart, and that deploy/ is made from it (helm)
	@for values in deploy/values.yaml charts/overlay-csi/ci/*.yaml; do \
	  echo "helm lint --strict --values $$values"; helm lint --quiet --strict --values $$values charts/overlay-csi || exit 1; done
	@mkdir -p bin; cp deploy/overlay-csi.yaml bin/manifests-before.yaml
	@$(MAKE) --no-print-directory manifests
	@diff -u bin/manifests-before.yaml deploy/overlay-csi.yaml || { echo "deploy/overlay-csi.yaml was not made from the chart: commit what make manifests has written"; exit 1; }

.PHONY: lint
lint: lint-format ## Check form, spelling and imports: gofmt, vet and the linters of go.mod's tool block and of test/lint
	go vet -tags e2e ./...
	go build -o bin/lint ./test/lint
	go vet -vettool=$(CURDIR)/bin/lint -tags e2e ./...
	go tool staticcheck -tags e2e ./...
	go tool unparam -tests=false ./cmd/... ./pkg/...
	git ls-files -z '*.go' '*.md' '*.yaml' '*.sh' | xargs -0 go tool misspell -error

.PHONY: lint-format
lint-format:
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "run gofmt -w on these"; exit 1; }

.PHONY: lint-commits
lint-commits: ## Check that commit subjects have at most 72 characters (since COMMITS_SINCE)
	@.ci/commit-subjects $(COMMITS_SINCE)

.PHONY: vulncheck
vulncheck: ## Look for known vulnerabilities (needs vuln.go.dev)
	go tool govulncheck ./...
