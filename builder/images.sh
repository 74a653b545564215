#!/usr/bin/env bash
# Builds both container images, names them for `podman kube play` and the manifests,
# and writes them as archives for `kind load`, `k3s ctr images import` and skopeo.
# `make images` runs it when the programs are built.
#
#     [BASE=IMAGE] [IMAGES=DIR] builder/images.sh TARGET_DIR VERSION
set -euo pipefail
target=$(realpath "$1")
version=$2
cd "$(dirname "$0")/.."

images=$(realpath -m "${IMAGES:-$target/images}")
rm -rf "$images"
mkdir -p "$images/context"
cp "$target/release/oscontainer-builder" "$target/static/oscontainer-aggregator" \
  "$target/static/ca-certificates.crt" "$images/context"

build() { # NAME CONTAINERFILE OPTIONS...
  local image=localhost/oscontainer-$1:$version archive=$images/oscontainer-$1.oci.tar containerfile=$2
  shift 2
  buildah build "$@" --file "$containerfile" --tag "$image" "$images/context"
  buildah push "$image" "oci-archive:$archive:$image"
}
build builder builder/Containerfile ${BASE:+--build-arg "BASE=$BASE"}
build aggregator aggregator/Containerfile.base
rm -r "$images/context"
ls -1 "$images"
