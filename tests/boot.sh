#!/usr/bin/env bash
# Composes a host with a kernel, deploys it as a node would, and boots it in qemu:
# emulated, for minutes. `make test-boot` builds what it needs.
#
#     tests/boot.sh TARGET_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath "$1")
[ "$(id -u)" = 0 ] || { echo "this test composes and deploys as root: run it with sudo" >&2; exit 2; }
case $(uname -m) in
  x86_64) qemu=(qemu-system-x86_64 -cpu "Nehalem,-cx16") ;;
  *) echo "this test knows x86_64 only" >&2; exit 2 ;;
esac

work=$target/boot
rm -rf "$work"
mkdir -p "$work"
"$target/release/make-rpms" --host --output "$target/fixtures/rpms/host" --cache "$target/fixtures/debs" --treefile treefiles/demo.yaml --work "$work/treefiles"
cp tests/boot/* "$work/treefiles"
echo "composing"
"$target/release/oscontainer-builder" compose --engine dnf --cache-dir "$target/boot-cache" --repo "$work/repo" "$work/treefiles/host.yaml" >"$work/compose.out" 2>"$work/compose.log" || { tail -n 40 "$work/compose.log" >&2; exit 1; }
ref=$(sed -n 's/^ref: //p' "$work/compose.out")

echo "deploying $ref"
sysroot=$work/sysroot
mkdir "$sysroot"
ostree admin init-fs --modern "$sysroot"
ostree admin os-init --sysroot="$sysroot" host
ostree --repo="$sysroot/ostree/repo" pull-local "$work/repo" "$ref" >"$work/pull.out"
ostree admin deploy --sysroot="$sysroot" --os=host --karg=root=LABEL=root --karg=rw --karg=console=ttyS0 --karg=systemd.show_status=1 "$ref" >"$work/deploy.out"
# mkfs copies the tree, but not this flag of the deployment's directory.
chattr -i "$sysroot"/ostree/deploy/host/deploy/*.0
truncate -s 2G "$work/disk.img"
mkfs.ext4 -q -L root -d "$sysroot" "$work/disk.img"

echo "booting"
entry=$sysroot/boot/loader/entries/ostree-1-host.conf
boot() { echo "$sysroot/boot$(sed -n "s/^$1 //p" "$entry")"; }
timeout --foreground 900 "${qemu[@]}" -accel tcg,thread=multi -smp 2 -m 1024 -nographic -no-reboot -net none \
  -kernel "$(boot linux)" -initrd "$(boot initrd)" -append "$(sed -n 's/^options //p' "$entry")" \
  -drive "file=$work/disk.img,if=virtio,format=raw" </dev/null >"$work/console.log" 2>&1 || { tail -n 40 "$work/console.log" >&2; echo "qemu failed or did not end" >&2; exit 1; }

# The service of tests/boot says these lines.
console=$(sed -e 's/\x1b\[[0-9;]*m//g' -e 's/\r//g' "$work/console.log")
expect() { grep -qE "$1" <<<"$console" || { tail -n 60 <<<"$console" >&2; echo "the console does not show: $1" >&2; exit 1; }; }
expect 'boot: running$'
expect 'uid=[0-9]+\(messagebus\)'
expect '^\* host [0-9a-f]{64}\.0|host [0-9a-f]{64}\.0'
expect 'bash-5\.[0-9]'
expect 'ro,|,ro'
expect 'login:'
if grep 'FAILED' <<<"$console"; then echo "a unit failed" >&2; exit 1; fi
echo "booted to a login, no unit failed: $(grep -m 1 '^boot: ' <<<"$console")"
