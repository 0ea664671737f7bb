# Everything a fresh machine needs to build, show and test segue. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/segue
SUITE ?= trixie
# `.cargo/config.toml` names the target, which is the host's own, and has the reasons.
PROGRAMS := $(or $(CARGO_TARGET_DIR),target)/x86_64-unknown-linux-gnu/debug
# Numbers of VMs that `make bench-flip` measures with; the claims need 100 and 10000.
SIZES ?= 100,1000,10000
# Migrations of each strategy in each topology that `make bench-blackout` makes; the claims need 20.
RUNS ?= 20
SCENARIOS := $(PROGRAMS)/scenarios
# Of other suites than $(SUITE): these bring their own.
BOOKWORM_FILES := scenarios/files/routed-bookworm.yaml
SCENARIO_FILES := $(filter-out $(BOOKWORM_FILES),$(sort $(wildcard scenarios/files/*.yaml)))
comma := ,
say = @printf '\033[1m==> %s\033[0m\n' "$(1)"

.PHONY: root help demo test test-fast test-lab test-scenarios bench-flip bench-blackout lint tools build packages image kubernetes image-bin run lab-up lab-down bench-arp-proxy fuzz-arp-proxy clean

# What `## ` after a target's name says is what `make help` shows.
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Each does its own set-up, is safe to run twice, and can be interrupted."
	@echo "The first run takes minutes: it builds an image and a Kubernetes server, once per machine, in $(CACHE)."

demo: root tools build ## real migrations with agents and without, in both topologies; tables of what peers saw (root)
	$(call say,Migrating a real guest on one switch)
	@$(SCENARIOS) run --name demo --suite $(SUITE) --out out/demo scenarios/files/one-migration.yaml
	$(call say,Migrating a real guest between gateways)
	@$(SCENARIOS) run --name demo --suite $(SUITE) --out out/demo/routed scenarios/files/routed-migration.yaml

# One after the other whatever -j says: timings and labs must not share the machine.
test: root tools build ## every test: unit, property, real servers, real migrations (root)
	@$(MAKE) -j1 test-fast
	@$(MAKE) -j1 test-lab
	@$(MAKE) -j1 test-scenarios
	$(call say,All tests passed)

test-fast: image-bin kubernetes ## unit, property and real-server tests only
	$(call say,Unit and property tests and tests against real servers)
	@cargo test --workspace

test-lab: tools build ## the tests of the lab itself, and of the probe between namespaces (root)
	$(call say,Tests that need root or time: the probe between namespaces$(comma) the lab itself)
	@SEGUE_QEMU=$(CACHE)/image-bin/qemu-system-x86_64 cargo test --workspace -- --ignored --test-threads=1

test-scenarios: tools build ## the real migrations only (root)
	$(call say,Real migrations: $(words $(SCENARIO_FILES)) scenarios)
	@$(SCENARIOS) run --name test --suite $(SUITE) --out out/test $(SCENARIO_FILES)
	$(call say,Real migrations with an older OVN)
	@$(SCENARIOS) run --name test --suite bookworm --out out/test/bookworm $(BOOKWORM_FILES)

bench-flip: root image ## how long a flip takes with 100 to 10,000 VMs: table, plot, JSON (root, 10 minutes)
	$(call say,Timing flips with $(SIZES) VMs)
	@$(SCENARIOS) bench flip --suite $(SUITE) --sizes $(SIZES) --check --out out/bench-flip

bench-blackout: root tools build ## what a guest's peers see of its migrations, segue beside others: table, pictures, JSON (root, an hour)
	$(call say,Migrating $(RUNS) times by each strategy in each topology)
	@$(SCENARIOS) bench blackout --suite $(SUITE) --runs $(RUNS) --out out/bench-blackout

lint: ## formatting and lints, as errors
	$(call say,Formatting and lints)
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --quiet -- -D warnings

# === What the rest needs ===

# The three take minutes and hardly compete: the first downloads, the others compile.
tools: packages ## what the others need: the lab's Debian image, kube-apiserver, OVS tools
	@$(MAKE) -j3 image kubernetes image-bin

root:
	@[ "$$(id -u)" = 0 ] || { echo "error: the lab needs root: namespaces, mounts and taps" >&2; exit 1; }

packages:
	@tools/packages.sh

image: packages $(SCENARIOS)
	@$(SCENARIOS) lab image --suite $(SUITE)

kubernetes:
	@tools/kubernetes/build.sh >/dev/null

# Open vSwitch's programs out of the lab's image, runnable without root, for the tests of ovsdb-rs and node-hooks.
image-bin: image
	@tools/image-bin.sh "$$($(SCENARIOS) lab image --suite $(SUITE) --print)" $(CACHE)/image-bin

# Always the whole workspace: for a part of it Cargo would choose other features, and compile dependencies anew. Cargo
# knows best what is up to date.
build: $(SCENARIOS) ## all programs, static, as the lab, its guests and the tests run them
.PHONY: $(SCENARIOS)
$(SCENARIOS):
	@cargo build --workspace

run: root tools build ## run the scenarios in FILES="…" on a lab; reports go to out/ (root)
	@$(SCENARIOS) run --suite $(SUITE) $(or $(FILES),$(error FILES="…" names the scenarios to run, as in scenarios/files/))

lab-up: root tools build ## leave a lab running, to poke at with kubectl, ovn-nbctl and virsh (root)
	@$(SCENARIOS) lab up --suite $(SUITE)

lab-down: $(SCENARIOS) ## remove that lab (root)
	@$(SCENARIOS) lab down

bench-arp-proxy: root ## how many questions a second arp-proxy answers on one core, and how fast (root)
	$(call say,arp-proxy: 10$(comma)000 questions a second on one core)
	@cargo bench --profile dev -p arp-proxy --bench flood -- --json $(CURDIR)/out/bench-arp-proxy/results.json

# The sanitizer needs a flag that only nightly takes, or a compiler that is told to behave like one. What is found worth
# keeping is replayed by an ordinary test, with overflow checks.
FUZZ_SECONDS ?= 600
fuzz-arp-proxy: ## feed arp-proxy what no station sends, for FUZZ_SECONDS (600)
	$(call say,Fuzzing what arp-proxy receives for $(FUZZ_SECONDS) s)
	@command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz --version 0.13.2
	@cd arp-proxy && RUSTC_BOOTSTRAP=1 nice -n 19 cargo fuzz run -O wire -- -max_total_time=$(FUZZ_SECONDS) -max_len=512 -print_final_stats=1
	@cd arp-proxy && RUSTC_BOOTSTRAP=1 nice -n 19 cargo fuzz cmin -O wire -- -max_len=512

clean: ## remove what was built and the lab; the cache stays
	@if [ -x $(SCENARIOS) ] && [ "$$(id -u)" = 0 ]; then $(SCENARIOS) lab down; fi
	@rm -rf out arp-proxy/fuzz/target
	@cargo clean
