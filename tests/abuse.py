#!/usr/bin/env python3
"""Abuses a gateway in many ways: each by itself, then all at once, beside well-behaved clients that keep counting.

Starts `dkc dev --nodes 1` (DKC names the binary). After each abuse the gateway must be the same process and ready, have
closed the connections that it should close, and have used no more memory than its documented limits add up to
(docs/operations.md, "Memory of a gateway"). Every counter must have exactly the value that was acknowledged, which the ledger records;
a refused increment is in the ledger with 0. Prints a table.

Arguments are the names of abuses, as in the table but with `_`: then only those run.
"""

import asyncio
import base64
import contextlib
import json
import os
import random
import resource
import sys
import time

from one_gateway import answer, call, get, one_gateway, post, statuses

CONNECTIONS = int(os.environ.get("CONNECTIONS", "10000"))
ACTIVE = int(os.environ.get("ACTIVE", "1000"))
ROUNDS = int(os.environ.get("ROUNDS", "20"))
WORKERS, BEHAVED = 2, 4
MIB = 1 << 20
# The memory of an idle connection that has had a request, and so has its buffers.
IDLE_MAX = 32 << 10
# A head has 32 KiB at most, and a growing buffer may be twice as large for a moment. The output may take as much.
CONNECTION_MAX = 64 << 10
# The gateway's memory and its division (gateway/src/memory.rs): a worker holds so many bytes of bodies and responses, and
# as many again while they are moved, read or written.
MEMORY = int(os.environ.get("MEMORY_BYTES", 2 << 30))
# The connections that are open at once: seven eighths of the open files, minus a few.
PLACES = CONNECTIONS + 6000
FILES = PLACES * 8 // 7 + 200
HELD_MAX = WORKERS * 2 * ((MEMORY - (64 << 20) - PLACES * CONNECTION_MAX) // WORKERS // 4)
# The memory that any abuse may take besides. As much may be left of all of them once the allocator has returned what is free,
# which takes it some 10 seconds.
SOME, RETURNED_WITHIN = 64 << 20, 30
# The memory that responses may still take that have just been read.
READ_MAX = 256 << 20
# The time limit of one abuse in seconds; a longer one hangs. On an otherwise idle machine all of them take about 60.
WITHIN = 120
NAMESPACE = "/v1/counters/abuse"
LAST = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
NDJSON, TEXT, JSON = (f"Content-Type: {media}" for media in ["application/x-ndjson", "text/plain", "application/json"])
BODY_MAX = 8 << 20


def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < FILES:
        sys.exit(f"abuse: {hard} open files allowed, {FILES} needed: ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The gateway starts with a low limit, as in most shells, and raises it itself.
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    env = os.environ | {"DKC_WORKERS": str(WORKERS), "DKC_MEMORY_BYTES": str(MEMORY), "DKC_CONNECTIONS": str(PLACES)}
    with one_gateway("abuse", env=env, preexec_fn=limit) as gateway:
        try:
            asyncio.run(Abuse(gateway).run())
        except Wrong as wrong:
            sys.exit(f"abuse: {wrong}")
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            sys.exit(f"abuse: a connection that did nothing wrong was closed: {error}")


class Wrong(Exception):
    pass


def expect(what, found, *wanted):
    if found not in wanted:
        raise Wrong(f"{what}: {found}, expected {' or '.join(map(str, wanted))}")


def path(key):
    """The path of an increment, with every byte of the key percent-encoded."""
    return NAMESPACE + "/" + "".join(f"%{byte:02x}" for byte in key) + "/increment"


def pieces(*parts):
    """A chunked body."""
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def chunked(key, body, version="1.1"):
    timeout = 2000 if key == b"refused" else 60000
    return f"POST {path(key)} HTTP/{version}\r\nHost: x\r\nRequest-Timeout-Ms: {timeout}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + body


class Abuse:
    def __init__(self, gateway):
        self.gateway = gateway
        # Key -> the acknowledged sum.
        self.ledger = {}
        self.slowest = 0.0
        # The gateway may be out of memory for bodies: then it answers 429.
        self.crowded = False

    async def run(self):
        self.at_rest = self.gateway.memory()
        _, page = await self.gateway.ask(get("/openapi.json"))
        self.behaving = [asyncio.create_task(self.behave(f"behaved {number}".encode())) for number in range(BEHAVED)]
        each = [
            (self.idle, CONNECTIONS * IDLE_MAX),
            (self.half_heads, CONNECTIONS * CONNECTION_MAX),
            (self.half_bodies, 2000 * CONNECTION_MAX),
            (self.large_half_bodies, HELD_MAX),
            (self.smallest_items, 0),
            (self.dripping_bodies, 400 * CONNECTION_MAX),
            (self.deep_pipelines, 100 * CONNECTION_MAX),
            (self.pipelines_never_read, 200 * (CONNECTION_MAX + len(page))),
            (self.large_answers_unread, HELD_MAX),
            (self.http_1_0, 500 * CONNECTION_MAX),
            (self.chunked_bodies, 360 * CONNECTION_MAX),
            (self.endless_bodies, HELD_MAX),
            (self.heads_too_large, 150 * CONNECTION_MAX),
            (self.keys_of_every_byte, 300 * CONNECTION_MAX),
            (self.contradictory_lengths, 280 * CONNECTION_MAX),
            (self.no_http, 700 * CONNECTION_MAX),
        ]
        print(f"{'abuse':<22}{'connections':>12}{'before':>8}{'highest':>9}{'after':>7}{'may grow by (MiB)':>19}  result")
        only = sys.argv[1:]
        for abuse, may_grow in [one for one in each if not only or one[0].__name__ in only]:
            await self.item(abuse.__name__.replace("_", " "), abuse(), may_grow)
        # All clients together can't hold more than the limits. Half of the connections are idle.
        together = [abuse for abuse, _ in each if abuse != self.idle]
        every = CONNECTIONS * CONNECTION_MAX + HELD_MAX
        if not only or "all_at_once" in only:
            await self.item("all at once", self.all_at_once(together), every)
        for task in self.behaving:
            task.cancel()
            await asyncio.wait([task])
        await self.ledger_holds("at the end")
        await self.no_bugs()
        behaved = sum(self.ledger[f"behaved {number}".encode()] for number in range(BEHAVED))
        rest = await self.memory_at_rest()
        print(f"{behaved} increments of well-behaved clients, the slowest took {self.slowest:.2f} s")
        print(f"{len(self.ledger)} counters have exactly the {sum(self.ledger.values())} increments that were acknowledged")
        print(f"memory at rest {self.at_rest // MIB} MiB, in the end {rest // MIB} MiB")
        if rest - self.at_rest > SOME:
            raise Wrong(f"{rest // MIB} MiB are still used at the end, {(self.at_rest + SOME) // MIB} MiB are allowed")

    async def memory_at_rest(self):
        """Waits until the free memory is returned, or for as long as that may take."""
        for _ in range(10 * RETURNED_WITHIN):
            if self.gateway.memory() - self.at_rest <= SOME:
                break
            await asyncio.sleep(0.1)
        return self.gateway.memory()

    async def item(self, name, abuse, may_grow):
        before = self.gateway.memory()
        self.gateway.forget_peak()
        try:
            connections, what = await asyncio.wait_for(abuse, WITHIN)
        except asyncio.TimeoutError:
            raise Wrong(f"{name}: not over within {WITHIN} s")
        for task in self.behaving:
            if task.done():
                task.result()
        highest = self.gateway.memory("VmHWM")
        await self.all_closed(name)
        after = self.gateway.memory()
        sizes = [f"{before // MIB:>8}{highest // MIB:>9}{after // MIB:>7}{(may_grow + SOME) // MIB:>19}"]
        print(f"{name:<22}{connections:>12}{sizes[0]}  {what}", flush=True)
        if highest - before > may_grow + SOME:
            raise Wrong(f"{name}: grew by {(highest - before) // MIB} MiB")
        status, body = await self.gateway.ask(get("/readyz"))
        expect(f"/readyz after {name}", status, 200)
        await self.ledger_holds(name)

    async def all_closed(self, name):
        """Waits until the gateway has noticed the closed connections, and only the well-behaved clients and this one are left."""
        for _ in range(200):
            if await self.metric("dkc_connections") <= BEHAVED + 1:
                return
            await asyncio.sleep(0.1)
        raise Wrong(f"{name}: the gateway keeps connections that are gone")

    async def metric(self, name):
        _, page = await self.gateway.ask(get("/metrics"))
        return sum(int(line.split()[-1]) for line in page.decode().splitlines() if line.startswith(name))

    async def no_bugs(self):
        """Checks the statuses: 500 would be a bug, and no abuse is a reason for 504. 503 is for reads beyond the limit."""
        for code in range(500, 600):
            for operation in ["increment", "increment_batch", "get", "get_batch", "delete", "page", "none"]:
                if code == 503 and operation in ("get", "get_batch", "page"):
                    continue
                found = await self.metrics_of(operation, code)
                expect(f"answers {code} to {operation}", found, 0)

    async def metrics_of(self, operation, code):
        if not hasattr(self, "page"):
            self.page = (await self.gateway.ask(get("/metrics")))[1].decode()
        name = f'dkc_requests_total{{op="{operation}",code="{code}"}}'
        return sum(int(line.split()[-1]) for line in self.page.splitlines() if line.startswith(name))

    # ---- the ledger ---------------------------------------------------------------------------------

    def acknowledged(self, key, count):
        self.ledger[key] = self.ledger.get(key, 0) + count

    async def ledger_holds(self, when):
        """Compares the counters with the ledger. Those of the well-behaved clients change meanwhile, and lie between two states."""
        before = dict(self.ledger)
        keys = [{"key_base64": base64.b64encode(key).decode()} for key in before]
        status, body = await self.gateway.ask(post(f"{NAMESPACE}/get", json.dumps({"keys": keys}).encode()))
        expect(f"reading the counters, {when}", status, 200)
        for (key, least), counter in zip(before.items(), json.loads(body)["counters"], strict=True):
            # One batch of a well-behaved client may be in flight.
            most = self.ledger[key] + (3 if key.startswith(b"behaved") and when != "at the end" else 0)
            if not least <= counter["value"] <= most:
                raise Wrong(f"{when}: {key} is {counter['value']}, acknowledged {least} to {most}")

    # ---- the well-behaved clients -------------------------------------------------------------------

    async def behave(self, key):
        """Keeps counting, one request after the other. Its bodies are so small that there is always room for them."""
        self.acknowledged(key, 0)
        connection = await self.gateway.connect()
        while True:
            for counts, request in [
                (1, post(path(key))),
                (2, post(path(key), b'{"delta":2}')),
                (3, post(f"{NAMESPACE}/increment", key + b"\n" + key + b"\t2\n", TEXT)),
            ]:
                began = time.monotonic()
                # A client that is cancelled in a request still reads the response, to know what was counted.
                status, body = await asyncio.shield(self.counted(key, counts, call(connection, request)))
                self.slowest = max(self.slowest, time.monotonic() - began)
                expect("a client that behaves", status, 200)
            await asyncio.sleep(0.01)

    async def counted(self, key, counts, calling):
        status, body = await calling
        if status == 200:
            self.acknowledged(key, counts)
        return status, body

    # ---- incomplete and slow requests ---------------------------------------------------------------

    async def idle(self, count=CONNECTIONS):
        before = self.gateway.memory()
        connections = await self.gateway.connect_many(count)
        await self.each(connections, get("/livez"))
        idle = (self.gateway.memory() - before) / count
        began = time.monotonic()
        for _ in range(ROUNDS):
            await self.each(connections[:ACTIVE], post(path(b"active")))
            self.acknowledged(b"active", ACTIVE)
        seconds = time.monotonic() - began
        await self.each(connections, get("/livez"))
        self.close(connections)
        if idle > IDLE_MAX:
            raise Wrong(f"{idle:.0f} B for an idle connection, {IDLE_MAX} are allowed")
        return count, f"{idle:.0f} B each; {ACTIVE * ROUNDS} increments of {ACTIVE} of them in {seconds:.1f} s"

    async def half_heads(self, count=CONNECTIONS):
        before = self.gateway.memory()
        connections = await self.gateway.connect_many(count)
        half = f"POST {path(b'half')} HTTP/1.1\r\n".encode() + b"X: " + b"y" * 31_000
        self.acknowledged(b"half", 0)
        for _, writer in connections:
            writer.write(half)
        await asyncio.gather(*(writer.drain() for _, writer in connections))
        # The gateway does not report when it has read them, but its memory shows that it holds them.
        earlier, held = 0, self.gateway.memory()
        while held > earlier or not self.crowded and held - before < count * len(half) // 2:
            await asyncio.sleep(0.2)
            earlier, held = held, self.gateway.memory()
        self.close(connections)
        return count, f"{(held - before) / count:.0f} B for each of {len(half)} B"

    async def half_bodies(self, count=2000):
        """Announces bodies of 8 MiB and sends two bytes. Half of the clients go away, the others wait for the response."""
        space = self.gateway.memory("VmSize")
        connections = await self.gateway.connect_many(count)
        self.acknowledged(b"half", 0)
        promises = ["Content-Length: 8388608\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n800000\r\n"]
        for number, (_, writer) in enumerate(connections):
            head = f"POST {path(b'half')} HTTP/1.1\r\nHost: x\r\nRequest-Timeout-Ms: 3000\r\n{promises[number % 2]}"
            writer.write(head.encode() + b"{")
        await asyncio.sleep(1)
        for _, writer in connections:
            writer.write(b'"')
        await asyncio.sleep(1)
        space = self.gateway.memory("VmSize") - space
        self.close(connections[: count // 2])
        for reader, _ in connections[count // 2 :]:
            expect("half a body", await statuses(reader), [400], *self.or_crowded())
        self.close(connections)
        # Bytes that are only announced must cost nothing, not even address space, which may be limited.
        if space > 2 << 30 and not self.crowded:
            raise Wrong(f"{space // MIB} MiB are reserved for bodies that are only announced")
        return count, f"8 MiB announced by each: 400 at the deadline, {space // MIB} MiB set aside"

    async def large_half_bodies(self, count=90, size=8 << 20):
        """Sends large bodies without their last byte, in total more than the gateway holds."""
        self.acknowledged(b"large", 0)
        head = f"POST {NAMESPACE}/increment HTTP/1.1\r\nHost: x\r\n{TEXT}\r\nContent-Length: {size}\r\nRequest-Timeout-Ms: 60000\r\n\r\n"

        async def offer(connection):
            reader, writer = connection
            with contextlib.suppress(ConnectionError):
                writer.write(head.encode())
                for _ in range(size // 65536 - 1):
                    writer.write(b"large12\n" * 8192)
                    await writer.drain()
                writer.write(b"large12\n" * 8191 + b"large12")
                await writer.drain()
            # Bodies that are not refused by now are held.
            with contextlib.suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(statuses(reader), 6)

        connections = await self.gateway.connect_many(count)
        found = await asyncio.gather(*map(offer, connections))
        self.close(connections)
        refused = [status for status in found if status]
        for status in refused:
            # On a busy machine this may take all the time there is.
            expect("a body beyond what is held", status, [429], [400])
        if [429] not in refused:
            raise Wrong(f"{count * size // MIB} MiB of bodies are held")
        return count, f"{count * size // MIB} MiB without their last byte: {len(refused)} refused, {found.count(None)} held"

    async def smallest_items(self, tries=5):
        """Sends 8 MiB of the smallest items, four million of them: the first one above the limit ends the request."""
        self.acknowledged(b"x", 0)
        fill = lambda start, item: start + item * ((BODY_MAX - len(start)) // len(item))
        table = [
            ("/increment", fill(b"", b"x\n"), NDJSON),
            ("/increment", fill(b"", b"0\n"), NDJSON),
            ("/increment", fill(b"", b"x\n"), TEXT),
            ("/increment", fill(b"", b"x\t1.5\n"), TEXT),
            ("/increment", fill(b'{"increments":[0', b",0"), JSON),
            ("/increment", fill(b'{"increments":[{"key":"a"}', b',{"key":"a"}'), JSON),
            ("/get", fill(b'{"keys":[0', b",0"), JSON),
            ("/get", fill(b'{"keys":["a"', b',"a"'), JSON),
        ]
        slowest = 0
        for path, body, headers in table:
            seconds = []
            for _ in range(tries):
                connection = await self.gateway.connect()
                began = time.monotonic()
                status, _ = await call(connection, post(NAMESPACE + path, body, headers))
                seconds.append(time.monotonic() - began)
                expect(f"{body[:30]}...", status, 413, *([429] if self.crowded else []))
                self.close([connection])
            # Other processes compete for this machine: the fastest try shows the gateway's speed.
            slowest = max(slowest, min(seconds))
        if slowest > 0.1 and not self.crowded:
            raise Wrong(f"a body of too many items is refused after {slowest:.3f} s")
        return len(table) * tries, f"8 MiB each: 413 after {1000 * slowest:.0f} ms at most, the best of {tries}"

    async def dripping_bodies(self, count=400):
        """Sends bodies one byte at a time. Half of them end in time, and count; the others do not."""
        self.acknowledged(b"half", 0)
        body = b'{"delta":3}'
        connections = await self.gateway.connect_many(count)

        async def drip(number, connection):
            ends = number % 2 == 0
            key, timeout, drops = (b"dripped", 60000, body) if ends else (b"half", 500, body[:-1] + b" " * 400)
            head = f"POST {path(key)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nRequest-Timeout-Ms: {timeout}\r\n"
            length = f"Content-Length: {len(body) if ends else 1000}\r\n\r\n"
            connection[1].write((head + length).encode())
            answered = asyncio.create_task(statuses(connection[0]))
            for drop in drops:
                if answered.done():
                    break
                connection[1].write(bytes([drop]))
                await asyncio.sleep(0.05)
            found = await answered
            expect("a body in drops", found, [200 if ends else 400], *self.or_crowded())
            self.acknowledged(key, 3 if found == [200] else 0)

        await asyncio.gather(*(drip(*each) for each in enumerate(connections)))
        self.close(connections)
        return count, "a byte at a time: counted when whole, else 400"

    # ---- clients that do not read -------------------------------------------------------------------

    async def deep_pipelines(self, count=100, depth=300):
        """Sends hundreds of requests at once, reads nothing for a while, and then all responses."""
        connections = await self.gateway.connect_many(count, deaf=True)
        for _, writer in connections:
            writer.write(post(path(b"pipelined")) * depth + LAST)
        await asyncio.sleep(1)
        for reader, writer in connections:
            writer.transport.resume_reading()
            expect("a pipeline", await statuses(reader), [200] * (depth + 1))
            self.acknowledged(b"pipelined", depth)
        self.close(connections)
        return count, f"{count * depth} increments, {depth} at once: all answered in order"

    async def pipelines_never_read(self, count=200, depth=300):
        connections = await self.gateway.connect_many(count, deaf=True)
        for _, writer in connections:
            writer.write(get("/openapi.json") * depth)
        await asyncio.sleep(1)
        self.close(connections)
        return count, f"{depth} pages asked for on each"

    async def large_answers_unread(self, count=40):
        """Sends 200 KB of invalid lines and one valid one: the response has 16 MB."""
        before = self.gateway.memory()
        lines = b'{"key":"answered"}\n' + b"x\n" * 99_999
        connections = await self.gateway.connect_many(count, deaf=True)
        for _, writer in connections:
            writer.write(post(f"{NAMESPACE}/increment", lines, NDJSON))
        await asyncio.sleep(3)
        found = []
        for reader, writer in connections:
            writer.transport.resume_reading()
            found.append((await answer(reader))[0])
        for status in found:
            expect("a large answer", status, 200, 429)
        self.acknowledged(b"answered", found.count(200))
        # The clients have read the responses, but are still connected.
        held = self.gateway.memory()
        self.close(connections)
        if not found.count(429):
            raise Wrong(f"{count * 16} MB of responses are held")
        if held - before > READ_MAX and not self.crowded:
            raise Wrong(f"{(held - before) // MIB} MiB are held of responses that have been read")
        return count, f"16 MB to each: {found.count(200)} held, {found.count(429)} refused with 429; {held // MIB} MiB when read"

    # ---- odd HTTP -----------------------------------------------------------------------------------

    async def http_1_0(self, count=500):
        kept = "Connection: keep-alive"
        closed = post(path(b"1.0"), version="1.0")
        body = post(path(b"1.0"), b'{"delta":2}', kept, version="1.0")
        table = [
            (closed + LAST, [200], 1),
            (body + LAST, [200, 200], 2),
            (post(path(b"1.0"), b"", kept, version="1.0") * 3 + closed, [200] * 4, 4),
            (f"POST {path(b'1.0')} HTTP/1.0\r\n\r\n".encode(), [200], 1),
            # HTTP/1.0 has no chunks.
            (chunked(b"1.0", pieces(b"{}"), "1.0") + LAST, [400], 0),
        ]
        await asyncio.gather(*(self.sent(raw, want, count // 5, b"1.0", counts) for raw, want, counts in table))
        return count, "counted, kept open where asked; chunks refused"

    async def chunked_bodies(self, times=20):
        good, bad = (b"chunked", 5), (b"refused", 0)
        table = [
            (good, pieces(b'{"delta":5}'), [200, 200]),
            (good, pieces(*(bytes([byte]) for byte in b'{"delta":5}')), [200, 200]),
            (good, b'b;name=value;x="y"\r\n{"delta":5}\r\n0\r\nTrailer: t\r\nX: y\r\n\r\n', [200, 200]),
            (good, b"0" * 40 + b'B\r\n{"delta":5}\r\n000\r\n\r\n', [200, 200]),
            # Chunk sizes that are invalid, or do not match the data.
            (bad, b"zz\r\n{}\r\n0\r\n\r\n", [400]),
            (bad, b"-2\r\n{}\r\n0\r\n\r\n", [400]),
            (bad, b"\r\n{}\r\n0\r\n\r\n", [400]),
            (bad, b"1\r\n{}\r\n0\r\n\r\n", [400]),
            (bad, b"3\r\n{}\r\n0\r\n\r\n", [400]),
            (bad, b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n", [400]),
            # A chunk so large that it does not end before the time limit.
            (bad, b"ffffffffffffffff\r\n{}\r\n0\r\n\r\n", [400]),
            (bad, b"2\n{}\n0\n\n", [400]),
            # Lines above every limit.
            (bad, b"2;" + b"x" * 100_000 + b"\r\n{}\r\n0\r\n\r\n", [400]),
            (bad, b"2" * 100_000, [400]),
            (bad, b"2\r\n{}\r\n0\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", [400]),
            (bad, b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 5000 + b"\r\n", [400]),
        ]
        await asyncio.gather(
            *(self.sent(chunked(key, body) + LAST, want, times, key, counts) for (key, counts), body, want in table)
        )
        return len(table) * times, "counted when whole and well-formed, else 400 or 413"

    async def endless_bodies(self, count=24):
        """Sends chunks or a trailer without end: the gateway reads on for a while, to deliver its refusal, and then closes."""
        self.acknowledged(b"refused", 0)
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        endless = [chunk, b"1\r\nx\r\n" * 8192, b"0\r\n" + b"X: " + b"y" * 65536]
        connections = await self.gateway.connect_many(count)

        async def send(number, connection):
            reader, writer = connection
            writer.write(chunked(b"refused", b""))
            answered = asyncio.create_task(statuses(reader))
            part, sent = endless[number % 3], 0
            with contextlib.suppress(ConnectionError):
                while sent < 256 << 20 and not answered.done():
                    writer.write(part)
                    await writer.drain()
                    sent += len(part)
                    part = endless[number % 3].removeprefix(b"0\r\n")
            found = await answered
            # A client that is cut off may not be able to read the reason. A busy machine may take all of its time.
            expect("an endless body", found, [], [400], [413], *self.or_crowded())
            return sent

        sent = await asyncio.gather(*(send(*each) for each in enumerate(connections)))
        self.close(connections)
        if max(sent) >= 256 << 20:
            raise Wrong("an endless body is read without limit")
        return count, f"{sum(sent) // MIB} MiB sent, then closed: 413 or 400"

    async def heads_too_large(self, times=25):
        line = f"POST {path(b'refused')} HTTP/1.1\r\n".encode()
        long = f"POST {NAMESPACE}/{'k' * 9000}/increment HTTP/1.1\r\n\r\n".encode()
        table = [
            (long, [414, 200]),
            (f"POST {NAMESPACE}/{'k' * 100_000}/increment HTTP/1.1\r\n\r\n".encode(), [414]),
            (line + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n", [431]),
            (line + b"X: y\r\n" * 200 + b"\r\n", [431]),
            (line + b"X" * 100_000 + b": y\r\n\r\n", [431]),
            # A key of 1,024 bytes at most.
            (post(path(b"k" * 1025)), [400, 200]),
        ]
        await asyncio.gather(*(self.sent(raw + LAST, want, times, b"refused", 0) for raw, want in table))
        return len(table) * times, "414 and 431"

    async def keys_of_every_byte(self):
        """Uses every byte in keys, percent-encoded and raw, in the path and in each kind of body."""
        every = [bytes([byte]) for byte in range(256)]
        connection = await self.gateway.connect()
        for byte in every:
            for key, line in [(byte, path(byte)), (b"k" + byte, path(b"k" + byte).upper().replace(NAMESPACE.upper(), NAMESPACE))]:
                status, _ = await call(connection, post(line.replace("/INCREMENT", "/increment")))
                expect(f"the key {key}", status, 200)
                self.acknowledged(key, 1)
        # The bytes that a URL may contain raw. Of the others, # and ? end the path, and / separates its segments.
        for byte in every:
            raw = f"POST {NAMESPACE}/".encode() + byte + b"/increment HTTP/1.1\r\nHost: x\r\n\r\n"
            good = byte in b"!\"$&'()*+,-.:;=@[\\]^_{|}~" or byte.isalnum()
            refused = {b"#": [405, 200], b"?": [405, 200], b"/": [404, 200], b"%": [400, 200]}.get(byte, [400])
            await self.sent(raw + LAST, [200, 200] if good else refused, 1, byte, 1 if good else 0)
        # The characters that a JSON string may contain raw: UTF-8 without control characters and quotes. One wrong line fails alone.
        fine = [byte for byte in every if b" " <= byte <= b"\x7f" and byte not in b'"\\']
        for byte in every:
            body = b'{"increments":[{"key":"' + byte + b'"}]}'
            status, _ = await self.call_until_taken(connection, post(f"{NAMESPACE}/increment", body))
            expect(f"JSON with a raw {byte}", status, 200 if byte in fine else 400)
            self.acknowledged(byte, 1 if byte in fine else 0)
        escaped = [{"key": chr(byte[0]), "delta": 2} for byte in every]
        encoded = [{"key_base64": base64.b64encode(byte).decode(), "delta": 3} for byte in every]
        for batch, body, headers, applied, failed in [
            ([(chr(byte[0]).encode(), 2) for byte in every], json.dumps({"increments": escaped}).encode(), [], 256, 0),
            ([(byte, 3) for byte in every], json.dumps({"increments": encoded}).encode(), [], 256, 0),
            ([(byte, 3) for byte in every], "\n".join(map(json.dumps, encoded)).encode(), [NDJSON], 256, 0),
            # The line feed splits the line into two, both wrong.
            ([(byte, 1) for byte in fine], b"\n".join(b'{"key":"' + byte + b'"}' for byte in every), [NDJSON], len(fine), 257 - len(fine)),
            # An empty line, or one with CR only, is ignored.
            ([(byte, 1) for byte in every if byte not in b"\r\n"], b"".join(byte + b"\n" for byte in every), [TEXT], 254, 0),
            ([(b"k" + byte, 7) for byte in every if byte != b"\n"], b"".join(b"k" + byte + b"\t7\n" for byte in every if byte != b"\n"), [TEXT], 255, 0),
        ]:
            status, answered = await self.call_until_taken(connection, post(f"{NAMESPACE}/increment", body, *headers))
            expect(f"every byte in {headers}", status, 200)
            told = json.loads(answered)
            expect(f"every byte in {headers}", (told["applied"], len(told["failed"])), (applied, failed))
            for key, count in batch:
                self.acknowledged(key, count)
        self.close([connection])
        return 257, "256 in the path, encoded and raw; in JSON, NDJSON and text"

    async def contradictory_lengths(self, times=20):
        """Sends requests with two contradictory lengths: the bytes after one end must not be read as the next request."""
        line = f"POST {path(b'lengths')} HTTP/1.1\r\nHost: x\r\n".encode()
        hidden = post(path(b"smuggled"))
        behind = b"0\r\n\r\n" + hidden
        length, te = b"Content-Length: %d\r\n" % len(behind), b"Transfer-Encoding: chunked\r\n"
        self.acknowledged(b"smuggled", 0)
        table = [
            # RFC 9112, 6.1: the chunks count, and the connection is closed after them.
            (line + length + te + b"\r\n" + behind, [200], 1),
            (line + te + length + b"\r\n" + behind, [200], 1),
            (line + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", [200, 200], 1),
            (line + b"Content-Length: 0\r\n" + length + b"\r\n" + hidden, [400], 0),
            (line + length + b"Content-Length: 0\r\n\r\n" + hidden, [400], 0),
            (line + b"Content-Length: 0, 5\r\n\r\n" + hidden, [400], 0),
            (line + b"Content-Length: +0\r\n\r\n" + hidden, [400], 0),
            (line + b"Content-Length: -1\r\n\r\n" + hidden, [400], 0),
            (line + b"Content-Length: 99999999999999999999\r\n\r\n" + hidden, [400], 0),
            (line + b"Transfer-Encoding: xchunked\r\n\r\n" + behind, [400], 0),
            (line + b"Transfer-Encoding: chunked, identity\r\n\r\n" + behind, [400], 0),
            (line + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + behind, [400], 0),
            (line + b"Transfer-Encoding : chunked\r\n\r\n" + behind, [400], 0),
            (line + b"X: a\r\n " + te + b"\r\n" + behind, [400], 0),
        ]
        await asyncio.gather(*(self.sent(raw + LAST, want, times, b"lengths", counts) for raw, want, counts in table))
        return len(table) * times, "nothing smuggled"

    async def no_http(self, times=20):
        random_bytes = random.Random(1).randbytes
        line = f" {path(b'refused')} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        table = [
            *((method + line + LAST, [405, 200]) for method in [b"PUT", b"FROB", b"post", b"F" * 3000, b"PATCH", b"TRACE"]),
            (b"OPTIONS * HTTP/1.1\r\n\r\n" + LAST, [404, 200]),
            (b"CONNECT x:1 HTTP/1.1\r\n\r\n" + LAST, [404, 200]),
            (b"PO ST" + line + LAST, [400]),
            (b"P\0ST" + line + LAST, [400]),
            (b"POST" + line.replace(b"1.1", b"1.2") + LAST, [400]),
            (b"POST" + line.replace(b"1.1", b"9.9") + LAST, [400]),
            (b"POST\r\n\r\n" + LAST, [400]),
            (b"\0" * 100_000, [400]),
            # HTTP/2 from the first byte: the client would understand no response of the gateway.
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", []),
            # The ClientHello of TLS.
            (bytes.fromhex("16030102000100" + "01fc0303") + random_bytes(508), [400]),
        ]
        await asyncio.gather(*(self.sent(raw, want, times, b"refused", 0) for raw, want in table))
        # Random bytes may begin like a head, so they end in a way that no head does.
        garbage = [b"\xff" + random_bytes(random.Random(seed).randrange(1, 5000)) + b"\r\n\r\n" for seed in range(300)]
        await asyncio.gather(*(self.sent(raw, [400], 1, b"refused", 0) for raw in garbage))
        return len(table) * times + len(garbage), "400, 404 and 405; HTTP/2 is closed"

    async def all_at_once(self, abuses):
        idle = await self.gateway.connect_many(CONNECTIONS // 2)
        await self.each(idle, get("/livez"))
        self.crowded = True
        of = {self.half_heads: [CONNECTIONS // 2]}
        done = await asyncio.gather(*(abuse(*of.get(abuse, [])) for abuse in abuses))
        self.crowded = False
        # The idle connections were not affected.
        await self.each(idle, get("/livez"))
        self.close(idle)
        return len(idle) + sum(connections for connections, _ in done), "as before"

    # ---- helpers ------------------------------------------------------------------------------------

    async def sent(self, raw, want, times, key, counts):
        """Sends these bytes on so many connections at once and reads each to its end: all responses must be like this."""

        async def send():
            reader, writer = await self.gateway.connect()
            writer.write(raw)
            found = await statuses(reader)
            writer.close()
            refused = self.crowded and found[:1] == [429]
            expect(f"{raw[:150]}", found, found if refused else want)
            self.acknowledged(key, 0 if refused else counts)

        await asyncio.gather(*(send() for _ in range(times)))

    def or_crowded(self):
        return [[429]] if self.crowded else []

    async def call_until_taken(self, connection, request):
        while (answered := await call(connection, request))[0] == 429 and self.crowded:
            await asyncio.sleep(0.1)
        return answered

    async def each(self, connections, request):
        """Sends one request on every connection, all at once."""
        for status, _ in await asyncio.gather(*(call(one, request) for one in connections)):
            expect("one of many", status, 200)

    def close(self, connections):
        for _, writer in connections:
            writer.transport.abort()


main()
