#!/usr/bin/env python3
"""Checks that clients which only use the three outcomes stay exact while machines die.

Starts a cluster of three nodes, two gateways and two coordinators (DKC names the binary). CLIENTS clients make single
increments by the loop of docs/http.md: applied is counted, not-applied is sent again, unknown is recorded and left. Each
node and each coordinator is killed with SIGKILL in turn and started again; then one gateway. Afterwards every counter
must be at least the number of increments that its client knows to be applied, and at most that plus its unknown ones;
while no gateway dies, nothing may be unknown.

With --tokens each increment has an Idempotency-Key and is sent, with that same key, until it is applied and then twice
more, through one gateway and the other in turn; with a quarter of the keys another increment is then tried, which must be
refused as 422. Every counter must contain each increment exactly once, nothing may stay unknown, with or without the kill
of a gateway, and every response must have the value of the first one.
"""

import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid

from count_under_kills import DKC, kill_and_restart, processes, say, wait_until_full

TOKENS = sys.argv[1:] == ["--tokens"]
CLIENTS = int(os.environ.get("CLIENTS", "16"))
# The number of counters of each client, which are incremented in turn.
KEYS = 4
# The key of every so many increments is used for another request, too.
REUSE_EVERY = 4


class Client(threading.Thread):
    def __init__(self, number, urls, stop):
        super().__init__(daemon=True)
        self.number, self.stop = number, stop
        # Every other client begins at the other gateway.
        self.urls = urls[number % len(urls):] + urls[:number % len(urls)]
        self.applied, self.unknown, self.again = [0] * KEYS, [0] * KEYS, 0
        self.replayed, self.refused = 0, 0
        self.wrong = None

    def run(self):
        try:
            key = 0
            while not self.stop.is_set():
                counted = self.applied if self.increment(key) == "applied" else self.unknown
                counted[key] += 1
                key = (key + 1) % KEYS
        except Exception as error:  # main reports this: a client that died silently would prove nothing.
            self.wrong = error

    def increment(self, key):
        while True:
            answer = self.send(f"/v1/counters/outcomes/client-{self.number}-{key}/increment")
            if answer is not None and answer.status == 200:
                return "applied"
            if answer is None or answer.outcome == "unknown":
                return "unknown"
            if answer.status not in (429, 503):
                raise ValueError(answer.body)
            self.again += 1
            time.sleep(int(answer.headers["Retry-After"]))

    def send(self, path, headers={}):
        """Sends a request; None if the connection broke. If no connection was made, the next address is tried."""
        connection = self.connect()
        try:
            connection.request("POST", path, headers={"Request-Timeout-Ms": "20000", **headers})
            response = connection.getresponse()
            response.body = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if response.status != 200:
            response.outcome = json.loads(response.body)["outcome"]
        return response

    def connect(self):
        while True:
            host = urllib.parse.urlsplit(self.urls[0]).netloc
            connection = http.client.HTTPConnection(host, timeout=60)
            try:
                connection.connect()
                return connection
            except ConnectionError:  # The connection was refused, or reset in the backlog of a gateway that died: nothing was sent.
                self.urls = self.urls[1:] + self.urls[:1]
                time.sleep(0.05)


class Repeater(Client):
    """Sends each increment three times, with one key and through both gateways, and may send another one with that key."""

    def increment(self, key):
        path = f"/v1/counters/outcomes/client-{self.number}-{key}/increment?return=value"
        headers = {"Idempotency-Key": f'"{uuid.uuid4()}"'}
        values, first = [], True
        while len(values) < 3:
            answer = self.send(path, headers)
            self.urls = self.urls[1:] + self.urls[:1]
            if answer is not None and answer.status == 200:
                values.append(json.loads(answer.body)["value"])
                if answer.headers["Idempotent-Replayed"] == "true":
                    self.replayed += 1
                elif not first:
                    raise ValueError(f"{path}: applied again, {values}")
                first = False
                continue
            self.wait_after(answer)
        # No other client increments this counter.
        if values != [self.applied[key] + 1] * 3:
            raise ValueError(f"{path}: {values}, after {self.applied[key]} increments")
        if self.applied[key] % REUSE_EVERY == 0:
            self.reuse(path, headers)
        return "applied"

    def reuse(self, path, headers):
        """Sends another increment with a used key. The next value shows that nothing of it was counted."""
        while True:
            answer = self.send(f"{path}&delta=1000000", headers)
            self.urls = self.urls[1:] + self.urls[:1]
            if answer is not None and answer.status == 422:
                self.refused += 1
                return
            if answer is not None and answer.status == 200:
                raise ValueError(f"{path}: another increment was applied under a key that had been used")
            self.wait_after(answer)

    def wait_after(self, answer):
        if answer is not None and answer.outcome != "unknown" and answer.status not in (429, 503):
            raise ValueError(answer.body)
        self.again += 1
        time.sleep(int(answer.headers.get("Retry-After", "0")) if answer is not None else 0.05)


class Load:
    """All clients together, as `kill_and_restart` sees them."""

    def __init__(self, clients):
        self.clients, self.at_kill = clients, []

    @property
    def given(self):
        return sum(sum(client.applied) for client in self.clients)

    def note_kill(self):
        self.at_kill.append(self.given)


def main():
    with tempfile.TemporaryDirectory() as data:
        dev = subprocess.Popen(
            [DKC, "dev", "--gateways", "2", "--coordinators", "2", "--http", "127.0.0.1:0", "--data", data],
            stdout=subprocess.PIPE, text=True,
        )
        try:
            if not dev.stdout.readline().startswith("ready"):
                sys.exit("dkc dev is not ready")
            check(data)
        finally:
            dev.terminate()
            dev.wait(20)


def check(data):
    urls = ["http://" + gateway["addresses"]["http"] for gateway in processes(data, "gateway")]
    stop = threading.Event()
    client = Repeater if TOKENS else Client
    clients = [client(number, urls, stop) for number in range(CLIENTS)]
    load = Load(clients)
    for client in clients:
        client.start()
    wait_for_more(load, 1_000)
    for victim in processes(data, "storage-node") + processes(data, "coordinator"):
        kill_and_restart(data, victim, load)
        wait_until_full(",".join(urls), 3)
    unknown_before = sum(sum(client.unknown) for client in clients)
    # The second one: `dkc status` asks the first.
    kill_and_restart(data, processes(data, "gateway")[1], load)
    wait_for_more(load, 1_000)
    stop.set()
    for client in clients:
        client.join(90)
    wrong = [f"client {client.number}: {client.wrong or 'does not end'}"
             for client in clients if client.wrong or client.is_alive()]
    if unknown_before:
        wrong.append(f"{unknown_before} increments became unknown though no gateway had died")
    wrong += [f"nothing was counted between kills {i} and {i + 1}"
              for i, (one, next) in enumerate(zip(load.at_kill, load.at_kill[1:])) if next <= one]
    for client in clients:
        for key, (applied, unknown) in enumerate(zip(client.applied, client.unknown)):
            value = read(urls[0], f"client-{client.number}-{key}")
            if not applied <= value <= applied + unknown:
                wrong.append(f"client-{client.number}-{key}: {value}, of {applied} applied and {unknown} unknown")
    if wrong:
        sys.exit("\n".join(wrong))
    unknown = sum(sum(client.unknown) for client in clients)
    again = sum(client.again for client in clients)
    if TOKENS:
        replayed = sum(client.replayed for client in clients)
        refused = sum(client.refused for client in clients)
        if unknown or replayed < 2 * load.given or REUSE_EVERY * refused < load.given:
            sys.exit(f"{unknown} unknown, {replayed} replays and {refused} refusals of {load.given} increments")
        say(f"{load.given} increments, each answered three times, {again} sent again: every counter holds each once")
        say(f"{refused} others with a used key: refused as 422, and counted nowhere")
        return
    say(f"{load.given} increments applied, {unknown} unknown, {again} sent again: every counter is within its bounds")


def wait_for_more(load, increments):
    wanted, deadline = load.given + increments, time.monotonic() + 60
    while load.given < wanted:
        if time.monotonic() > deadline:
            sys.exit(f"{load.given} increments after a minute, {wanted} expected")
        time.sleep(0.05)


def read(url, key):
    said = subprocess.run([DKC, "get", "--json", "--url", url, "outcomes", key], capture_output=True, check=True)
    return json.loads(said.stdout)["counters"][0]["value"]


main()
