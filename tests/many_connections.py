#!/usr/bin/env python3
"""10,000 connections to one gateway, 1,000 of them active.

Starts `dkc dev --nodes 1` (DKC names the binary) and opens CONNECTIONS connections. Each makes one request, so
that it has had its buffers; then ACTIVE of them make ROUNDS increments each while the others lie idle. Afterwards
every idle one is asked again. Nothing may be refused or closed, every count must be exact, and an idle connection
may cost no more than MEMORY_MAX bytes. In the end each sends half a head, as large as the gateway takes: it may hold
HALF_HEAD_MAX bytes for each of them, and goes on answering others. Prints what it measured.
"""

import asyncio
import json
import os
import resource
import sys
import time

from one_gateway import memory, one_gateway

CONNECTIONS = int(os.environ.get("CONNECTIONS", "10000"))
ACTIVE = int(os.environ.get("ACTIVE", "1000"))
ROUNDS = int(os.environ.get("ROUNDS", "20"))
MEMORY_MAX = 32 * 1024
# A head has 32 KiB at most, and a buffer that grows may be twice as large for a moment.
HALF_HEAD_MAX = 64 * 1024
# Seconds for all of it.
WITHIN = 120


def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CONNECTIONS + 200:
        sys.exit(f"many_connections: {hard} open files allowed, {CONNECTIONS + 200} needed: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # It starts with few, as most shells do: the gateway raises its own limit.
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    with one_gateway("many_connections", preexec_fn=limit) as (address, pid):
        asyncio.run(asyncio.wait_for(measure(address, pid), WITHIN))


async def measure(address, pid):
    host, port = address.rsplit(":", 1)
    before = memory(pid)
    connections = []
    for start in range(0, CONNECTIONS, 500):
        some = [asyncio.open_connection(host, int(port)) for _ in range(start, min(start + 500, CONNECTIONS))]
        connections += await asyncio.gather(*some)
    await each(connections, lambda number: get("/livez"))
    idle = memory(pid)
    per_connection = (idle - before) / CONNECTIONS
    began = time.monotonic()
    for _ in range(ROUNDS):
        await each(connections[:ACTIVE], lambda number: post(f"/v1/counters/many/k{number % 100}/increment"))
    seconds = time.monotonic() - began
    busy = memory(pid)
    await each(connections, lambda number: get("/livez"))
    body = json.dumps({"keys": [f"k{number}" for number in range(100)]})
    answer = await call(connections[0], post("/v1/counters/many/get", body))
    counted = sum(one["value"] for one in json.loads(answer)["counters"])
    print(
        f"{CONNECTIONS} connections: {per_connection:.0f} B of the gateway's memory each when idle; "
        f"{ACTIVE} of them made {ACTIVE * ROUNDS} increments in {seconds:.1f} s; "
        f"memory {before >> 20} MiB, {idle >> 20} MiB idle, {busy >> 20} MiB busy"
    )
    if counted != ACTIVE * ROUNDS:
        sys.exit(f"many_connections: {counted} counted, {ACTIVE * ROUNDS} acknowledged")
    if per_connection > MEMORY_MAX:
        sys.exit(f"many_connections: more than {MEMORY_MAX} B for an idle connection")
    half = b"GET /livez HTTP/1.1\r\n" + b"X: " + b"y" * 31_000
    for _, writer in connections[1:]:
        writer.write(half)
    await asyncio.gather(*(writer.drain() for _, writer in connections[1:]))
    # Nobody says when it has read them; that it holds them shows. All of this ends WITHIN so many seconds.
    earlier, held = 0, memory(pid)
    while held > earlier or held - idle < CONNECTIONS * len(half) // 2:
        await call(connections[0], get("/livez"))
        await asyncio.sleep(0.1)
        earlier, held = held, memory(pid)
    per_half = (held - before) / CONNECTIONS
    print(f"{CONNECTIONS - 1} half-sent heads of {len(half)} B: {held >> 20} MiB, {per_half:.0f} B each; others are answered")
    if per_half > HALF_HEAD_MAX:
        sys.exit(f"many_connections: more than {HALF_HEAD_MAX} B for half a head")
    for _, writer in connections:
        writer.close()


def get(path):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"


def post(path, body=""):
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nRequest-Timeout-Ms: 30000\r\nContent-Length: {len(body)}\r\n\r\n{body}"


async def each(connections, request):
    """One request on every connection, all at once."""
    await asyncio.gather(*(call(one, request(number)) for number, one in enumerate(connections)))


async def call(connection, request):
    reader, writer = connection
    writer.write(request.encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length:")[1].split("\r\n")[0])
    body = await reader.readexactly(length)
    if not head.startswith("http/1.1 200"):
        sys.exit(f"many_connections: refused: {head} {body.decode()}")
    return body


main()
