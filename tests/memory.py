#!/usr/bin/env python3
"""Compares the memory of each process of a cluster under mixed load with its budget.

    memory.py [--seconds N] [--shards N] [--memory-mib N] [--keep DIR]

A cluster of three nodes, one gateway and one coordinator (`dkc dev`, DKC names the binary) takes single
increments, batches of 1,000, keyed requests, keys of 1,000 bytes, and reads, one key and many. A third of the way
one node is killed; it comes back at two thirds, and catches up under load. The memory of each process is read every
second. The last lines are a table: the highest and the last resident memory, and the budget. Exits 1 if a process was
ever above its budget × 1.1, or if a kind of load got no response.

A node's budget is its `--memory-bytes`; those of a gateway and a coordinator are in docs/operations.md ("Size").
"""

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

from count_under_kills import DKC, processes
from one_gateway import Gateway, call, get, post

MIB = 1 << 20
ALLOWED = 1.1
# The own memory of a gateway and a coordinator, beside that of the workers.
GATEWAY_MIB = 64 + 2 * 256
COORDINATOR_MIB = 128


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--memory-mib", type=int, default=512)
    parser.add_argument("--keep", help="folder for data and logs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run(args, args.keep or temporary))


def run(args, folder):
    line = [DKC, "dev", "--nodes", "3", "--shards", str(args.shards), "--http", "127.0.0.1:0", "--data", folder]
    line += ["--", "--memory-bytes", str(args.memory_mib * MIB)]
    dev = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        ready = dev.stdout.readline()
        if not ready.startswith("ready http://"):
            sys.exit("memory: dkc dev did not become ready")
        watch = Watch(folder, args)
        load = Load(ready.split("//")[1].strip(), args.seconds)
        asyncio.run(go(args, folder, watch, load))
        watch.look()
        return verdict(watch, load)
    finally:
        dev.send_signal(signal.SIGTERM)
        if dev.wait(60) != 0:
            sys.exit("memory: dkc dev did not stop in order")


async def go(args, folder, watch, load):
    await asyncio.gather(watch.run(), absence(args, folder), *load.clients())


async def absence(args, folder):
    """Kills a node, and starts it again after a third of the time."""
    await asyncio.sleep(args.seconds / 3)
    victim = processes(folder, "storage-node")[-1]
    os.kill(victim["pid"], signal.SIGKILL)
    say(f"killed {victim['name']}")
    await asyncio.sleep(args.seconds / 3)
    log = open(os.path.join(folder, "logs", victim["name"] + ".log"), "ab")
    # `dkc dev` adopts the process, and stops it at the end.
    subprocess.Popen(victim["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    say(f"started {victim['name']} again")


# ---- the memory ----------------------------------------------------------------------------------


class Watch:
    """Reads the resident memory of every process, once a second."""

    def __init__(self, folder, args):
        self.folder, self.seconds = folder, args.seconds
        self.budgets = {"storage-node": args.memory_mib, "gateway": GATEWAY_MIB, "coordinator": COORDINATOR_MIB}
        self.most, self.last, self.role = collections.Counter(), {}, {}

    async def run(self):
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            self.look()
            await asyncio.sleep(1)

    def look(self):
        for role in self.budgets:
            for process in processes(self.folder, role):
                name = process["name"]
                try:
                    now = Gateway("127.0.0.1:0", process["pid"]).memory()
                except (OSError, StopIteration):
                    continue  # The process has just been killed.
                self.role[name], self.last[name] = role, now
                self.most[name] = max(self.most[name], now)

    def rows(self):
        for name, role in sorted(self.role.items()):
            budget = self.budgets[role] * MIB
            yield name, budget, self.most[name], self.last[name], self.most[name] <= budget * ALLOWED


# ---- the load ------------------------------------------------------------------------------------


class Load:
    """Clients of every kind, each in a closed loop."""

    def __init__(self, address, seconds):
        self.gateway = Gateway(address, os.getpid())
        self.until = time.monotonic() + seconds
        self.answers = collections.defaultdict(collections.Counter)
        self.random = random.Random(1)
        self.number = 0

    def clients(self):
        kinds = {"single": 16, "batch": 4, "keyed": 8, "large key": 4, "read": 8, "read many": 2, "bounded read": 4}
        return [self.client(kind) for kind, count in kinds.items() for _ in range(count)]

    async def client(self, kind):
        connection = None
        while time.monotonic() < self.until:
            try:
                connection = connection or await self.gateway.connect()
                status, _ = await call(connection, self.request(kind))
            except (OSError, asyncio.IncompleteReadError):
                connection, status = None, 0
            self.answers[kind][status] += 1
            if status not in (200, 0):
                await asyncio.sleep(0.05)

    def request(self, kind):
        self.number += 1
        key = self.random.randrange(1_000_000)
        many = (self.random.randrange(1_000_000) for _ in range(1000))
        match kind:
            case "single":
                return post(f"/v1/counters/memory/{key}/increment")
            case "batch":
                lines = "".join(f"{key}\n" for key in many)
                return post("/v1/counters/memory/increment", lines.encode(), "Content-Type: text/plain")
            case "keyed":
                return post(f"/v1/counters/memory/{key}/increment?return=value", b"", f'Idempotency-Key: "{self.number}"')
            case "large key":
                lines = "".join(f"{key:01000}\n" for key in many)
                return post("/v1/counters/memory/increment", lines.encode(), "Content-Type: text/plain")
            case "read":
                return get(f"/v1/counters/memory/{key}")
            case "bounded read":
                return get(f"/v1/counters/memory/{key}?consistency=bounded&max_staleness_ms=1000")
            case "read many":
                body = json.dumps({"keys": [str(key) for key in many]})
                return post("/v1/counters/memory/get", body.encode())


# ---- the end -------------------------------------------------------------------------------------


def verdict(watch, load):
    for kind, answers in load.answers.items():
        print(f"{kind:14} {answers[200]:>9} answered", {status: n for status, n in answers.items() if status != 200})
    print(f"{'process':16} {'budget':>10} {'most':>10} {'at the end':>10}")
    good = all(load.answers[kind][200] for kind in load.answers)
    for name, budget, most, last, within in watch.rows():
        good = good and within
        sizes = " ".join(f"{size / MIB:>6.0f} MiB" for size in (budget, most, last))
        print(f"{name:16} {sizes}{'' if within else '  ABOVE'}")
    return 0 if good else 1


BEGUN = time.monotonic()


def say(text):
    print(f"{time.monotonic() - BEGUN:6.1f} s: {text}", flush=True)


if __name__ == "__main__":
    main()
