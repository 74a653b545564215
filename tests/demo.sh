#!/usr/bin/env bash
# The main job on one machine: treefile -> compose -> pack -> publish -> fetch ->
# image -> serve -> a real ostree client that pulls. `make demo` builds what it needs.
#
#     tests/demo.sh TARGET_DIR VERSION
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath "$1")
version=$2
[ "$(id -u)" = 0 ] || { echo "the demo composes as root for now: run it with sudo" >&2; exit 2; }

demo=$target/demo
builder=$target/release/oscontainer-builder
aggregator=$target/static/oscontainer-aggregator
rm -rf "$demo"/{repo,artifact,store,fetched,image,node,checkout}
mkdir -p "$demo"
pids=()
cleanup() { [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || echo "a server had ended already" >&2; }
trap cleanup EXIT
export OSCONTAINER_CACHE_DIR=$demo/cache

step() { # NAME COMMAND...: runs it quietly, and says how long it took
  local name=$1 start=$EPOCHREALTIME
  shift
  "$@" >"$demo/$name.out" 2>"$demo/$name.log" || { tail -n 40 "$demo/$name.log" >&2; echo "demo: $name failed" >&2; exit 1; }
  awk -v n="$name" -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "  %-10s %6.1f s\n", n, b - a }'
}
serve() { # NAME COMMAND...: starts a server on a free port; its URL goes to $url
  local name=$1
  shift
  "$@" --listen 127.0.0.1:0 2>"$demo/$name.log" &
  pids+=($!)
  for _ in $(seq 200); do
    url=$(sed -n 's/.*listening on \(http:[^ ]*\).*/\1/p' "$demo/$name.log")
    [ -z "$url" ] || return 0
    sleep 0.05
  done
  cat "$demo/$name.log" >&2
  echo "demo: $name did not start" >&2
  exit 1
}
field() { sed -n "s/^$2: //p" "$demo/$1.out"; }

echo "oscontainer $version: from a treefile to a node that pulls"
step rpms "$target/release/make-rpms" --output "$target/fixtures/rpms/demo" --cache "$target/fixtures/debs" --treefile treefiles/demo.yaml --work "$demo/treefiles"
step compose "$builder" compose --engine dnf --repo "$demo/repo" "$demo/treefiles/demo.yaml"
ref=$(field compose ref)
commit=$(field compose commit)
step pack "$builder" pack --repo "$demo/repo" --ref "$ref" --output "$demo/artifact"

head -c 24 /dev/urandom | base64 >"$demo/token"
serve endpoint "$builder" endpoint --store "$demo/store" --token-file "$demo/token"
step publish "$builder" publish "$demo/artifact" --endpoint "$url" --token-file "$demo/token"
step fetch "$aggregator" fetch "$(field publish manifestUrl)" --digest "$(field publish manifestDigest)" --output "$demo/fetched"
step image "$aggregator" image --repo "$demo/fetched" --ref "$ref" --server "$aggregator" --output "oci:$demo/image:$version"

# What `podman run` of the image would start, here straight from the repository.
serve serve "$aggregator" serve --repo "$demo/fetched"
node() { ostree --repo="$demo/node" "$@"; }
step init node init --mode=bare
node remote add --no-gpg-verify host "$url"
step pull node pull host "$ref@$commit"
step checkout node checkout "$commit" "$demo/checkout"
hello=$(chroot "$demo/checkout" /usr/bin/bash -c '. /usr/lib/os-release; echo "$PRETTY_NAME on $(uname -m), $(ls /usr/bin | wc -l) programs"')

echo "  commit     $commit"
echo "  ref        $ref"
echo "  artifact   $(field publish manifestDigest)"
echo "  image      $(field image digest)"
echo "  in the checkout, by chroot: $hello"
echo "Next: ostree --repo=$demo/fetched log $ref"
echo "      skopeo inspect oci:$demo/image:$version"
echo "      skopeo copy oci:$demo/image:$version docker://REGISTRY/NAME:$version"
