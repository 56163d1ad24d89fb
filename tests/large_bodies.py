#!/usr/bin/env python3
"""Many large bodies at once, none of which ends: the gateway's memory stays bounded, and it serves others meanwhile.

Starts `dkc dev --nodes 1` (DKC names the binary). CONNECTIONS connections each send all of an 8 MiB body but its last byte,
more than the gateway agrees to hold: it must refuse what goes beyond with 429 or 503, not grow and not die. Meanwhile and
afterwards single increments are applied, and nothing of the bodies is counted. Prints what it measured.
"""

import asyncio
import json
import os
import sys

from one_gateway import memory, one_gateway

CONNECTIONS = int(os.environ.get("CONNECTIONS", "200"))
BODY = 8 << 20
# What each of two workers holds (BODIES_BYTES_MAX in gateway/src/http.rs), buffers, and a large body's parts being moved.
WORKERS, HELD = 2, 256 << 20
MEMORY_MAX = WORKERS * HELD + (256 << 20)
WITHIN = 120


def main():
    with one_gateway("large_bodies", env=os.environ | {"DKC_WORKERS": str(WORKERS)}) as (address, pid):
        asyncio.run(asyncio.wait_for(measure(address, pid), WITHIN))


async def measure(address, pid):
    host, port = address.rsplit(":", 1)
    before, peak = memory(pid), 0
    offers = [asyncio.create_task(offer(host, port)) for _ in range(CONNECTIONS)]
    counted = 0
    while not all(task.done() for task in offers):
        status, _ = await ask(host, port, "POST /v1/counters/large/other/increment")
        if status != 200:
            sys.exit(f"large_bodies: a small request got {status} meanwhile")
        counted += 1
        peak = max(peak, memory(pid))
        await asyncio.sleep(0.02)
    refused = [task.result()[0] for task in offers if task.result()[0] is not None]
    for task in offers:
        task.result()[1].close()
    grown = peak - before
    print(
        f"{CONNECTIONS} bodies of 8 MiB without their last byte ({CONNECTIONS * BODY >> 20} MiB): {len(refused)} refused with "
        f"{sorted(set(refused))}, memory {before >> 20} MiB, {peak >> 20} MiB at most; {counted} increments applied meanwhile"
    )
    if grown > MEMORY_MAX:
        sys.exit(f"large_bodies: grew by {grown >> 20} MiB, {MEMORY_MAX >> 20} MiB are allowed")
    if not {429, 503} & set(refused) or set(refused) - {0, 429, 503}:
        sys.exit("large_bodies: what goes beyond what is held must be refused with 429 or 503")
    for key, want in [("other", counted), ("key", 0)]:
        _, body = await ask(host, port, f"GET /v1/counters/large/{key}")
        if json.loads(body)["value"] != want:
            sys.exit(f"large_bodies: {key} is {body}, {want} expected")


async def offer(host, port):
    """Sends the body but its last byte; the status that it was refused with, or None if it is waited for."""
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/counters/large/increment HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: {BODY}\r\n"
    writer.write(f"{head}Request-Timeout-Ms: 60000\r\n\r\n".encode())
    answered = asyncio.create_task(status(reader))
    try:
        for _ in range(BODY // 65536 - 1):
            writer.write(b"key\n" * 16384)
            await writer.drain()
            if answered.done():
                break
        writer.write(b"key\n" * 16383 + b"key")
        await writer.drain()
    except ConnectionError:
        pass
    # What is not refused by now is held.
    await asyncio.wait([answered], timeout=5)
    if answered.done():
        return answered.result(), writer
    answered.cancel()
    return None, writer


async def status(reader):
    """What was answered; 0 if the connection was cut before the answer was read, as a refused body that goes on is."""
    try:
        return int((await reader.readline()).split()[1])
    except (ConnectionError, IndexError):
        return 0


async def ask(host, port, request):
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{request} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


main()
