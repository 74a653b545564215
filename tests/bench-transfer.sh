#!/usr/bin/env bash
# 1 GB over loopback, there and back: the endpoint beside nginx, with the same file and in
# one run, for the figures of a machine mean little by themselves.
#
#     tests/bench-transfer.sh TARGET_DIR [ROUNDS]
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath "$1")
rounds=${2:-5}
builder=$target/release/oscontainer-builder
work=$(mktemp -d "$target/bench-XXXXXX")
pids=()
cleanup() {
  exec 9>&- # Swift ends with its standard input.
  [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || echo "a server had ended already" >&2
  wait
  rm -rf "$work"
}
trap cleanup EXIT
export no_proxy='*'

seconds() { # COMMAND...: how long it takes
  local start=$EPOCHREALTIME
  "$@" >"$work/out" 2>&1 || { cat "$work/out" >&2; echo "bench: $* failed" >&2; exit 1; }
  awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.3f\n", b - a }'
}
median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

mkdir -p "$work"/{store,dav,body}
head -c 1000000000 /dev/urandom >"$work/dav/file"
printf 'bench-token\n' >"$work/token"
nginx_port=$(free_port) port=$(free_port)
cat >"$work/nginx.conf" <<END
daemon off; worker_processes auto; pid $work/nginx.pid; error_log $work/nginx.log;
events { worker_connections 256; }
http {
  access_log off; sendfile on; client_max_body_size 0; client_body_temp_path $work/body;
  server { listen 127.0.0.1:$nginx_port; root $work/dav; location / { dav_methods PUT; } }
}
END
[ "$(id -u)" != 0 ] || sed -i '1i user root;' "$work/nginx.conf"
nginx -c "$work/nginx.conf" &
pids+=($!)
"$builder" endpoint -q --store "$work/store" --token-file "$work/token" --listen "127.0.0.1:$port" &
pids+=($!)
for p in "$nginx_port" "$port"; do
  for _ in $(seq 100); do (: >"/dev/tcp/127.0.0.1/$p") 2>/dev/null && break || sleep 0.1; done
done
nginx=http://127.0.0.1:$nginx_port ours=http://127.0.0.1:$port/v1/artifacts/bench

put_nginx() { curl -sSf -T "$work/dav/file" "$nginx/put" && sync; }
put_ours() { curl -sSf -H 'Authorization: Bearer bench-token' -T "$work/dav/file" "$ours/$1/repo.tar"; }
drop() { rm -f "$work/dav/put"; curl -sS -X DELETE -H 'Authorization: Bearer bench-token' "$ours/$1"; sync; }

for round in $(seq "$rounds"); do
  seconds openssl dgst -sha256 "$work/dav/file" >>"$work/digest"
  sync
  seconds put_nginx >>"$work/put-nginx"
  seconds put_ours "$round" >>"$work/put-ours"
  # A tarball is read once its manifest is there; only the digests matter to the endpoint.
  if [ "$round" = 1 ]; then
    digest=$(openssl dgst -sha256 -r "$work/dav/file" | cut -d' ' -f1)
    printf '{"schemaVersion":1,"mediaType":"application/vnd.oscontainer.artifact.v1+json","name":"bench",
      "version":"1","architecture":"amd64","ref":"bench","commit":"%064d","tarball":{"path":"repo.tar",
      "mediaType":"application/vnd.oscontainer.repo.v1.tar","size":1000000000,"digest":"sha256:%s"}}' 0 "$digest" |
      curl -sSf -H 'Authorization: Bearer bench-token' -T - "$ours/1/manifest.json" >"$work/out"
  fi
  seconds curl -sSf -o /dev/null "$nginx/file" >>"$work/get-nginx"
  seconds curl -sSf -o /dev/null "$ours/1/repo.tar" >>"$work/get-ours"
  [ "$round" = 1 ] || drop "$round" >"$work/out"
done

# Several gigabytes in Swift, from Debian on this machine too: once through the endpoint, and once by
# Swift's own client, which takes its object in segments of the same size.
size=3000000000
mkfifo "$work/hold"
exec 9<>"$work/hold"
proxy_port=$(free_port) swift_port=$(free_port)
/usr/bin/python3 -B tests/src/store/swift_servers.py "$work/swift" "$proxy_port" 3600 <"$work/hold" >"$work/swift.log" 2>&1 9>&- &
export ST_AUTH=http://127.0.0.1:$proxy_port/auth/v1.0 ST_USER=test:tester ST_KEY=testing
for _ in $(seq 100); do swift --retries 0 post bench >"$work/out" 2>&1 && break || sleep 0.5; done
"$builder" endpoint -q --store swift://bench --token-file "$work/token" --listen "127.0.0.1:$swift_port" 9>&- &
pids+=($!)
for _ in $(seq 100); do (: >"/dev/tcp/127.0.0.1/$swift_port") 2>/dev/null && break || sleep 0.1; done
cat "$work"/dav/file "$work"/dav/file "$work"/dav/file >"$work/large"
in_swift=http://127.0.0.1:$swift_port/v1/artifacts/bench/1
put_swift() { curl -sSf -H 'Authorization: Bearer bench-token' -T "$work/large" "$in_swift/repo.tar"; }
put_peer() { swift upload -S 16777216 --use-slo --segment-threads 3 --object-name peer bench "$work/large"; }
get_peer() { swift download -o /dev/null bench peer; }
seconds put_swift >"$work/put-swift"
seconds put_peer >"$work/put-swift-peer"
digest=$(openssl dgst -sha256 -r "$work/large" | cut -d' ' -f1)
printf '{"schemaVersion":1,"mediaType":"application/vnd.oscontainer.artifact.v1+json","name":"bench",
  "version":"1","architecture":"amd64","ref":"bench","commit":"%064d","tarball":{"path":"repo.tar",
  "mediaType":"application/vnd.oscontainer.repo.v1.tar","size":%d,"digest":"sha256:%s"}}' 0 "$size" "$digest" |
  curl -sSf -H 'Authorization: Bearer bench-token' -T - "$in_swift/manifest.json" >"$work/out"
seconds curl -sSf -o /dev/null "$in_swift/repo.tar" >"$work/get-swift"
seconds get_peer >"$work/get-swift-peer"
printf '3 GB in Swift: PUT %.1f s, swift upload %.1f s; GET %.1f s, swift download %.1f s\n' \
  "$(cat "$work/put-swift")" "$(cat "$work/put-swift-peer")" "$(cat "$work/get-swift")" "$(cat "$work/get-swift-peer")"

for name in digest put-nginx put-ours get-nginx get-ours; do
  median <"$work/$name" >"$work/$name.median"
  printf '%-10s %6.2f s\n' "$name" "$(cat "$work/$name.median")"
done
awk -v d="$(cat "$work/digest.median")" -v pn="$(cat "$work/put-nginx.median")" -v po="$(cat "$work/put-ours.median")" \
  -v gn="$(cat "$work/get-nginx.median")" -v go="$(cat "$work/get-ours.median")" 'BEGIN {
    printf "GET: %.2f of nginx'"'"'s speed (wanted: at least 0.80)\n", gn / go
    printf "PUT: %.2f times the slower of openssl dgst and dav with sync (wanted: at most 1.25)\n", po / (d > pn ? d : pn)
  }'
