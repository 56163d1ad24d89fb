#!/usr/bin/env python3
"""Restarts every process of a cluster one after the other under load: gateways, storage nodes, coordinators, etcd. DKC names
the binary.

Clients keep their connections and send no Idempotency-Key, so the outcome of a request without a response is unknown. Every
request must get a response: a gateway that receives SIGTERM reports "stopping" at /readyz, continues to serve, and closes
its connections with `Connection: close`; a node hands its shards over before it ends. The counters must have exactly the
increments with status 200. The latencies of each part of the roll are printed beside those before it.

DRAIN_SECONDS sets another `--drain-seconds`. With 0 a gateway closes kept connections without notice, so requests that
cross the close are without a response, as HTTP/1.1 has it: the counters then have the increments with status 200, and at
most those besides.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from one_gateway import DKC, call, get, post

CLIENTS, PAUSE = int(os.environ.get("CLIENTS", "64")), float(os.environ.get("PAUSE", "0.05"))
NODES, REPLICAS = int(os.environ.get("NODES", "3")), 3
# None: as shipped.
DRAIN_SECONDS = os.environ.get("DRAIN_SECONDS")
# As many counters as it takes to have some in every shard.
COUNTERS = [f"/v1/counters/rolled/x{number}" for number in range(256)]
STEADY_SECONDS = 5
# p99 of a part of the roll, as a multiple of that before it. The aim is 2; the rest is for a machine that starts a process,
# serves and sends the load on the same two cores.
P99_MAX = float(os.environ.get("P99_MAX", "30"))


def main():
    if DRAIN_SECONDS is not None:
        os.environ["DKC_DRAIN_SECONDS"] = DRAIN_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        line = [DKC, "dev", "--nodes", str(NODES), "--gateways", "2", "--coordinators", "2"]
        line += ["--http", "127.0.0.1:0", "--data", folder]
        dev = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        started = []
        try:
            if not dev.stdout.readline().startswith("ready http://"):
                sys.exit("rolling_restart: dkc dev did not become ready")
            asyncio.run(roll(Path(folder), started))
        finally:
            for process in started:
                process.send_signal(signal.SIGINT)
            dev.send_signal(signal.SIGTERM)
            if dev.wait(30) != 0:
                sys.exit("rolling_restart: dkc dev did not stop in order")
            for process in started:
                process.wait(30)


def of_role(folder, role):
    """The processes of a role by name, including those that don't run."""
    file = json.loads((folder / "cluster.json").read_text())
    return {each["name"]: each for each in file["processes"] + file["dead"] if each["role"] == role}


async def roll(folder, started):
    balancer = Balancer([each["addresses"]["http"] for each in of_role(folder, "gateway").values()])
    await until(lambda: balancer.is_full())
    clients = [asyncio.create_task(balancer.client()) for _ in range(CLIENTS)]
    await asyncio.sleep(1)
    steady = await balancer.latencies_of(asyncio.sleep(STEADY_SECONDS))
    print(f"before: {words(steady)}", flush=True)
    slow = []
    for role in ["gateway", "storage-node", "coordinator", "etcd"]:
        took = await balancer.latencies_of(roll_role(folder, role, balancer, started))
        print(f"while each {role} is restarted: {words(took)}", flush=True)
        if quantile(took, 0.99) > P99_MAX * quantile(steady, 0.99):
            slow.append(role)
    balancer.over = True
    await asyncio.gather(*clients)
    value = await balancer.value()
    print(f"{CLIENTS} clients: {balancer.applied} applied, {balancer.stopping} refused with stopping, {balancer.lost} without an answer")
    crossed = balancer.lost if DRAIN_SECONDS == "0" else 0
    if balancer.lost > crossed or not balancer.applied <= value <= balancer.applied + crossed:
        sys.exit(f"rolling_restart: {balancer.lost} without an answer; {balancer.applied} applied, the counters are {value}")
    if slow:
        sys.exit(f"rolling_restart: p99 rose to more than {P99_MAX} times that before, while these were restarted: {slow}")


async def roll_role(folder, role, balancer, started):
    for name, process in sorted(of_role(folder, role).items()):
        await asyncio.sleep(1)
        began = time.monotonic()
        os.kill(process["pid"], signal.SIGTERM)
        if role == "gateway":
            await until_closed(name, process, balancer)
        while "pid" in of_role(folder, role)[name]:
            await asyncio.sleep(0.05)
        stopped = time.monotonic() - began
        with open(folder / f"{name}.again.log", "w") as log:
            started.append(subprocess.Popen(process["argv"], stdout=log, stderr=log))
        await until(lambda: is_ready(process, balancer))
        print(f"{name}: ended after {stopped:.1f} s, ready after {time.monotonic() - began:.1f} s", flush=True)


async def until_closed(name, gateway, balancer):
    """Waits until a gateway that stops has closed its port, and checks that it reports the stop before."""
    statuses = [await balancer.status(gateway["addresses"]["http"])]
    while statuses[-1] is not None:
        await asyncio.sleep(0.02)
        statuses.append(await balancer.status(gateway["addresses"]["http"]))
    if DRAIN_SECONDS != "0" and 503 not in statuses:
        sys.exit(f"rolling_restart: {name} never reported that it stops: {set(statuses)}")


async def is_ready(process, balancer):
    if process["role"] == "gateway":
        return await balancer.status(process["addresses"]["http"]) == 200
    if process["role"] == "storage-node":
        return await balancer.status(process["addresses"]["metrics"]) == 200 and await balancer.is_full()
    if process["role"] == "coordinator":
        return await balancer.status(process["addresses"]["metrics"]) == 200
    # etcd: a coordinator leads again, which needs a lease.
    return await balancer.is_full()


async def until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not await holds():
        if time.monotonic() > end:
            sys.exit("rolling_restart: the cluster was not whole again in time")
        await asyncio.sleep(0.05)


def quantile(latencies, share):
    return sorted(latencies)[min(len(latencies) - 1, int(len(latencies) * share))] if latencies else 0


def words(latencies):
    ms = [f"p{share * 100:g} {quantile(latencies, share) * 1000:.1f} ms" for share in (0.5, 0.99, 0.999)]
    return f"{len(latencies)} requests, {', '.join(ms)}, slowest {max(latencies, default=0) * 1000:.1f} ms"


class Balancer:
    """Sends each request to a gateway that is ready, over connections that are kept until the gateway closes them."""

    def __init__(self, addresses):
        self.addresses = addresses
        self.applied = self.stopping = self.lost = 0
        self.latencies = []
        self.over = False

    async def latencies_of(self, during):
        """The latencies of the requests that end while this runs."""
        self.latencies = []
        await during
        return self.latencies

    async def ask(self, address, request):
        """The status and the body of an answer; None if the port is closed."""
        try:
            reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        except ConnectionError:
            return None, b""
        try:
            return await call((reader, writer), request)
        except (ConnectionError, asyncio.IncompleteReadError):
            return None, b""
        finally:
            writer.close()

    async def status(self, address):
        """The status of /readyz; None if the port is closed."""
        return (await self.ask(address, get("/readyz")))[0]

    async def is_full(self):
        """Whether every shard is open, with all its copies in sync."""
        for address in self.addresses:
            status, body = await self.ask(address, get("/v1/cluster"))
            if status == 200:
                shards = json.loads(body)["shards"]
                return all(each["state"] == "open" and len(each["isr"]) == REPLICAS for each in shards)
        return False

    async def client(self):
        connection = None
        while not self.over:
            connection = connection or await self.connect()
            reader, writer = connection
            began = time.monotonic()
            try:
                writer.write(post(random.choice(COUNTERS) + "/increment"))
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length:")[1].split("\r\n")[0])
                body = await reader.readexactly(length)
            except (ConnectionError, asyncio.IncompleteReadError):
                self.lost += 1
                connection = None
                continue
            self.latencies.append(time.monotonic() - began)
            status = int(head.split()[1])
            if status == 200:
                self.applied += 1
            elif json.loads(body)["type"].endswith("/stopping"):
                self.stopping += 1
            else:
                sys.exit(f"rolling_restart: {status} {body}")
            if "connection: close" in head:
                writer.close()
                connection = None
            await asyncio.sleep(random.uniform(0, 2 * PAUSE))

    async def connect(self):
        """Connects to a gateway that is ready; one that starts is not reachable for a moment."""
        while True:
            for address in random.sample(self.addresses, len(self.addresses)):
                if await self.status(address) == 200:
                    try:
                        return await asyncio.open_connection(*address.rsplit(":", 1))
                    except ConnectionError:
                        continue
            await asyncio.sleep(0.02)

    async def value(self):
        """The sum of the counters."""
        answers = [await self.ask(self.addresses[0], get(counter)) for counter in COUNTERS]
        return sum(json.loads(body).get("value", 0) for status, body in answers if status == 200)


main()
