#!/usr/bin/env python3
"""Restarts two gateways one after the other under load. DKC names the binary.

Clients keep their connections and send no Idempotency-Key, so the outcome of a request without a response is unknown. Every
request must get a response: a gateway that receives SIGTERM reports "stopping" at /readyz, continues to serve, and closes
its connections with `Connection: close`. The counter must have exactly the increments with status 200.

DRAIN_SECONDS sets another `--drain-seconds`. With 0 a gateway closes kept connections without notice, so requests that
cross the close are without a response, as HTTP/1.1 has it: the counter then has the increments with status 200, and at
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

from one_gateway import DKC, get, post

CLIENTS, PAUSE = int(os.environ.get("CLIENTS", "64")), 0.05
# None: as shipped.
DRAIN_SECONDS = os.environ.get("DRAIN_SECONDS")
COUNTER = "/v1/counters/rolled/x"


def main():
    if DRAIN_SECONDS is not None:
        os.environ["DKC_DRAIN_SECONDS"] = DRAIN_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        line = [DKC, "dev", "--nodes", "1", "--gateways", "2", "--http", "127.0.0.1:0", "--data", folder]
        dev = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        started = []
        try:
            if not dev.stdout.readline().startswith("ready http://"):
                sys.exit("rolling_restart: dkc dev did not become ready")
            asyncio.run(roll(Path(folder), started))
        finally:
            for gateway in started:
                gateway.send_signal(signal.SIGINT)
            dev.send_signal(signal.SIGTERM)
            if dev.wait(30) != 0:
                sys.exit("rolling_restart: dkc dev did not stop in order")
            for gateway in started:
                gateway.wait(30)


def gateways(folder):
    """The gateways by name, including those that don't run."""
    file = json.loads((folder / "cluster.json").read_text())
    return {each["name"]: each for each in file["processes"] + file["dead"] if each["role"] == "gateway"}


async def roll(folder, started):
    balancer = Balancer([each["addresses"]["http"] for each in gateways(folder).values()])
    clients = [asyncio.create_task(balancer.client()) for _ in range(CLIENTS)]
    for name, gateway in sorted(gateways(folder).items()):
        await asyncio.sleep(1)
        began = time.monotonic()
        os.kill(gateway["pid"], signal.SIGTERM)
        told = [await balancer.status(gateway["addresses"]["http"])]
        while told[-1] is not None:
            await asyncio.sleep(0.02)
            told.append(await balancer.status(gateway["addresses"]["http"]))
        said = time.monotonic() - began
        if DRAIN_SECONDS != "0" and 503 not in told:
            sys.exit(f"rolling_restart: {name} never reported that it stops: {set(told)}")
        print(f"{name}: readyz was 503 for {said:.1f} s before the port was closed", flush=True)
        while "pid" in gateways(folder)[name]:
            await asyncio.sleep(0.05)
        log = open(folder / f"{name}.again.log", "w")
        started.append(subprocess.Popen(gateway["argv"], stderr=log))
        while await balancer.status(gateway["addresses"]["http"]) != 200:
            await asyncio.sleep(0.05)
    await asyncio.sleep(1)
    balancer.over = True
    await asyncio.gather(*clients)
    value = await balancer.value()
    print(f"{CLIENTS} clients: {balancer.applied} applied, {balancer.stopping} refused with stopping, {balancer.lost} without an answer")
    crossed = balancer.lost if DRAIN_SECONDS == "0" else 0
    if balancer.lost > crossed or not balancer.applied <= value <= balancer.applied + crossed:
        sys.exit(f"rolling_restart: {balancer.lost} without an answer; {balancer.applied} applied, the counter is {value}")


class Balancer:
    """Sends each request to a gateway that is ready, over connections that are kept until the gateway closes them."""

    def __init__(self, addresses):
        self.addresses = addresses
        self.applied = self.stopping = self.lost = 0
        self.over = False

    async def status(self, address):
        """The status of /readyz; None if the port is closed."""
        try:
            reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        except ConnectionError:
            return None
        try:
            writer.write(get("/readyz"))
            return int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        except (ConnectionError, asyncio.IncompleteReadError):
            return None
        finally:
            writer.close()

    async def client(self):
        connection = None
        while not self.over:
            connection = connection or await self.connect()
            reader, writer = connection
            try:
                writer.write(post(COUNTER + "/increment"))
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length:")[1].split("\r\n")[0])
                body = await reader.readexactly(length)
            except (ConnectionError, asyncio.IncompleteReadError):
                self.lost += 1
                connection = None
                continue
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
        for address in self.addresses:
            reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
            writer.write(get(COUNTER))
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length:")[1].split("\r\n")[0])
            writer.close()
            return json.loads(await reader.readexactly(length))["value"]


main()
