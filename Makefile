# The two commands of a new user: `make demo` shows the main job, `make test`
# proves it. Both install what they need (apt or dnf, as root or through sudo);
# the one prerequisite is a Rust toolchain.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Absolute, so that a second make, which inherits it, means the same files.
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
export CARGO_TARGET_DIR := $(TARGET)

# What the demo needs, then what the tests need besides, then what booting needs.
DEBIAN_DEMO := bubblewrap ca-certificates createrepo-c curl dnf dpkg-dev gcc libc6-dev libcap2-bin libostree-dev ostree pkg-config rpm sqlite3 util-linux
DEBIAN_TEST := attr bsdutils buildah catatonit ceph-mon ceph-osd chromium containernetworking-plugins crun docker-registry e2fsprogs g++ gnupg gpg gpg-agent jq memcached mmdebstrap openssl passwd podman policycoreutils procps python3 python3-keystone python3-keystonemiddleware python3-swiftclient python3-venv radosgw rclone runc skopeo swift-account swift-container swift-object swift-proxy systemd uidmap umoci
DEBIAN_BOOT := qemu-system-x86
# Fedora's names for the same. Not tried yet: there is no Fedora where this is written.
FEDORA_DEMO := bubblewrap ca-certificates createrepo_c curl dnf dpkg gcc glibc-devel glibc-static libcap ostree ostree-devel pkgconf-pkg-config rpm sqlite util-linux
FEDORA_TEST := /usr/bin/script attr buildah catatonit ceph-mon ceph-osd ceph-radosgw chromium containernetworking-plugins crun docker-distribution e2fsprogs gcc-c++ gnupg2 jq memcached mmdebstrap openssl openstack-swift-account openstack-swift-container openstack-swift-object openstack-swift-proxy podman policycoreutils procps-ng python3 python3-keystonemiddleware python3-pip python3-swiftclient rclone runc shadow-utils skopeo systemd umoci
FEDORA_BOOT := qemu-system-x86-core

DEBIAN_BENCH := docker-registry jq memcached nginx-light openssl python3 python3-swiftclient swift-account swift-container swift-object swift-proxy wrk
FEDORA_BENCH := docker-distribution jq memcached nginx openssl openstack-swift-account openstack-swift-container openstack-swift-object openstack-swift-proxy python3 python3-swiftclient wrk

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
	  rpm -q --whatprovides $(2) >/dev/null || $(SUDO) dnf install -y -q $(2); \
	else echo "neither apt-get nor dnf: install these yourself: $(1)" >&2; exit 2; fi
endef

.PHONY: setup-demo
setup-demo: toolchain
	@$(call packages,$(DEBIAN_DEMO),$(FEDORA_DEMO))

.PHONY: setup-test
setup-test: setup-demo
	@$(call packages,$(DEBIAN_TEST),$(FEDORA_TEST))
	@# Any kubectl will do; distributions' and vendors' packages of it exclude each other.
	@command -v kubectl >/dev/null || { $(call packages,kubernetes-client,/usr/bin/kubectl); }
	@# An ordinary user, with subordinate ids, for the builds that need no privileges.
	@id oscontainer-test >/dev/null 2>&1 || $(SUDO) useradd --create-home oscontainer-test
	@$(MAKE) --no-print-directory $(SCHEMAS) $(EMULATORS)

# The schemas that the manifests are compared with: Kubernetes' as the Python package brings
# them, one file for each kind and version, and OpenShift's as the npm package brings them.
KUBERNETES_VALIDATE := 1.37.0
OPENSHIFT_REST_CLIENT := 9.1.1
SCHEMAS := $(TARGET)/schemas/.$(KUBERNETES_VALIDATE)-$(OPENSHIFT_REST_CLIENT)
$(SCHEMAS):
	@rm -rf $(TARGET)/schemas && mkdir -p $(TARGET)/schemas
	@python3 -m venv $(TARGET)/schemas/venv
	@$(TARGET)/schemas/venv/bin/pip install -q --disable-pip-version-check --no-deps kubernetes-validate==$(KUBERNETES_VALIDATE)
	@mv $(TARGET)/schemas/venv/lib/python3*/site-packages/kubernetes_validate/kubernetes-json-schema $(TARGET)/schemas/kubernetes
	@rm -r $(TARGET)/schemas/venv
	@command -v npm >/dev/null || { $(call packages,npm,npm); }
	@cd $(TARGET)/schemas && npm pack --silent openshift-rest-client@$(OPENSHIFT_REST_CLIENT)
	@tar xOf $(TARGET)/schemas/openshift-rest-client-$(OPENSHIFT_REST_CLIENT).tgz package/lib/specs/openshift-openapi-spec.json.gz | gzip -d >$(TARGET)/schemas/openshift.json
	@touch $@

# What the endpoint's tests take for the stores that only their owners run: Microsoft's Azurite as
# the npm package brings it, and an emulator of Google's store as the Python package brings it.
AZURITE := 3.35.0
GCP_STORAGE_EMULATOR := 2026.7.19
EMULATORS := $(TARGET)/emulators/.$(AZURITE)-$(GCP_STORAGE_EMULATOR)
$(EMULATORS):
	@rm -rf $(TARGET)/emulators && mkdir -p $(TARGET)/emulators
	@python3 -m venv $(TARGET)/emulators/python
	@$(TARGET)/emulators/python/bin/pip install -q --disable-pip-version-check gcp-storage-emulator==$(GCP_STORAGE_EMULATOR)
	@command -v npm >/dev/null || { $(call packages,npm,npm); }
	@npm install --silent --no-audit --no-fund --omit=optional --prefix $(TARGET)/emulators azurite@$(AZURITE)
	@touch $@

.PHONY: setup-boot
setup-boot: setup-demo
	@$(call packages,$(DEBIAN_BOOT),$(FEDORA_BOOT))

.PHONY: build
build: setup-demo static ## Build both programs and the fixtures' tools
	cargo build --release --workspace --locked

.PHONY: static
static: toolchain ## Build the aggregator as one fully static executable
	cargo rustc --release --locked -p oscontainer-aggregator --bin oscontainer-aggregator -- -C target-feature=+crt-static -C strip=symbols -C link-arg=-Wl,-z,pack-relative-relocs
	mkdir -p $(TARGET)/static
	cp $(TARGET)/release/oscontainer-aggregator $(TARGET)/static/oscontainer-aggregator.new
	mv $(TARGET)/static/oscontainer-aggregator.new $(TARGET)/static/oscontainer-aggregator
	@# What registries' certificates are checked with, for an image that has nothing else.
	for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do \
	  if [ -f $$bundle ]; then cp $$bundle $(TARGET)/static/ca-certificates.crt; break; fi; done

.PHONY: images
images: build ## Build both container images (BASE=IMAGE is the builder's base)
	builder/images.sh $(TARGET) $(VERSION)

.PHONY: manifests
manifests: toolchain ## Write what in manifests/ follows from treefiles/ and other files
	cargo run --release --locked -q -p e2e --bin manifests

.PHONY: demo
demo: build ## From a treefile to a node that pulls, on this machine
	tests/demo.sh $(TARGET) $(VERSION)

.PHONY: lint
lint: toolchain ## Formats, lints
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --locked -- -D warnings

# libFuzzer on a stable toolchain: LLVM's coverage pass is an ordinary code generation
# option. The code has no unsafe block, so no sanitizer is missed.
FUZZ_SECONDS := 60
# A target is named so that build scripts are not instrumented.
FUZZ_TARGET = $(shell rustc -vV | sed -n 's/^host: //p')
FUZZ_FLAGS := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1

.PHONY: fuzz
fuzz: setup-test ## Fuzz the treefile parser for FUZZ_SECONDS (60)
	mkdir -p $(TARGET)/fuzz/corpus $(TARGET)/fuzz/failures
	RUSTFLAGS="$(FUZZ_FLAGS)" CARGO_TARGET_DIR=$(TARGET)/fuzz cargo build --release --target $(FUZZ_TARGET) --manifest-path tests/fuzz/Cargo.toml
	for case in tests/treefiles/*/; do \
	  if [ -f $$case/host.yaml ]; then cp $$case/host.yaml $(TARGET)/fuzz/corpus/$$(basename $$case); fi; done
	$(TARGET)/fuzz/$(FUZZ_TARGET)/release/fuzz -max_total_time=$(FUZZ_SECONDS) -timeout=5 -rss_limit_mb=512 -max_len=20000 \
	  -artifact_prefix=$(TARGET)/fuzz/failures/ $(TARGET)/fuzz/corpus

.PHONY: test
test: setup-test build ## Run all tests
	cargo fmt --all --check
	cargo test --release --workspace --locked --no-fail-fast
	tests/demo.sh $(TARGET) $(VERSION)

.PHONY: test-boot
test-boot: setup-boot build ## Compose, deploy and boot a host in qemu (minutes)
	tests/boot.sh $(TARGET)

.PHONY: test-faults
test-faults: setup-test build ## Kill client and endpoint at 200 random moments
	FAULT_ROUNDS=200 cargo test --release --workspace --locked --test endpoint kills_at_random

.PHONY: bench
bench: build ## Ours and the peers' tools in turn: seconds and ratios
	@$(call packages,$(DEBIAN_BENCH),$(FEDORA_BENCH))
	tests/bench-compose.sh $(TARGET)
	tests/bench-transfer.sh $(TARGET)
	tests/bench-image.sh $(TARGET)
