# The two commands of a new user: `make demo` shows the main job, `make test`
# proves it. Both install what they need (apt or dnf, as root or through sudo);
# the one prerequisite is a Rust toolchain.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TARGET := $(or $(CARGO_TARGET_DIR),target)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
export CARGO_TARGET_DIR := $(abspath $(TARGET))

# What the demo needs, then what the tests need besides.
DEBIAN_DEMO := bubblewrap createrepo-c curl dnf dpkg-dev gcc libc6-dev libcap2-bin libostree-dev ostree pkg-config rpm sqlite3 util-linux
DEBIAN_TEST := attr buildah catatonit containernetworking-plugins crun docker-registry dracut-core jq passwd podman runc skopeo uidmap umoci
# Fedora's names for the same. Not tried yet: there is no Fedora where this is written.
FEDORA_DEMO := bubblewrap createrepo_c curl dnf dpkg gcc glibc-devel glibc-static libcap ostree-devel ostree pkgconf-pkg-config rpm sqlite util-linux
FEDORA_TEST := attr buildah catatonit containernetworking-plugins crun docker-distribution dracut jq shadow-utils podman runc skopeo umoci

.PHONY: help
help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.PHONY: toolchain
toolchain:
	@command -v cargo >/dev/null || { \
	  echo "oscontainer needs a Rust toolchain (cargo and rustc, 1.91 or newer): install it with rustup, or your distribution's packages, and try again." >&2; exit 2; }

# $(call packages,DEBIAN,FEDORA): installs what is missing of them.
define packages
	if command -v apt-get >/dev/null; then \
	  missing=$$(for p in $(1); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q ' installed' || echo $$p; done); \
	  if [ -n "$$missing" ]; then $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; fi; \
	elif command -v dnf >/dev/null; then \
	  rpm -q $(2) >/dev/null || $(SUDO) dnf install -y -q $(2); \
	else echo "neither apt-get nor dnf: install these yourself: $(1)" >&2; exit 2; fi
endef

.PHONY: setup-demo
setup-demo: toolchain
	@$(call packages,$(DEBIAN_DEMO),$(FEDORA_DEMO))

.PHONY: setup-test
setup-test: setup-demo
	@$(call packages,$(DEBIAN_TEST),$(FEDORA_TEST))

.PHONY: build
build: setup-demo static ## Build both programs and the fixtures' tools
	cargo build --release --workspace --locked

.PHONY: static
static: toolchain ## Build the aggregator as one fully static executable
	cargo rustc --release --locked -p oscontainer-aggregator --bin oscontainer-aggregator -- -C target-feature=+crt-static -C strip=symbols
	mkdir -p $(TARGET)/static
	cp $(TARGET)/release/oscontainer-aggregator $(TARGET)/static/oscontainer-aggregator.new
	mv $(TARGET)/static/oscontainer-aggregator.new $(TARGET)/static/oscontainer-aggregator

.PHONY: demo
demo: build ## From a treefile to a node that pulls, on this machine
	tests/demo.sh $(TARGET) $(VERSION)

.PHONY: lint
lint: toolchain ## Formats, lints
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --locked -- -D warnings

.PHONY: test
test: setup-test build ## Run all tests
	cargo fmt --all --check
	cargo test --release --workspace --locked --no-fail-fast
	tests/demo.sh $(TARGET) $(VERSION)
