"""A cluster of one node and one gateway, and raw HTTP, for tests of misbehaving clients. DKC names the binary."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile

DKC = os.environ.get("DKC", "dkc")


class Gateway:
    def __init__(self, address, pid):
        self.host, port = address.rsplit(":", 1)
        self.port, self.pid = int(port), pid

    def memory(self, what="VmRSS"):
        """The memory of the process in bytes: now, or (VmHWM) the maximum since `forget_peak`. Fails if it has died."""
        with open(f"/proc/{self.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))

    def forget_peak(self):
        with open(f"/proc/{self.pid}/clear_refs", "w") as file:
            file.write("5")

    async def connect(self, deaf=False):
        """Opens a connection. If `deaf`, nothing is read until `transport.resume_reading`, and the kernel buffers little."""
        sock = socket.socket()
        sock.setblocking(False)
        if deaf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        reader, writer = await asyncio.open_connection(sock=sock)
        if deaf:
            writer.transport.pause_reading()
        return reader, writer

    async def connect_many(self, count, deaf=False):
        some = []
        for start in range(0, count, 500):
            few = range(start, min(start + 500, count))
            some += await asyncio.gather(*(self.connect(deaf) for _ in few))
        return some

    async def ask(self, request):
        """Sends one request on a connection of its own, and returns status and body."""
        connection = await self.connect()
        try:
            return await call(connection, request)
        finally:
            connection[1].close()


@contextlib.contextmanager
def one_gateway(name, **how):
    """Runs `dkc dev`. `name` is that of the test, for error messages; `how` are arguments of Popen."""
    with tempfile.TemporaryDirectory() as folder:
        line = [DKC, "dev", "--nodes", "1", "--http", "127.0.0.1:0", "--data", folder]
        dev = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, **how)
        try:
            ready = dev.stdout.readline()
            if not ready.startswith("ready http://"):
                sys.exit(f"{name}: dkc dev did not become ready")
            with open(os.path.join(folder, "cluster.json")) as file:
                processes = json.load(file)["processes"]
            pid = next(p["pid"] for p in processes if p["role"] == "gateway")
            yield Gateway(ready.split("//")[1].strip(), pid)
        finally:
            dev.send_signal(signal.SIGTERM)
            if dev.wait(30) != 0:
                sys.exit(f"{name}: dkc dev did not stop in order")


def get(path):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def post(path, body=b"", *headers, version="1.1"):
    """A request with a long timeout, so that a busy machine does not make its outcome unknown."""
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Request-Timeout-Ms: 60000", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def call(connection, request):
    reader, writer = connection
    writer.write(request)
    return await answer(reader)


async def answer(reader):
    """Reads the next response: status and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length:")[1].split("\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def statuses(reader):
    """The statuses of all responses until the connection is closed. A truncated response does not count."""
    found = []
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            found.append((await answer(reader))[0])
    return found
