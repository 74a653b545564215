#!/bin/bash
# A small Ceph with a RADOS gateway: ceph.sh DIR S3_PORT. One monitor, one OSD whose objects are in
# memory. It ends with its standard input, and removes DIR.
set -eu
dir=$1 port=$2
monitor=$(/usr/bin/python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fsid=$(cat /proc/sys/kernel/random/uuid) osd=$(cat /proc/sys/kernel/random/uuid)
mkdir -p "$dir"/{mon,osd,rgw}
cat > "$dir/ceph.conf" <<END
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:$monitor]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = $dir/keyring
run_dir = $dir
log_file = $dir/\$name.log
admin_socket =
pid_file =
mon_data = $dir/mon
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 0
osd_data = $dir/osd
osd_objectstore = memstore
memstore_device_bytes = 8G
osd_pool_default_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
rgw_data = $dir/rgw
rgw_frontends = beast endpoint=127.0.0.1:$port
rgw_thread_pool_size = 64
END
export CEPH_ARGS="--conf $dir/ceph.conf"
ceph-authtool -C "$dir/keyring" --gen-key -n mon. --cap mon 'allow *' > /dev/null
ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' > /dev/null
monmaptool --create --addv a "[v2:127.0.0.1:$monitor]" --fsid "$fsid" "$dir/monmap" > /dev/null
ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
ceph-mon -f -i a < /dev/null & children=$!
trap 'kill -9 $children; rm -rf "$dir"' EXIT
ceph osd new "$osd" > /dev/null
ceph auth get-or-create osd.0 mon 'allow profile osd' osd 'allow *' >> "$dir/keyring"
ceph-osd -i 0 --mkfs --osd-uuid "$osd"
ceph-osd -f -i 0 < /dev/null & children="$children $!"
radosgw-admin user create --uid test --display-name test --access-key "$S3_KEY" --secret-key "$S3_SECRET" > /dev/null
radosgw -f -n client.admin < /dev/null & children="$children $!"
cat > /dev/null
