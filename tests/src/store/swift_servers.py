"""Runs Debian's Swift, one of each server: swift_servers.py DIR PROXY_PORT TOKEN_LIFE [KEYSTONE_PORT].

Tokens come from TempAuth, or from Debian's Keystone, which then runs too; DIR/credential.json is an
application credential of its user admin. Everything is below DIR, which must be on a file system with extended attributes. It ends with
its standard input, and removes DIR.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

from swift.common import utils
from swift.common.ring import RingBuilder
from swift.common.wsgi import run_wsgi

where, proxy_port, token_life, *keystone_port = sys.argv[1:]
utils.SWIFT_CONF_FILE = os.path.join(where, "swift.conf")


def write(name, text):
    with open(os.path.join(where, name), "w") as file:
        file.write(text)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


os.makedirs(os.path.join(where, "srv", "disk"), exist_ok=True)
write("swift.conf", "[swift-hash]\nswift_hash_path_suffix = test\n[storage-policy:0]\nname = only\ndefault = yes\n")
common = f"bind_ip = 127.0.0.1\nuser = {os.environ.get('USER') or 'root'}\nworkers = 0\nswift_dir = {where}\nlog_level = WARNING\n"
memcached = free_port()
servers = [("proxy", int(proxy_port))]
for kind in ("account", "container", "object"):
    port = free_port()
    servers.append((kind, port))
    # One copy, 16 partitions.
    builder = RingBuilder(4, 1, 1)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "disk", "weight": 1})
    builder.rebalance(seed=1)
    builder.get_ring().save(os.path.join(where, f"{kind}.ring.gz"))
    write(f"{kind}-server.conf", f"""
[DEFAULT]
{common}bind_port = {port}
devices = {where}/srv
mount_check = false
fallocate_reserve = 0
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
""")
auth = "authtoken keystoneauth" if keystone_port else "tempauth"
keystone = f"http://127.0.0.1:{keystone_port[0]}" if keystone_port else ""
write("proxy-server.conf", f"""
[DEFAULT]
{common}bind_port = {proxy_port}
[pipeline:main]
pipeline = catch_errors cache bulk {auth} slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:tempauth]
use = egg:swift#tempauth
token_life = {token_life}
user_test_tester = testing .admin
[filter:authtoken]
paste.filter_factory = keystonemiddleware.auth_token:filter_factory
www_authenticate_uri = {keystone}
auth_url = {keystone}
auth_type = password
username = admin
password = secret
project_name = admin
user_domain_id = default
project_domain_id = default
interface = public
delay_auth_decision = true
cache = swift.cache
[filter:keystoneauth]
use = egg:swift#keystoneauth
operator_roles = admin
""")

children = []
cache = subprocess.Popen(["memcached", "-l", "127.0.0.1", "-p", str(memcached), "-u", os.environ.get("USER") or "root"])
children.append(cache.pid)
for kind, _ in servers:
    pid = os.fork()
    if pid == 0:
        sys.stdin = open(os.devnull)
        os.dup2(sys.stdin.fileno(), 0)
        sys.exit(run_wsgi(os.path.join(where, f"{kind}-server.conf"), f"{kind}-server", **{"log_level": "WARNING"}))
    children.append(pid)


def ask(token, path, body):
    """Keystone's answer to a POST, tried until Keystone is there."""
    request = urllib.request.Request(keystone + "/v3/" + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if token:
        request.add_header("X-Auth-Token", token)
    for _ in range(200):
        try:
            with urllib.request.urlopen(request) as reply:
                return reply.headers.get("X-Subject-Token"), json.load(reply)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.3)


if keystone_port:
    config = os.path.join(where, "keystone.conf")
    write("keystone.conf", f"""
[DEFAULT]
log_file = {where}/keystone.log
[database]
connection = sqlite:///{where}/keystone.db
[token]
expiration = {token_life}
[fernet_tokens]
key_repository = {where}/fernet
[credential]
key_repository = {where}/keys
""")
    user = os.environ.get("USER") or "root"
    for step in (
        ["db_sync"],
        ["fernet_setup", "--keystone-user", user, "--keystone-group", user],
        ["bootstrap", "--bootstrap-password", "secret", "--bootstrap-public-url", keystone + "/v3", "--bootstrap-region-id", "test"],
    ):
        subprocess.run(["keystone-manage", "--config-file", config, *step], check=True)
    server = subprocess.Popen(
        ["keystone-wsgi-public", "--host", "127.0.0.1", "--port", keystone_port[0]],
        env={**os.environ, "OS_KEYSTONE_CONFIG_FILES": config},
    )
    children.append(server.pid)
    domain = {"id": "default"}
    password = {"user": {"name": "admin", "domain": domain, "password": "secret"}}
    login = {"identity": {"methods": ["password"], "password": password}, "scope": {"project": {"name": "admin", "domain": domain}}}
    token, answer = ask(None, "auth/tokens", {"auth": login})
    _, service = ask(token, "services", {"service": {"name": "swift", "type": "object-store"}})
    url = f"http://127.0.0.1:{proxy_port}/v1/AUTH_%(project_id)s"
    place = {"interface": "public", "region_id": "test", "url": url, "service_id": service["service"]["id"]}
    ask(token, "endpoints", {"endpoint": place})
    wanted = {"application_credential": {"name": "endpoint", "secret": "application-secret"}}
    _, credential = ask(token, f"users/{answer['token']['user']['id']}/application_credentials", wanted)
    write("credential.json", json.dumps(credential["application_credential"]))
sys.stdin.read()
for pid in children:
    os.kill(pid, 9)
shutil.rmtree(where, ignore_errors=True)
