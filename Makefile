# What can be made, and with what: `make help`. A target is one line of go or one script of hack/;
# .ci/run calls only these targets.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Our module's packages: what `go test ./...` means, without test data and other modules (hack/tools, hack/cri-tools).
GO       ?= go
PKGS     ?= ./...
FUZZTIME ?= 20s
PREFIX   ?= /usr/local
SYSCONFDIR ?= /etc
DESTDIR  ?=

.PHONY: help
help: ## Print this list.
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## Install the Debian packages that building and testing need (as root; says what it installs).
	hack/deps.sh

.PHONY: build
build: ## Build bin/crispd and bin/crisp-init: two static binaries.
	hack/build.sh

.PHONY: tools
tools: ## Build the pinned linters and crictl into bin/tools.
	hack/tools.sh

.PHONY: test
test: deps build tools ## Run all tests, critest included; those that need root too when you are root.
	CRISPD=$(CURDIR)/bin/crispd hack/test.sh all

.PHONY: test-unit
test-unit: ## Run the tests that need no root, with the race detector.
	hack/test.sh unit

.PHONY: test-seccomp
test-seccomp: deps ## Compare our seccomp compiler with libseccomp, call by call.
	hack/test.sh seccomp

.PHONY: test-root
test-root: build ## Run the tests that need root (*_root_test.go): real namespaces, mounts, cgroups.
	hack/test.sh root

.PHONY: test-cri
test-cri: build ## Drive a real crispd through the kubelet's client (test/cri), then look for leaks.
	CRISPD=$(CURDIR)/bin/crispd hack/test.sh cri

.PHONY: test-crictl
test-crictl: build tools ## Drive a real crispd with crictl as a user would, then look for leaks.
	hack/crictl-test.sh

.PHONY: test-critest
test-critest: build ## Run the Kubernetes project's critest whole against a real crispd (as root; CRITEST="-focus REGEXP").
	hack/critest.sh $(CRITEST)

.PHONY: test-kubelet
test-kubelet: build tools ## Run a real kubelet, without an API server, on a real crispd (as root; builds the kubelet first: minutes).
	hack/kubelet-test.sh

.PHONY: test-service
test-service: tools ## Install, restart, upgrade, remove and purge the Debian package under running pods, in the guest (hack/guest).
	hack/service-test.sh

.PHONY: test-guest
test-guest: ## Test in a guest with cgroup v2, systemd and AppArmor (hack/guest; GUEST_ALL=1: all of it; GUEST=smoke: the least).
	hack/guest/test $(GUEST)

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME (default 20s) each.
	hack/fuzz.sh $(FUZZTIME)

.PHONY: lint
lint: tools ## gofmt, go vet, staticcheck, errcheck, misspell, import arrows; the rules and their reasons: hack/lint.sh.
	hack/lint.sh

.PHONY: fmt
fmt: ## Format all Go files.
	gofmt -l -w cmd cri hack image network podsandbox runtime test

.PHONY: generate
generate: ## Make the generated files anew.
	$(GO) generate $(PKGS)

.PHONY: verify
verify: ## Check that the generated files and go.sum are what is checked in.
	hack/verify.sh

.PHONY: demo
demo: build ## Show a pod running, end to end, and clean up (as root; about ten seconds after the build).
	hack/demo.sh

.PHONY: bench
bench: build ## Measure pods against the bare system calls, then run critest's own benchmarks (as root; BENCH="-n 100").
	hack/bench.sh $(BENCH)
	hack/critest.sh -benchmark

.PHONY: budgets
budgets: build ## Measure quickly, and fail when something costs more than its budget (as root; less than a minute).
	hack/bench.sh -quick -budgets

.PHONY: bench-peers
bench-peers: build ## Build containerd and runc from their Go modules and run bench against them, too (as root).
	hack/bench-peers.sh build
	hack/bench-peers.sh run $(BENCH)

.PHONY: install
install: build ## Install binaries, systemd units, sysctls and a configuration into $(PREFIX) and /etc (DESTDIR is honoured).
	DESTDIR=$(DESTDIR) PREFIX=$(PREFIX) SYSCONFDIR=$(SYSCONFDIR) hack/packaging/install

.PHONY: deb
deb: ## Build a Debian package, out/crisp_VERSION_ARCH.deb.
	hack/packaging/deb

.PHONY: clean
clean: ## Remove what was built.
	rm -rf bin out
