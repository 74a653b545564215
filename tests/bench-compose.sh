#!/usr/bin/env bash
# Ours and the peers' tools in turn, on the same input and the same machine: prints
# seconds and ratios. `make bench` builds what it needs; nothing here is a test.
#
#     tests/bench-compose.sh TARGET_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath "$1")
[ "$(id -u)" = 0 ] || { echo "the bench composes and checks out as root: run it with sudo" >&2; exit 2; }
bench=$target/bench
builder=$target/release/oscontainer-builder
rm -rf "$bench"
mkdir -p "$bench"

seconds() { # COMMAND...: runs it; its time goes to $took
  local start=$EPOCHREALTIME
  "$@" >"$bench/out" 2>"$bench/log" || { tail -n 20 "$bench/log" >&2; echo "bench: $* failed" >&2; exit 1; }
  took=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.2f", b - a }')
}
stage() { sed -n "s/.* $1: \([0-9.]*\) s\$/\1/p" "$bench/log" | tail -n 1; }
row() { # WHAT OURS PEER PEER_SECONDS
  awk -v w="$1" -v o="$2" -v p="$3" -v s="$4" 'BEGIN { printf "%-36s %8.2f s   %-38s %8.2f s   ratio %.2f\n", w, o, p, s, o / s }'
}

# Some 250 packages, and an update of 18 of them.
for name in large large-update; do
  update=$([ $name = large ] || echo --update)
  "$target/release/make-rpms" --large $update --output "$target/fixtures/rpms/$name" --cache "$target/fixtures/debs" \
    --treefile treefiles/demo.yaml --work "$bench/$name"
  cp tests/boot/* tests/bench/* "$bench/$name"
done
compose() { # REPOSITORY RPMS
  "$builder" compose --engine dnf --version-string 1 --cache-dir "$bench/cache" --repo "$1" "$bench/$2/large.yaml"
}
whole() { # REPOSITORY RPMS: from treefile to tarball
  compose "$1" "$2" && "$builder" pack --repo "$1" --ref "$ref" --output "$bench/artifact"
}
ref=$("$builder" flatten "$bench/large/large.yaml" | jq -r .ref)
mapfile -t packages < <("$builder" flatten "$bench/large/large.yaml" | jq -r '.packages[]')

# The peers' steps, one after the other, as a script would do them.
install_packages() { # RPMS
  local root=$bench/root
  rm -rf "$root" "$bench/home" && mkdir -p "$root/dev" "$root/proc" "$bench/home"
  printf '%%_dbpath /usr/share/rpm\n' >"$bench/home/.rpmmacros"
  # shellcheck disable=SC2016 # the inner shell's
  HOME=$bench/home unshare --mount sh -c 'root=$1; shift
    mount -t tmpfs none "$root/dev" && mknod -m 666 "$root/dev/null" c 1 3 && mount --rbind /proc "$root/proc" && exec "$@"' \
    sh "$root" dnf --assumeyes --nogpgcheck --installroot="$root" --setopt=reposdir=/nonexistent --releasever=1 \
    --setopt=cachedir="$bench/peer-cache" --repofrompath="bench,file://$target/fixtures/rpms/$1" --repo=bench \
    install "${packages[@]}"
}
make_initramfs() {
  local version
  version=$(basename "$bench"/root/usr/lib/modules/*)
  # shellcheck disable=SC2016 # the inner shell's
  unshare --mount sh -c 'root=$1; shift
    mount --rbind /dev "$root/dev" && mount --rbind /proc "$root/proc" && mount -t tmpfs none "$root/tmp" && exec chroot "$root" "$@"' \
    sh "$bench/root" sh -c "depmod -a $version && dracut --no-hostonly --reproducible --force --add ostree --tmpdir /tmp \
      --compress 'gzip -n -6' --kver $version /usr/lib/modules/$version/initramfs.img"
}
commit_tree() { rm -rf "$bench/peer"; ostree init --repo="$bench/peer" --mode=archive && ostree commit --repo="$bench/peer" --branch="$ref" --tree=dir="$1"; }
tar_and_hash() { tar -C "$1" -c . | tee "$bench/tar" | sha256sum; }
peers() { # RPMS: all of them; the sum goes to $all
  seconds install_packages "$1"; all=$took steps="dnf $took"
  seconds make_initramfs; all="$all + $took" steps="$steps, dracut $took"
  # Device nodes are no part of a commit.
  rm -rf "$bench/root/dev" && mkdir "$bench/root/dev"
  seconds commit_tree "$bench/root"; all="$all + $took" steps="$steps, ostree commit $took"
  seconds tar_and_hash "$bench/peer"; all=$(awk "BEGIN { print $all + $took }") steps="$steps, tar and sha256sum $took"
}

sync; peers large; echo "one after the other: $steps"
sync; seconds whole "$bench/repo" large; cold=$took; cp "$bench/log" "$bench/log.cold"
commit=$(ostree rev-parse --repo="$bench/repo" "$ref")
ostree checkout --repo="$bench/repo" "$commit" "$bench/tree"
echo "a tree of $(find "$bench/tree" -type f | wc -l) files, $(du -sm "$bench/tree" | cut -f1) MB, ${#packages[@]} packages named; $(nproc) cores"
grep -E '^  [a-z ]+ [0-9.]+ s$' "$bench/log.cold"
row "from treefile to tarball" "$cold" "dnf, dracut, ostree commit, tar" "$all"
sync; peers large-update
sync; seconds whole "$bench/repo" large-update
row "the same after an update of 18" "$took" "all of it again" "$all"
sync; seconds compose "$bench/repo" large-update
echo "nothing changed: $took s"

sync; seconds commit_tree "$bench/tree"; peer=$took
[ "$(ostree ls --repo="$bench/repo" -C -d "$commit" / | awk '{print $5}')" = "$(ostree ls --repo="$bench/peer" -C -d "$ref" / | awk '{print $5}')" ] ||
  { echo "bench: the trees differ" >&2; exit 1; }
# Without a kernel's initramfs to wait for, all objects are written at once.
sed 's/^ref:.*/&-alone/' "$bench/large/large.yaml" >"$bench/large/alone.yaml"
echo 'no-initramfs: true' >>"$bench/large/alone.yaml"
alone() { # the most memory that the builder itself had, in MiB, goes to $peak
  "$builder" compose --engine dnf --force-nocache --version-string 1 --cache-dir "$bench/cache" --repo "$bench/alone" "$bench/large/alone.yaml" &
  local pid=$! kib
  while kib=$(awk '/^VmHWM/ { print $2 }' "/proc/$pid/status" 2>/dev/null) && [ -n "$kib" ]; do peak=$((kib / 1024)); sleep 0.05; done
  wait "$pid"
}
sync; seconds alone
row "commit into an empty archive" "$(stage committing)" "ostree commit" "$peer"
echo "memory of the builder: $peak MiB"
sync; seconds alone
row "the same again" "$(stage committing)" "ostree commit, the first time" "$peer"
awk -v o="$(ostree ls -R --repo="$bench/repo" -C "$commit" | wc -l)" 'BEGIN { printf "%d paths\n", o }'
row "pack" "$(sync; seconds "$builder" pack --repo "$bench/repo" --ref "$ref" --output "$bench/artifact"; echo "$took")" \
  "tar, tee and sha256sum" "$(sync; seconds tar_and_hash "$bench/peer"; echo "$took")"
