#!/bin/bash
# What layers as a log promise, and the server beside nginx, measured: on a host of some 250
# packages and an update of 18 of them. Prints figures, and ends with 1 if a promise about the
# image does not hold. `make bench` builds what it needs; nothing here is a test.
#
#     tests/bench-image.sh TARGET_DIR [ROUNDS]
#
# Other work on the machine counts more against short runs than against long ones: figures are the
# best of ROUNDS (5), in turn, and processor time is printed beside.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath "$1")
rounds=${2:-5}
[ "$(id -u)" = 0 ] || { echo "the bench composes as root: run it with sudo" >&2; exit 2; }
aggregator=$target/static/oscontainer-aggregator
bench=$target/bench-image
rm -rf "$bench"
mkdir -p "$bench"
# Tar and sha256 write nothing to a disk; so that disks are not compared, nor does the assembly into oci:.
memory=$(mktemp -d -p /dev/shm)
pids=()
cleanup() {
  [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || echo "a server had ended already" >&2
  wait
  rm -rf "$memory" "$bench"
}
trap cleanup EXIT
export no_proxy='*'

# The two commits, each in a repository of its own, as fetch leaves it. One version for both: it lies in
# os-release, which is in the initramfs too, and that is as large as all the rest of the update.
for name in old new; do
  [ $name = old ] && set -- large || set -- large-update --update
  "$target/release/make-rpms" --large "${@:2}" --output "$target/fixtures/rpms/$1" --cache "$target/fixtures/debs" \
    --treefile treefiles/demo.yaml --work "$bench/$name.treefiles"
  cp tests/boot/* tests/bench/* "$bench/$name.treefiles"
  "$target/release/oscontainer-builder" compose --engine dnf --version-string 1 --cache-dir "$bench/cache" \
    --repo "$bench/repo" "$bench/$name.treefiles/large.yaml" >"$bench/log" 2>&1 ||
    { tail -n 20 "$bench/log" >&2; echo "bench: composing failed" >&2; exit 1; }
  ref=$(sed -n 's/^ref: //p' "$bench/log")
  commit=$(sed -n 's/^commit: //p' "$bench/log")
  ostree --repo="$bench/$name" init --mode=archive
  ostree --repo="$bench/$name" pull-local --disable-fsync "$bench/repo" "$commit" >/dev/null
  ostree --repo="$bench/$name" refs --create="$ref" "$commit"
done

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
port=$(free_port)
cat >"$bench/registry.yml" <<END
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $bench/registry}}
http: {addr: "127.0.0.1:$port"}
END
docker-registry serve "$bench/registry.yml" >"$bench/registry.log" 2>&1 &
pids+=($!)
curl -sf --retry 50 --retry-delay 1 --retry-connrefused "http://127.0.0.1:$port/v2/" >/dev/null

image() { "$aggregator" -q --output-format json image --tls-verify=false "$@"; }
remote="docker://127.0.0.1:$port/host"
tarred() { tar -C "$bench/new" -c . | openssl dgst -sha256 >/dev/null; }
assembled() { rm -rf "$memory/out"; image --repo "$bench/new" --output "oci:$memory/out" >/dev/null; }
pushes=0
pushed() { image --repo "$bench/new" --output "$remote-$((++pushes)):new" >/dev/null; }
# Each update uploads: into a repository that has the image before, and nothing of the next.
updated() {
  image --repo "$bench/new" --previous "$remote-old-$1:old" --output "$remote-old-$1:new" >"$bench/update.json"
}
# What of an update is the registry's: its requests alone, on one connection, with as many bytes.
requests() { # ROUND BYTES: seconds
  python3 - "127.0.0.1:$port" "host-old-$1" "$2" <<'END'
import hashlib, http.client, json, os, sys, time
address, name, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
layer = os.urandom(size)
digest = "sha256:" + hashlib.sha256(layer).hexdigest()
manifest_type = "application/vnd.oci.image.manifest.v1+json"
connection = http.client.HTTPConnection(address)
def ask(method, path, expected, body=None, headers={}):
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status in expected, (method, path, answer.status, content)
    return answer, content
begun = time.monotonic()
manifest = json.loads(ask("GET", f"/v2/{name}/manifests/old", [200], None, {"Accept": manifest_type})[1])
ask("GET", f"/v2/{name}/blobs/{manifest['config']['digest']}", [200])
for part in manifest["layers"]:
    ask("GET", f"/v2/{name}/blobs/{part['digest']}", [206], None, {"Range": "bytes=0-65535"})
place = ask("POST", f"/v2/{name}/blobs/uploads/", [202])[0].getheader("Location").split(address, 1)[1]
ask("PUT", f"{place}&digest={digest}", [201], layer, {"Content-Type": "application/octet-stream"})
manifest["layers"].append({"mediaType": manifest["layers"][0]["mediaType"], "digest": digest, "size": size})
ask("PUT", f"/v2/{name}/manifests/alone", [201], json.dumps(manifest), {"Content-Type": manifest_type})
print(time.monotonic() - begun)
END
}
TIMEFORMAT='%R %U %S'
timed() { # NAME COMMAND…: its seconds and its processor seconds go to a line of NAME
  { time "${@:2}" 2>&3; } 3>&2 2>"$bench/time"
  awk '{ print $1, $2 + $3 }' "$bench/time" >>"$bench/$1"
}
best() { sort -n "$bench/$1" | head -n 1 | cut -d' ' -f1; }
work() { awk '{ print $2 }' "$bench/$1" | sort -n | head -n 1; }

for round in $(seq "$rounds"); do
  image --repo "$bench/old" --output "$remote-old-$round:old" >/dev/null
done
tarred
for round in $(seq "$rounds"); do
  timed tar tarred
  timed first assembled
  timed push pushed
  timed update updated "$round"
  requests "$round" "$(jq .newBytes "$bench/update.json")" >>"$bench/requests"
done

# The bytes of the objects that only the new commit has.
(cd "$bench/old" && find objects -type f | sort) >"$bench/old.list"
(cd "$bench/new" && find objects -type f | sort) >"$bench/new.list"
comm -13 "$bench/old.list" "$bench/new.list" >"$bench/new.objects"
objects=$(cd "$bench/new" && xargs stat -c %s <"$bench/new.objects" | jq -s add)
bytes=$(jq .newBytes "$bench/update.json")

check() { # check WHAT VALUE RELATION BOUND
  local verdict=held
  [ "$(jq -n "$2 $3 $4")" = true ] || { verdict=BROKEN; broken=1; }
  printf '%-52s %8.3f  (%s %s: %s)\n' "$1" "$2" "$3" "$4" "$verdict"
}
broken=0
printf '%-52s %8d of %d bytes\n' "new objects" "$(wc -l <"$bench/new.objects")" "$objects"
printf '%-52s %8d\n' "objects" "$(wc -l <"$bench/new.list")"
row() { printf '%-52s %8.3f s, %.3f s of processor time\n' "$1" "$(best "$2")" "$(work "$2")"; }
row "tar c | openssl dgst -sha256" tar
row "first assembly into oci: in memory" first
row "first assembly into a registry" push
row "update in a registry" update
printf '%-52s %8.3f s\n' "the registry's part of it, on one connection" "$(sort -n "$bench/requests" | head -n 1)"
check "bytes of the new layer / of the new objects" "$(jq -n "$bytes / $objects")" "<=" 1.03
check "first assembly / tar and sha256" "$(jq -n "$(best first) / $(best tar)")" "<=" 2
check "first assembly / update, in a registry" "$(jq -n "$(best push) / $(best update)")" ">=" 20

# The server and nginx on the same repository.
nginx_port=$(free_port)
cat >"$bench/nginx.conf" <<END
daemon off; worker_processes auto; pid $bench/nginx.pid; error_log $bench/nginx.log; user root;
events { worker_connections 4096; }
http {
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000;
  server { listen 127.0.0.1:$nginx_port; root $bench/new; }
}
END

nginx -c "$bench/nginx.conf" &
pids+=($!)
our_port=$(free_port)
"$aggregator" -q serve --repo "$bench/new" --listen "127.0.0.1:$our_port" &
pids+=($!)
for p in "$nginx_port" "$our_port"; do
  for _ in $(seq 100); do (: >"/dev/tcp/127.0.0.1/$p") 2>/dev/null && break || sleep 0.1; done
done
(cd "$bench/new" && find objects -name '*.filez' -size -16k | sort | awk 'NR <= 4000 { print "/" $0 }') >"$bench/small"
(cd "$bench/new" && find objects -name '*.filez' -printf '%s /%p\n' | sort -n | tail -n 1 | cut -d' ' -f2) >"$bench/large"
cat >"$bench/wrk.lua" <<'END'
local paths, at = {}, 0
for line in io.lines(os.getenv("PATHS")) do paths[#paths + 1] = line end
request = function()
  at = at % #paths + 1
  return wrk.format("GET", paths[at])
end
done = function(summary)
  io.stderr:write(string.format("%f %f\n", summary.requests * 1e6 / summary.duration, summary.bytes * 1e6 / summary.duration))
end
END
load() { # PATHS PORT CONNECTIONS: requests and bytes in a second
  PATHS=$bench/$1 wrk -t1 "-c$3" -d3s -s "$bench/wrk.lua" "http://127.0.0.1:$2" 2>&1 >/dev/null | tail -n 1
}
for _ in $(seq "$rounds"); do
  for kind in small large; do
    load $kind "$nginx_port" 32 >>"$bench/$kind.nginx"
    load $kind "$our_port" 32 >>"$bench/$kind.ours"
  done
done
most() { sort -n -r -k"$2" "$bench/$1" | head -n 1 | cut -d' ' -f"$2"; }
check "requests of small objects per second / nginx's" "$(jq -n "$(most small.ours 1) / $(most small.nginx 1)")" ">=" 0.9
check "bytes of a large one per second / nginx's" "$(jq -n "$(most large.ours 2) / $(most large.nginx 2)")" ">=" 0.7
# Memory: the most of a server of its own, with 2,000 connections.
for kind in small large; do
  crowd_port=$(free_port)
  "$aggregator" -q serve --repo "$bench/new" --listen "127.0.0.1:$crowd_port" &
  crowd=$!
  pids+=($crowd)
  for _ in $(seq 100); do (: >"/dev/tcp/127.0.0.1/$crowd_port") 2>/dev/null && break || sleep 0.1; done
  load $kind "$crowd_port" 2000 >"$bench/crowd"
  check "MiB of memory with 2,000 connections, $kind objects" "$(awk '/^VmHWM/ { print $2 / 1024 }' "/proc/$crowd/status")" "<" 40
done

# From the program's start to its first answer.
start() {
  python3 - "$aggregator" "$bench/new" <<'END'
import socket, subprocess, sys, time
def once():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    begun = time.monotonic()
    server = subprocess.Popen([sys.argv[1], "-q", "serve", "--repo", sys.argv[2], "--listen", f"127.0.0.1:{port}"])
    try:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as client:
                    client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                    assert client.recv(100).startswith(b"HTTP/1.0 200")
                    return time.monotonic() - begun
            except ConnectionRefusedError:
                pass
    finally:
        server.kill()
        server.wait()
print(min(once() for _ in range(10)) * 1000)
END
}
check "milliseconds to the server's first answer" "$(start)" "<" 50
check "MB of the server" "$(stat -c %s "$aggregator" | awk '{ print $1 / 1e6 }')" "<" 12
exit "$broken"
