#!/usr/bin/env python3
"""Checks that each process of dkc either serves or ends, whatever fails around it: tests/processes.py [CASE …]

The roles are started one by one, as in docs/runbooks.md, on free ports ($DKC_BIN, $ETCD). Then the log can't be written
(a full file system, a closed pipe, a pipe without a reader), etcd is full, requires TLS or authentication, addresses and
variables are wrong, the processor is from before 2013 (by QEMU, from Debian's package), /proc is hidden, and etcd and the
coordinator are stopped. Each case is a generator that yields a text for each failure. Logs are full for FULL_LOG_SECONDS
(10).
"""

import base64
import contextlib
import fcntl
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cases
from cases import Broken, free_port

DKC = os.environ.get("DKC_BIN", "dkc")
ETCD = os.environ["ETCD"]
CACHE = Path(os.environ["DKC_CACHE"])
# No step takes this long unless it fails.
PATIENCE = 40
# Cases have clusters of their own, and wait most of the time.
AT_ONCE = 3
FULL_LOG_SECONDS = int(os.environ.get("FULL_LOG_SECONDS", "10"))


def until(what, check, seconds=PATIENCE):
    return cases.until(what, check, seconds)


def ask(port, path, method="GET", body=None, seconds=10, headers={}):
    """(status, text), or None without a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def run(*arguments, seconds=PATIENCE, env=None, stderr=subprocess.PIPE):
    """(code, output, errors) of a command that ends."""
    said = subprocess.run(
        [DKC, *map(str, arguments)], stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, text=True,
        timeout=seconds, env=os.environ | (env or {}),
    )
    return said.returncode, said.stdout, said.stderr or ""


class Process:
    """A process with a log of its own."""

    def __init__(self, name, command, log, ports, pass_fds=()):
        self.name, self.command, self.log, self.ports, self.pass_fds = name, command, log, ports, pass_fds
        self.start()

    def start(self, log=None):
        """Starts the process. `log` is an open file to use instead of the log file."""
        if log is not None:
            self.child = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
            return
        with open(self.log, "ab") as file:
            self.child = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file)

    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def lines(self, pattern=""):
        return [line for line in self.text().splitlines() if re.search(pattern, line)]

    def is_running(self):
        return self.child.poll() is None

    def end(self, how=signal.SIGKILL):
        if self.is_running():
            self.child.send_signal(how)
        return self.child.wait(PATIENCE)

    def readyz(self):
        return ask(self.ports["metrics"], "/readyz") or (0, "")

    def metric(self, name):
        page = (ask(self.ports["metrics"], "/metrics") or (0, ""))[1]
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.M)
        return float(found[1]) if found else 0.0


class Cluster:
    """etcd, a coordinator, nodes and gateways. `logs` is the folder of their logs."""

    def __init__(self, folder, logs=None, etcd_flags=(), nodes=3, gateways=1):
        self.folder, self.logs = Path(folder), Path(logs or folder)
        self.etcd_port, self.peer_port = free_port(), free_port()
        self.etcd_flags = list(etcd_flags)
        self.all = {}
        self.start_etcd()
        self.role("coordinator-1", "coordinator", "--expect-nodes", nodes, "--shards", 8)
        for number in range(1, nodes + 1):
            self.node(f"node-{number}")
        for number in range(1, gateways + 1):
            self.role(f"gateway-{number}", "gateway", http=True)

    def start_etcd(self):
        url, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.peer_port}"
        command = [
            ETCD, "--data-dir", str(self.folder / "etcd"), "--log-level", "error", "--listen-peer-urls", peer,
            "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
            "--listen-client-urls", url, "--advertise-client-urls", url, *self.etcd_flags,
        ]
        self.all["etcd"] = Process("etcd", command, self.folder / "etcd.log", {"metrics": self.etcd_port})
        until("etcd answers", lambda: (ask(self.etcd_port, "/health") or (0, ""))[0] == 200)

    def role(self, name, role, *flags, http=False, log=None):
        ports = {"metrics": free_port(), ("http" if http else "listen"): free_port()}
        listening = [word for kind, port in ports.items() for word in (f"--{kind}", f"127.0.0.1:{port}")]
        command = [DKC, role, "--name", name, "--etcd", f"127.0.0.1:{self.etcd_port}", *listening, *map(str, flags)]
        self.all[name] = Process(name, command, self.logs / f"{name}.log", ports)
        return self.all[name]

    def node(self, name):
        # The memory is small, since several processes run on a busy machine.
        flags = ["--data", self.folder / name, "--memory-bytes", 128 << 20, "--segment-bytes", 1 << 20]
        return self.role(name, "storage-node", *flags)

    def __getitem__(self, name):
        return self.all[name]

    @property
    def http(self):
        return self["gateway-1"].ports["http"]

    def until_ready(self):
        for name, process in self.all.items():
            if name != "etcd":
                until(f"{name} is ready", lambda: process.readyz()[0] == 200)
        until("writes are taken", lambda: self.count(8) == 8)

    def count(self, keys):
        """The number of counters that take an increment."""
        answers = [ask(self.http, f"/v1/counters/processes/key-{key}/increment", "POST") for key in range(keys)]
        return sum(1 for answer in answers if answer and answer[0] == 200)

    def etcd_call(self, path, message, seconds=10):
        return ask(self.etcd_port, path, "POST", json.dumps(message), seconds)

    def stop(self):
        for process in reversed(list(self.all.values())):
            process.end()


@contextlib.contextmanager
def cluster(**how):
    with tempfile.TemporaryDirectory(prefix="dkc-processes-") as folder:
        made = Cluster(folder, **how)
        try:
            made.until_ready()
            yield made
        finally:
            made.stop()


def log_lines_per_second(process, seconds):
    before = len(process.lines())
    time.sleep(seconds)  # a rate needs time
    return (len(process.lines()) - before) / seconds


# ---- logs --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk():
    """A file system of 64 KiB."""
    with tempfile.TemporaryDirectory(prefix="dkc-small-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def log_on_a_full_disk():
    """All roles log to a full disk, under load, while nodes die and return: nothing else changes, and they log again later."""
    if os.geteuid() != 0:
        print("processes: NOT CHECKED: a full file system needs root")
        return
    with small_disk() as logs, cluster(logs=logs) as made:
        # No page of a log has free space that could still be written.
        for log in logs.glob("*.log"):
            with open(log, "ab") as file:
                file.write(b"\n" * (-log.stat().st_size % 4096))
        filler = logs / "filler"
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(b"x")
                file.flush()
        with load(made) as clients:
            end = time.monotonic() + FULL_LOG_SECONDS
            while time.monotonic() < end:
                for name in ["node-2", "node-3"]:
                    made[name].end()
                    until(f"all counters take writes without {name}", lambda: made.count(16) == 16)
                    made[name].start()
                    until(f"{name} is ready again", lambda: made[name].readyz()[0] == 200)
        for client in clients:
            yield from client.problems()
        roles = [process for name, process in made.all.items() if name != "etcd"]
        for process in roles:
            if not process.is_running():
                yield f"{process.name} ended with {process.child.returncode}"
        lost = [process for process in roles if process.metric("dkc_log_lines_dropped_total") > 0]
        if len(lost) < 4:
            yield f"only {[process.name for process in lost]} show lines that were lost"
        filler.unlink()
        for process in lost:
            try:
                until("it logs", lambda: process.lines("log lines were lost"))
            except Broken as broken:
                yield f"{process.name}, with room again: {broken}: {process.text()[-300:]}"


class Load:
    """A client that increments one counter repeatedly, over a kept connection, each increment with a key of its own until it
    counts."""

    def __init__(self, port, number):
        self.path = f"/v1/counters/load/client-{number}"
        self.port, self.applied, self.wrong, self.over = port, 0, [], False
        self.thread = threading.Thread(target=self.run)

    def run(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            while not self.over:
                end = time.monotonic() + PATIENCE
                while (said := self.increment(connection))[0] != 200:
                    if time.monotonic() > end:
                        raise Broken(f"not applied within {PATIENCE} s: {said}")
                self.applied += 1
        except (OSError, http.client.HTTPException, Broken) as wrong:
            self.wrong.append(repr(wrong))

    def increment(self, connection):
        connection.request("POST", f"{self.path}/increment", headers={"Idempotency-Key": f'"{self.path}-{self.applied}"'})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def problems(self):
        if self.thread.is_alive() or self.wrong or self.applied < 10:
            yield f"{self.path}: {self.applied} applied, and {self.wrong or 'it does not end'}"
        value = json.loads(ask(self.port, self.path)[1])["value"]
        if value != self.applied:
            yield f"{self.path}: {self.applied} applied, the counter is {value}"


@contextlib.contextmanager
def load(made, clients=16):
    """Runs so many clients against the first gateway until the end."""
    all_clients = [Load(made.http, number) for number in range(clients)]
    for client in all_clients:
        client.thread.start()
    try:
        yield all_clients
    finally:
        for client in all_clients:
            client.over = True
        for client in all_clients:
            client.thread.join(2 * PATIENCE)
    applied = sum(client.applied for client in all_clients)
    print(f"processes: {clients} clients: {applied} increments applied", flush=True)


def log_that_is_refused():
    """The log is /dev/full, a closed pipe, or a pipe without a reader: each role serves all the same."""
    with cluster() as made:
        for name in ["node-2", "coordinator-1", "gateway-1"]:
            process = made[name]
            for kind, opened in [("/dev/full", full_device), ("a closed pipe", closed_pipe), ("a pipe without a reader", full_pipe)]:
                process.end()
                with opened() as log:
                    process.start(log)
                    try:
                        until(f"{name} is ready, its log {kind}", lambda: process.readyz()[0] == 200)
                        if kind != "a pipe without a reader":
                            until("lost lines are counted", lambda: process.metric("dkc_log_lines_dropped_total") > 0)
                        if not process.is_running():
                            yield f"{name}, its log {kind}: ended with {process.child.returncode}"
                        began = time.monotonic()
                        code = process.end(signal.SIGTERM)
                        if code != 0 or time.monotonic() - began > 12:
                            yield f"{name}, its log {kind}: ends with {code} after {time.monotonic() - began:.1f} s"
                    except Broken as broken:
                        yield str(broken)
            process.start()
            until(f"{name} is ready", lambda: process.readyz()[0] == 200)


@contextlib.contextmanager
def full_device():
    with open("/dev/full", "wb") as log:
        yield log


@contextlib.contextmanager
def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as log:
        yield log


@contextlib.contextmanager
def full_pipe():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    with os.fdopen(writer, "wb") as log:
        yield log
    os.close(reader)


# ---- etcd --------------------------------------------------------------------------------------------------------


def etcd_is_full():
    """Running processes continue and report the reason; neither logs nor etcd are flooded; space and `alarm disarm` heal it."""
    with cluster(etcd_flags=["--quota-backend-bytes", str(16 << 20)]) as made:
        port = made.etcd_port
        filling = base64.b64encode(os.urandom(900_000)).decode()
        for number in range(40):
            key = base64.b64encode(b"fill-%d" % number).decode()
            answer = made.etcd_call("/v3/kv/put", {"key": key, "value": filling})
            if "space exceeded" in answer[1]:
                break
        else:
            raise Broken("etcd does not fill up")
        until("the coordinator reports it", lambda: made["coordinator-1"].readyz() == (503, "etcd-full\n"))
        if made.count(8) != 8:
            yield "writes are not taken while all nodes are there"
        code, said, _ = run("doctor", "--etcd", f"127.0.0.1:{port}", "--data", made.folder)
        if code != 1 or "etcd is full" not in said or "alarm disarm" not in said:
            yield f"doctor: {code}: {said}"
        made["node-2"].end()
        fourth = made.node("node-4")
        until("node-4 reports what it waits for", lambda: fourth.readyz() == (503, "etcd-full\n"))
        for process in [made["coordinator-1"], made["node-1"], fourth]:
            rate = log_lines_per_second(process, 5)
            if rate > 3:
                yield f"{process.name} writes {rate:.0f} lines a second"
        for process in [made["coordinator-1"], fourth]:
            if not process.lines("etcd is full"):
                yield f"{process.name} does not report what is wrong: {process.text()[-300:]}"
        made["node-2"].start()
        revision = int(json.loads(made.etcd_call("/v3/kv/range", {"key": "YQ=="})[1])["header"]["revision"])
        everything = base64.b64encode(b"fill-").decode(), base64.b64encode(b"fill.").decode()
        made.etcd_call("/v3/kv/deleterange", {"key": everything[0], "range_end": everything[1]})
        made.etcd_call("/v3/kv/compaction", {"revision": revision + 1, "physical": True})
        made.etcd_call("/v3/maintenance/defragment", {}, 60)
        member = json.loads(made.etcd_call("/v3/cluster/member/list", {})[1])["members"][0]["ID"]
        made.etcd_call("/v3/maintenance/alarm", {"action": "DEACTIVATE", "memberID": member, "alarm": "NOSPACE"})
        made.until_ready()


def etcd_speaks_tls():
    """Doctor and each role report this at once, and the role ends with 2."""
    with tempfile.TemporaryDirectory(prefix="dkc-processes-") as folder:
        port = free_port()
        url, peer = f"https://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
        command = [
            ETCD, "--data-dir", f"{folder}/etcd", "--log-level", "error", "--auto-tls", "--listen-client-urls", url,
            "--advertise-client-urls", url, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", f"default={peer}",
        ]
        etcd = Process("etcd", command, Path(folder) / "etcd.log", {})
        try:
            until("etcd listens", lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            yield from refused_by_all(folder, f"127.0.0.1:{port}", "requires TLS")
            code, _, said = run("doctor", "--etcd", url)
            if code != 2 or "TLS" not in said:
                yield f"doctor --etcd {url}: {code}: {said}"
            # Another member may still reply, so the gateway waits.
            code, said = starts(folder, "gateway", f"127.0.0.1:{port},127.0.0.1:{free_port()}", 3)
            if code is not None:
                yield f"gateway with another member that is away: {code}: {said}"
        finally:
            etcd.end()


def starts(folder, role, etcd, seconds):
    """(code, log) of a role; the code is None if it still runs after that time."""
    flags = ["--name", "n9", "--etcd", etcd]
    flags += ["--http", f"127.0.0.1:{free_port()}"] if role == "gateway" else ["--listen", f"127.0.0.1:{free_port()}"]
    flags += ["--data", f"{folder}/n9"] if role == "storage-node" else []
    try:
        code, _, said = run(role, *flags, seconds=seconds)
        return code, said
    except subprocess.TimeoutExpired as goes_on:
        return None, (goes_on.stderr or b"").decode(errors="replace")


def refused_by_all(folder, etcd, words):
    code, said, _ = run("doctor", "--etcd", etcd, "--data", folder)
    if code != 1 or words not in said or "check that etcd is running" in said:
        yield f"doctor: {code}: {said}"
    for role in ["coordinator", "storage-node", "gateway"]:
        code, said = starts(folder, role, etcd, PATIENCE)
        errors = [line for line in said.splitlines() if "ERROR" in line]
        if code != 2 or len(errors) != 1 or words not in errors[0]:
            yield f"{role}: {code}: {said}"


def etcd_wants_users():
    """Running processes continue; one that starts ends with 2; nothing is flooded; all heal without authentication."""
    with cluster() as made:
        etcd = f"127.0.0.1:{made.etcd_port}"
        for path, message in [
            ("/v3/auth/user/add", {"name": "root", "password": "x"}),
            ("/v3/auth/role/add", {"name": "root"}),
            ("/v3/auth/user/grant", {"user": "root", "role": "root"}),
            ("/v3/auth/enable", {}),
        ]:
            made.etcd_call(path, message)
        if made.count(8) != 8:
            yield "writes are not taken while all nodes are there"
        yield from refused_by_all(made.folder, etcd, "requires authentication")
        until("the coordinator reports it", lambda: made["coordinator-1"].readyz() == (503, "etcd-auth\n"))
        made["node-2"].end()
        for name in ["coordinator-1", "node-1", "gateway-1"]:
            rate = log_lines_per_second(made[name], 5)
            if rate > 8:
                yield f"{name} writes {rate:.0f} lines a second"
        token = json.loads(made.etcd_call("/v3/auth/authenticate", {"name": "root", "password": "x"})[1])["token"]
        connection = http.client.HTTPConnection("127.0.0.1", made.etcd_port, timeout=10)
        connection.request("POST", "/v3/auth/disable", body="{}", headers={"Authorization": token})
        connection.getresponse().read()
        made["node-2"].start()
        made.until_ready()


def all_that_decides_is_stopped():
    """etcd and the coordinator are stopped, then a node: the gateways stay ready, and shards without that node serve on."""
    keys = [f"key-{number}" for number in range(200)]
    with cluster(nodes=5, gateways=2) as made:
        shards = json.loads(ask(made.http, "/v1/cluster")[1])["shards"]
        whole = [shard for shard in shards if "node-5" not in shard["isr"]]
        if not 0 < len(whole) < len(shards):
            yield f"node-5 is in all shards or in none: {shards}"
        for name in ["etcd", "coordinator-1", "node-5"]:
            made[name].end()
        first, began = None, time.monotonic()
        while time.monotonic() < began + 12:
            for name in ["gateway-1", "gateway-2"]:
                gateway = made[name]
                if gateway.readyz() != (200, "ok\n"):
                    yield f"{name}: {gateway.readyz()}"
                message = json.dumps({"increments": [{"key": key} for key in keys]})
                headers = {"Request-Timeout-Ms": "1500"}
                path = "/v1/counters/stopped"
                status, text = ask(gateway.ports["http"], f"{path}/increment", "POST", message, headers=headers)
                failed = {each["key"]: each["type"].rsplit("/", 1)[1] for each in json.loads(text).get("failed", [])}
                served = [key for key in keys if key not in failed]
                # Keys are in random shards: the limit is six standard deviations.
                share = len(whole) / len(shards)
                if abs(len(served) - share * len(keys)) > 6 * (share * (1 - share) * len(keys)) ** 0.5:
                    yield f"{name}: {status}, {len(served)} of {len(keys)} keys are served, {len(whole)} of {len(shards)} shards are whole: {text[:500]}"
                # A request for a shard that is not yet known to lack a member waits until its deadline.
                first = failed if first is None else first
                if failed.keys() != first.keys() or not set(failed.values()) <= {"frozen", "no-primary", "deadline"}:
                    yield f"{name}: other keys than at first are refused, or for other reasons: {failed.keys() ^ first.keys()} {set(failed.values())}"
                for key in served[:20]:
                    if (answer := ask(gateway.ports["http"], f"{path}/{key}") or (0, ""))[0] != 200:
                        yield f"{name}: {key} is not read: {answer}"
        made.start_etcd()
        made["coordinator-1"].start()
        made["node-5"].start()
        made.until_ready()


# ---- settings ----------------------------------------------------------------------------------------------------

CAN_NOT_BE_DIALLED = [
    "http://127.0.0.1:7019", "node-9", "node-9:", "node-9:http", "0.0.0.0:7019", "[::]:7019", ":::7019", "127.0.0.1:0",
    "127.0.0.1:99999", "a b:7019", " 127.0.0.1:7019", "127.0.0.1:7019 ", ":7019", "", "127.0.0.1:7019/", "fd00::5",
    "[fd00::5]", "[fd00::5:7019", "10.0.0.256:7019", "255.255.255.255:7019", "a,b:7019", "$(POD_IP):7019", "node-9:+7019",
]


def addresses_are_looked_at():
    with tempfile.TemporaryDirectory(prefix="dkc-processes-") as folder:
        listen, etcd = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        roles = {
            "storage-node": ["--name", "n9", "--data", f"{folder}/n9", "--listen", listen],
            "coordinator": ["--name", "c9", "--listen", listen],
        }
        for role, flags in roles.items():
            flags += ["--etcd", etcd]
            for address in CAN_NOT_BE_DIALLED:
                for more in [["--check-config"], []]:
                    code, _, said = run(role, *flags, f"--advertise={address}", *more)
                    if code != 2 or "--advertise" not in said:
                        yield f"{role} --advertise {address!r} {more}: {code}: {said}"
                code, _, said = run(role, *flags, "--check-config", env={"DKC_ADVERTISE": address})
                if code != 2 or "--advertise" not in said:
                    yield f"{role}, DKC_ADVERTISE={address!r}: {code}: {said}"
            for address, meant in [("fd00::5:7019", "[fd00::5]:7019"), ("node-9:7019", "node-9:7019")]:
                code, said, _ = run(role, *flags, "--advertise", address, "--check-config")
                if code != 0 or f'advertise = "{meant}"' not in said and f'advertise = "{address}"' not in said:
                    yield f"{role} --advertise {address}: {code}: {said}"
            elsewhere = [*flags[:-1], "etcd.invalid:2379"]
            code, _, said = run(role, *elsewhere, "--advertise", "127.0.0.1:7019", "--check-config")
            if code != 0 or "warning: only processes of this machine can dial 127.0.0.1:7019" not in said:
                yield f"{role}, loopback beside an etcd elsewhere: {code}: {said}"
        for role, flag in [("gateway", "--http"), ("gateway", "--metrics"), ("gateway", "--grpc"), ("gateway", "--etcd")]:
            for address in ["localhost" if flag == "--etcd" else "localhost:1", " 127.0.0.1:1", "http:///", "127.0.0.1:99999"]:
                code, _, said = run(role, f"{flag}={address}", "--check-config")
                if code != 2 or flag not in said:
                    yield f"{role} {flag} {address}: {code}: {said}"


def misspelt_variables_are_named():
    with tempfile.TemporaryDirectory(prefix="dkc-processes-") as folder:
        env = {"DKC_MIN_INSYNC": "1"}
        flags = ["--name", "c9", "--listen", f"127.0.0.1:{free_port()}", "--etcd", f"127.0.0.1:{free_port()}"]
        code, _, said = run("coordinator", *flags, "--check-config", env=env)
        if code != 0 or "DKC_MIN_INSYNC" not in said or "DKC_MIN_IN_SYNC" not in said:
            yield f"--check-config: {code}: {said}"
        log = Path(folder) / "log"
        with open(log, "wb") as file:
            child = subprocess.Popen([DKC, "coordinator", *flags], stderr=file, env=os.environ | env)
        try:
            until("a start logs it", lambda: "did you mean DKC_MIN_IN_SYNC" in log.read_text(), 10)
        except Broken as broken:
            yield str(broken)
        finally:
            child.kill()
            child.wait()


def a_node_that_nobody_can_dial_is_named_once():
    """The record of the node is written by hand, as if an earlier version of dkc had registered it."""
    with cluster() as made:
        prefix = base64.b64encode(b"/dkc/dkc/node/").decode()
        end = base64.b64encode(b"/dkc/dkc/node0").decode()
        found = json.loads(made.etcd_call("/v3/kv/range", {"key": prefix, "range_end": end})[1])["kvs"][0]
        value = base64.b64decode(found["value"])
        addresses = {name: f"127.0.0.1:{made[name].ports['listen']}".encode() for name in ["node-1", "node-2", "node-3"]}
        name, address = next((name, address) for name, address in addresses.items() if address in value)
        # The address has the same length, since its length is part of the record.
        changed = value.replace(address, b"http://" + b"x" * (len(address) - 7))
        made.etcd_call("/v3/kv/put", {"key": found["key"], "value": base64.b64encode(changed).decode(), "ignore_lease": True})
        coordinator = made["coordinator-1"]
        made[name].end()
        until("it is named", lambda: coordinator.lines("can't be dialled"), 20)
        rate = log_lines_per_second(coordinator, 3)
        if len(coordinator.lines("can't be dialled")) > 2 or rate > 3:
            yield f"{len(coordinator.lines('dialled'))} times, {rate:.0f} lines a second"


# ---- a hardened unit -------------------------------------------------------------------------------------------


def hidden_proc_is_done_without():
    """As with systemd's ProcSubset=pid: a restarted node continues with its data, and doctor reports what it can't read."""
    if os.geteuid() != 0:
        print("processes: NOT CHECKED: a separate /proc needs root")
        return
    with cluster() as made:
        node = made["node-3"]
        node.end()
        node.command = hidden(node.command)
        node.start()
        until("node-3 is ready without all of /proc", lambda: node.readyz()[0] == 200)
        if errors := node.lines(" ERROR "):
            yield f"node-3: {errors}"
        until("writes are taken", lambda: made.count(16) == 16)
        said = subprocess.run(hidden([DKC, "doctor", "--data", str(made.folder)]), capture_output=True, text=True, timeout=PATIENCE)
        if said.returncode != 0 or not re.search(r"^warn +/proc +.*cannot be read", said.stdout, re.M):
            yield f"doctor: {said.returncode}: {said.stdout}{said.stderr}"


def hidden(command):
    """The command, in a namespace with a /proc that contains only processes; it ends with the child of this process."""
    script = 'mount -t proc -o subset=pid proc /proc; exec "$@"'
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh", *command]


# ---- the processor -----------------------------------------------------------------------------------------------


def old_processors_are_told_so():
    qemu = CACHE / "qemu-user/usr/bin/qemu-x86_64"
    lacks = {
        "Nehalem": "avx2", "SandyBridge": "avx2", "IvyBridge": "avx2", "qemu64": "avx2", "Haswell,-avx2": "avx2",
        "Haswell,-bmi2": "bmi2", "Haswell,-bmi1": "bmi1", "Haswell,-abm": "lzcnt", "Haswell,-pclmulqdq": "pclmulqdq",
    }
    for processor, missing in lacks.items():
        for arguments in [["--version"], ["doctor"], ["gateway", "--check-config"], ["incr", "--help"]]:
            said = on(qemu, processor, arguments)
            lines = of_dkc(said)
            if said.returncode != 2 or len(lines) != 1 or missing not in lines[0] or said.stdout:
                yield f"{processor}, {arguments}: {said.returncode}: {said.stdout}{said.stderr}"
    for processor in ["Haswell", "max"]:
        said = on(qemu, processor, ["--version"])
        if said.returncode != 0 or not said.stdout.startswith("dkc ") or of_dkc(said):
            yield f"{processor}: {said.returncode}: {said.stdout}{said.stderr}"


def of_dkc(said):
    """The output of dkc, without the warnings of QEMU."""
    return [line for line in said.stderr.splitlines() if not line.startswith("qemu-")]


def on(qemu, processor, arguments):
    command = [qemu, "-cpu", processor, DKC, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)


CASES = [
    old_processors_are_told_so,
    addresses_are_looked_at,
    misspelt_variables_are_named,
    a_node_that_nobody_can_dial_is_named_once,
    log_that_is_refused,
    log_on_a_full_disk,
    etcd_is_full,
    etcd_speaks_tls,
    etcd_wants_users,
    all_that_decides_is_stopped,
    hidden_proc_is_done_without,
]


def main():
    wanted = cases.chosen("processes", CASES, sys.argv[1:])
    return 1 if cases.run_cases("processes", wanted, at_once=AT_ONCE) else 0


if __name__ == "__main__":
    sys.exit(main())
