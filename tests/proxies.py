#!/usr/bin/env python3
"""Checks dkc behind real proxies: tests/proxies.py [CASE …]

nginx, Varnish and HAProxy, as Debian ships them (scripts/setup unpacks them), run before a gateway of `dkc dev` ($DKC),
with usual configurations and those of docs/http.md and docs/operations.md. Each case is a generator that yields a text
for each failure.
"""

import asyncio
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cases
from cases import Broken, free_port
from one_gateway import DKC, one_gateway, post, statuses

CACHE = Path(os.environ["DKC_CACHE"]) / "proxies"
LIBRARIES = CACHE / "usr/lib" / f"{os.uname().machine}-linux-gnu"
ENVIRONMENT = os.environ | {"LD_LIBRARY_PATH": f"{LIBRARIES}:{LIBRARIES}/varnish"}
# No step takes this long unless it fails.
PATIENCE = 30


def binary(name):
    unpacked = CACHE / "usr/sbin" / name
    return str(unpacked) if unpacked.exists() else shutil.which(name, path="/usr/sbin")


def ask(port, path, method="GET", body=None, headers={}):
    """(status, text, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def until(what, check):
    return cases.until(what, check, PATIENCE)


@contextlib.contextmanager
def started(*command):
    """Runs a proxy in the foreground, in a session of its own, all processes of which are ended."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            list(map(str, command)), env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            yield process
        except Broken as broken:
            said.seek(0)
            raise Broken(f"{broken}; {command[0]} ({process.poll()}) printed {said.read().decode()[-1000:]}") from broken
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(PATIENCE)


@contextlib.contextmanager
def nginx(location, upstream="", server=""):
    """Runs nginx with its defaults except for this location, and returns its port."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dkc-nginx-") as folder:
        config = Path(folder) / "nginx.conf"
        temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"])
        config.write_text(
            f"daemon off; pid {folder}/pid; error_log {folder}/error.log; user root;\n"
            f"events {{}}\nhttp {{ access_log off; {temporary}\n{upstream}\n"
            f"server {{ listen 127.0.0.1:{port}; {server}\n{location} }} }}\n"
        )
        with started(binary("nginx"), "-p", folder, "-c", config, "-e", f"{folder}/error.log"):
            until("nginx listens", lambda: socket.create_connection(("127.0.0.1", port)).close() or True)
            yield port


def run(*arguments, stdin=""):
    """(code, output and errors) of a dkc command."""
    said = subprocess.run([DKC, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=4 * PATIENCE)
    return said.returncode, said.stdout + said.stderr


# ---- nginx -------------------------------------------------------------------------------------------------------


def nginx_takes_small_bodies_only(gateway):
    """nginx limits bodies to 1 MB by default: batches are halved, and everything is counted once."""
    lines = "".join(f"https://shop.example/{'p' * 300}{number}\n" for number in range(20_000))
    with nginx(f"location / {{ proxy_pass http://127.0.0.1:{gateway.port}; }}") as port:
        began = time.monotonic()
        code, said = run("count", "px-large", "-", "--url", f"http://127.0.0.1:{port}", "--batch", 20_000, stdin=lines)
        took = time.monotonic() - began
        if code != 0 or "counted 20,000 of 20,000 lines" not in said or took > 10:
            yield f"dkc count: {code} after {took:.1f} s: {said}"
        keys = {"keys": [f"https://shop.example/{'p' * 300}{number}" for number in (0, 9_999, 19_999)]}
        values = json.loads(ask(port, "/v1/counters/px-large/get", "POST", json.dumps(keys))[1])["counters"]
        if [each["value"] for each in values] != [1, 1, 1]:
            yield f"values: {values}"


def nginx_passes_paths_on(gateway):
    """With `proxy_pass` without a path, as in docs/http.md, keys of every kind arrive unchanged."""
    with nginx(f"location / {{ proxy_pass http://127.0.0.1:{gateway.port}; }}") as port:
        for path, counter in [
            ("px-path/..%2Fbank%2Fbalance", "../bank/balance"), ("px-path/%40scope%2Fname", "@scope/name"), ("px-path/x%2F%2F..%2Fy", "x//../y"),
            ("px-path/caf%C3%A9%20au%20lait", "café au lait"), ("px-path/100%25", "100%"), ("px-path/a%3Fb%23c", "a?b#c"),
        ]:
            status, text, _ = ask(port, f"/v1/counters/{path}/increment", "POST")
            if status != 200 or json.loads(text)["key"] != counter or json.loads(text)["namespace"] != "px-path":
                yield f"{path}: {status} {text}"
            if (value := json.loads(ask(port, f"/v1/counters/{path}")[1])["value"]) != 1:
                yield f"{path}: {value}"


def nginx_answers_for_a_gateway(gateway):
    """nginx responds itself: a 502 is retried, a redirect is final; nothing is counted twice or taken for a response of dkc."""
    with nginx(f"location / {{ proxy_pass http://127.0.0.1:{free_port()}; }}") as port:
        code, said = run("count", "px-gone", "-", "--url", f"http://127.0.0.1:{port}", "--give-up", 2, stdin="x\n")
        if code != 3 or "502" not in said:
            yield f"behind a 502: {code}: {said}"
    with nginx("location / { return 301 https://$host$request_uri; }") as port:
        began = time.monotonic()
        code, said = run("count", "px-gone", "-", "--url", f"http://127.0.0.1:{port}", stdin="x\n")
        if code != 1 or "301" not in said or time.monotonic() - began > 3:
            yield f"behind a redirect: {code} after {time.monotonic() - began:.1f} s: {said}"
    if (value := ask(gateway.port, "/v1/counters/px-gone/x", headers={"Accept": "text/plain"})[1].strip()) != "0":
        yield f"{value} were counted"


def nginx_gives_connections_up_first(_):
    """With an idle timeout below the gateway's, as in docs/operations.md, no request uses a connection that closes."""
    with one_gateway("proxies", env=os.environ | {"DKC_IDLE_TIMEOUT": "3"}) as gateway:
        yield from idle_connections(gateway)


def idle_connections(gateway):
    upstream = f"upstream dkc {{ server 127.0.0.1:{gateway.port}; keepalive 64; keepalive_timeout 1s; }}"
    location = 'location / { proxy_pass http://dkc; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_next_upstream off; }'

    async def client(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(4):
            writer.write(post("/v1/counters/px-idle/x/increment"))
            # The pauses are around both timeouts, the proxy's and the gateway's.
            await asyncio.sleep(random.choice([random.uniform(0.95, 1.05), random.uniform(2.95, 3.05)]))
        writer.write_eof()
        return await statuses(reader)

    async def clients(port):
        return [status for found in await asyncio.gather(*(client(port) for _ in range(50))) for status in found]

    with nginx(location, upstream) as port:
        answers = asyncio.run(clients(port))
        value = json.loads(ask(port, "/v1/counters/px-idle/x")[1])["value"]
        if answers.count(200) != 200 or value != 200:
            yield f"{answers.count(200)} of 200 with 200, others {set(answers) - {200}}; the counter is {value}"


# ---- Varnish -----------------------------------------------------------------------------------------------------


def varnish_keeps_no_value(gateway):
    """Varnish caches a 200 for two minutes by default: still every read returns the last acknowledged value, in the requested
    format."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="dkc-varnish-") as folder:
        listen = ["-F", "-n", folder, "-a", f"127.0.0.1:{port}", "-b", f"127.0.0.1:{gateway.port}", "-j", "none"]
        with started(binary("varnishd"), *listen):
            until("Varnish answers", lambda: ask(port, "/livez")[0] == 200)
            path = "/v1/counters/downloads/app-1.2.zip"
            for count in (1, 2, 3):
                ask(gateway.port if count < 3 else port, f"{path}/increment", "POST")
                status, text, headers = ask(port, path)
                if status != 200 or json.loads(text)["value"] != count:
                    yield f"read {count}: {status} {text}"
                if (text := ask(port, path, headers={"Accept": "text/plain"})[1].strip()) != str(count):
                    yield f"read {count} as text: {text}"
                if int(headers["Age"] or 0) or "no-store" not in headers["Cache-Control"]:
                    yield f"read {count}: {headers}"
            ask(port, path, "DELETE")
            if (value := json.loads(ask(port, path)[1])["value"]) != 0:
                yield f"after DELETE: {value}"
            for wrong in ["/v1/counters/downloads", "/v1/nothing"]:
                first, second = ask(port, wrong), ask(port, wrong)
                if int(second[2]["Age"] or 0) or first[0] != second[0]:
                    yield f"{wrong} was cached: {second[0]}"


# ---- HAProxy -----------------------------------------------------------------------------------------------------


def haproxy_sees_who_is_ready(gateway):
    """Both kinds of health check; the first one uses OPTIONS. A paused gateway is taken out of rotation, and in again."""
    port, stats = free_port(), free_port()
    checks = {"options": "option httpchk /readyz", "get": "option httpchk GET /readyz", "sent": "option httpchk\n http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host dkc"}
    backends = "".join(f"backend {name}\n {check}\n server g1 127.0.0.1:{gateway.port} check inter 200ms fall 1 rise 1\n" for name, check in checks.items())
    with tempfile.TemporaryDirectory(prefix="dkc-haproxy-") as folder:
        config = Path(folder) / "haproxy.cfg"
        config.write_text(
            "defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n timeout check 500ms\n"
            f"frontend clients\n bind 127.0.0.1:{port}\n default_backend options\n"
            f"frontend stats\n bind 127.0.0.1:{stats}\n stats enable\n stats uri /stats\n{backends}"
        )
        with started(binary("haproxy"), "-db", "-f", config):
            until("HAProxy answers", lambda: ask(stats, "/stats")[0] == 200)

            def states():
                rows = [line.split(",") for line in ask(stats, "/stats;csv")[1].splitlines()]
                return {row[0]: f"{row[17]} {row[36]}" for row in rows if len(row) > 36 and row[1] == "g1"}

            until("all checks are through", lambda: all(state.startswith("UP L7OK") for state in states().values()) and len(states()) == 3)
            if (status := ask(port, "/v1/counters/px-haproxy/x/increment", "POST")[0]) != 200:
                yield f"through it: {status}"
            os.kill(gateway.pid, signal.SIGSTOP)
            try:
                until("a gateway that stands still is down", lambda: all(state.startswith("DOWN") for state in states().values()))
            finally:
                os.kill(gateway.pid, signal.SIGCONT)
            until("it is up again", lambda: all(state.startswith("UP") for state in states().values()))
            if (status := ask(port, "/v1/counters/px-haproxy/x/increment", "POST")[0]) != 200:
                yield f"through it, later: {status}"


CASES = [
    nginx_takes_small_bodies_only,
    nginx_passes_paths_on,
    nginx_answers_for_a_gateway,
    nginx_gives_connections_up_first,
    varnish_keeps_no_value,
    haproxy_sees_who_is_ready,
]


def main():
    wanted = cases.chosen("proxies", CASES, sys.argv[1:])
    with one_gateway("proxies") as gateway:
        return 1 if cases.run_cases("proxies", wanted, gateway) else 0


if __name__ == "__main__":
    sys.exit(main())
