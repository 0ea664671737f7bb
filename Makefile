# Everything a fresh machine needs to build, show and test segue. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/segue
SUITE ?= trixie
TARGET := $(or $(CARGO_TARGET_DIR),target)
GUEST_TARGET := x86_64-unknown-linux-gnu
SCENARIOS := $(TARGET)/release/scenarios
PROBE := $(TARGET)/guest/$(GUEST_TARGET)/release/dataplane-probe
# Of other suites than $(SUITE): these bring their own.
BOOKWORM_FILES := scenarios/files/routed-bookworm.yaml
SCENARIO_FILES := $(filter-out $(BOOKWORM_FILES),$(sort $(wildcard scenarios/files/*.yaml)))
comma := ,
say = @printf '\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: root help demo test test-fast test-lab test-scenarios lint tools build packages image kubernetes ovs-bin lab-up lab-down clean

help: ## List the targets
	@echo "make demo      two real migrations, end to end, with tables of what their peers saw (root)"
	@echo "make test      every test: unit, property, real servers, real migrations (root)"
	@echo
	@echo "make test-fast unit, property and real-server tests only"
	@echo "make lint      formatting and lints, as errors"
	@echo "make lab-up    leave a lab running, to poke at with kubectl, ovn-nbctl and virsh (root)"
	@echo "make lab-down  remove it (root)"
	@echo "make tools     what the others need: the lab's Debian image, kube-apiserver, OVS tools"
	@echo "make build     the release binaries and the guest's static probe"
	@echo "make clean     remove what was built and the lab; the cache in $(CACHE) stays"
	@echo
	@echo "Each does its own set-up, is safe to run twice, and can be interrupted."
	@echo "The first run takes minutes: it builds an image and a Kubernetes server, once per machine."

demo: root tools build ## A real migration in each topology
	$(call say,Migrating a real guest on one switch)
	@$(SCENARIOS) run --name demo --suite $(SUITE) --out out/demo scenarios/files/one-migration.yaml
	$(call say,Migrating a real guest between gateways)
	@$(SCENARIOS) run --name demo --suite $(SUITE) --out out/demo/routed scenarios/files/routed-migration.yaml

# One after the other whatever -j says: timings and labs must not share the machine.
test: root tools build ## Everything
	@$(MAKE) -j1 test-fast
	@$(MAKE) -j1 test-lab
	@$(MAKE) -j1 test-scenarios
	$(call say,All tests passed)

test-fast: ovs-bin kubernetes
	$(call say,Unit and property tests and tests against real servers)
	@cargo test --workspace

test-lab: tools build
	$(call say,Tests that need root or time: the probe between namespaces$(comma) the lab itself)
	@cargo test -p dataplane-probe -p scenarios -- --ignored --test-threads=1

test-scenarios: tools build
	$(call say,Real migrations: $(words $(SCENARIO_FILES)) scenarios)
	@$(SCENARIOS) run --name test --suite $(SUITE) --out out/test $(SCENARIO_FILES)
	$(call say,Real migrations with an older OVN)
	@$(SCENARIOS) run --name test --suite bookworm --out out/test/bookworm $(BOOKWORM_FILES)

lint:
	$(call say,Formatting and lints)
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --quiet -- -D warnings

# === What the rest needs ===

# The three take minutes and hardly compete: the first downloads, the others compile.
tools: packages
	@$(MAKE) -j3 image kubernetes ovs-bin

root:
	@[ "$$(id -u)" = 0 ] || { echo "error: the lab needs root: namespaces, mounts and taps" >&2; exit 1; }

packages:
	@tools/packages.sh

image: packages $(SCENARIOS)
	@$(SCENARIOS) lab image --suite $(SUITE)

kubernetes:
	@tools/kubernetes/build.sh >/dev/null

# Open vSwitch's programs out of the lab's image, runnable without root, for the tests of ovsdb-rs.
ovs-bin: image
	@tools/ovs-bin.sh "$$($(SCENARIOS) lab image --suite $(SUITE) --print)" $(CACHE)/ovs-bin

build: $(SCENARIOS) $(TARGET)/release/migration-controller $(PROBE)

# Cargo knows best what is up to date.
.PHONY: $(SCENARIOS) $(TARGET)/release/migration-controller $(PROBE)
$(SCENARIOS) $(TARGET)/release/migration-controller &:
	@cargo build --release -p scenarios -p migration-controller

# A target directory of its own: other flags would make Cargo rebuild everything at every switch.
$(PROBE):
	@RUSTFLAGS="-C target-feature=+crt-static" CARGO_PROFILE_RELEASE_STRIP=true cargo build --release -p dataplane-probe \
	    --target $(GUEST_TARGET) --target-dir $(TARGET)/guest

lab-up: root tools build
	@$(SCENARIOS) lab up --suite $(SUITE)

lab-down: $(SCENARIOS)
	@$(SCENARIOS) lab down

clean:
	@if [ -x $(SCENARIOS) ] && [ "$$(id -u)" = 0 ]; then $(SCENARIOS) lab down; fi
	@rm -rf out
	@cargo clean
